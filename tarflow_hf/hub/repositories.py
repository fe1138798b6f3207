"""What makes a pipeline at home on the Hub: loading by name, saving with the files a repository needs, pushing.

A repository holds weights, configuration, a page, and two small Python files ("shims") that import this package, so
that diffusers and transformers find the classes; there is no second copy of the code.
"""

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from tarflow_hf.hub.checkpoint_files import (
    CONFIG,
    INDEX,
    PIPELINE_CLASS,
    check_index,
    check_weights,
    edit_json,
    pipeline_files,
    replaced_weights,
)
from tarflow_hf.hub.download import download
from tarflow_hf.hub.model_card import Page, for_repository, merge, render
from tarflow_hf.modeling_tarflow import TarFlowModel

_SHIM = '''"""Finds the classes of this repository in the tarflow_hf package; nothing else is here."""

from transformers import PreTrainedModel  # diffusers looks for this name beside the model's

try:
    from tarflow_hf import {names}
except ModuleNotFoundError as error:
    if error.name != "tarflow_hf":
        raise
    raise ModuleNotFoundError("this model needs the tarflow_hf package: pip install tarflow_hf") from error
'''
_SHIMS = {
    "pipeline.py": _SHIM.format(names="TarFlowPipeline"),
    "modeling_tarflow.py": _SHIM.format(names="TarFlowConfig, TarFlowModel"),
    "transformer/modeling_tarflow.py": _SHIM.format(names="TarFlowConfig, TarFlowModel"),
}


class HubPipeline(DiffusionPipeline):
    """A diffusers pipeline around a [`TarFlowModel`] that loads from and is pushed to the Hub without remote code.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval(), guidance_scale=2.0)
        >>> pipe.save_pretrained("digits")
        >>> loaded = TarFlowPipeline.from_pretrained("digits")
        >>> loaded.sampling_defaults["guidance_scale"]
        2.0
        >>> loaded.push_to_hub("user/digits", tag="v1")  # doctest: +SKIP
    """

    @classmethod
    def load_config(  # type: ignore[override]  # diffusers gives a dict, or a tuple that starts with one
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: object
    ) -> dict[str, Any] | tuple[dict[str, Any], ...]:
        """The settings in `model_index.json`, with the classes of this package in place of the repository's shims."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        config["transformer"] = [TarFlowModel.__module__, TarFlowModel.__name__]
        return loaded

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: object,
    ) -> Self:
        """Loads a pipeline from a folder or from the Hub; only safetensors weights are read.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a Hub repository, "user/model".
            variant: Weights to load: None for `model.safetensors`, "fp16" for `model.fp16.safetensors`.
            revision: Branch, tag, commit or "refs/pr/1".
            token: Access token, True for the stored one, False for none.
            cache_dir: Where downloads are kept, in place of the usual cache.
            local_files_only: Whether to use the cache alone; `HF_HUB_OFFLINE=1` does the same.
            force_download: Whether to download again what is in the cache.
            **kwargs: `dtype`, `device_map`, a pipeline default such as `guidance_scale`, and the other arguments of
                `DiffusionPipeline.from_pretrained`.

        Returns:
            The pipeline, its model in evaluation mode.

        Raises:
            OSError: If the folder or repository is missing, private, not a TarFlow pipeline, or incomplete; the
                message says which.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(
                str(pretrained_model_name_or_path),
                variant=variant,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        name = str(pretrained_model_name_or_path)
        check_index(folder, name)
        tensors = None if "transformer" in kwargs else check_weights(folder, name, variant)
        pipe = super().from_pretrained(str(folder), variant=variant, use_safetensors=True, **kwargs)
        if tensors is not None and (missing := sorted(set(pipe.transformer.state_dict()) - tensors)):
            # transformers has left them random, with a warning.
            raise OSError(f"{name} is incomplete: its weights lack {len(missing)} tensors, among them {missing[0]}")
        return pipe

    def save_pretrained(  # type: ignore[override]  # safetensors only; uploading is push_to_hub's
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Saves the pipeline as a folder that can be loaded, or pushed as it is.

        A page (`README.md`) that is already there keeps its text. Nothing of a former pipeline is touched before the
        new one is complete.

        Args:
            save_directory: The folder; made if missing.
            variant: Name for these weights beside the plain ones: "fp16" gives `model.fp16.safetensors`.
            max_shard_size: Bytes, or text like "2GB", above which the weights are split into several files.

        Raises:
            ValueError: If `save_directory` is a file.
        """
        target = Path(save_directory).resolve()
        if target.is_file():
            raise ValueError(f"save_directory must be a folder, got the file {target}")
        target.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as parent:
                folder = Path(parent, target.name)
                super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
                add_repository_files(folder)
                render(self._page(folder.name)).save(folder / "README.md")
                move_pipeline(folder, target)
        finally:
            if not any(target.iterdir()):
                target.rmdir()

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The defaults that are saved with the checkpoint, by the names of the arguments they stand for."""
        names = list(inspect.signature(type(self).__init__).parameters)[2:]  # behind self and transformer
        return {name: self.config[name] for name in names}

    def _page(self, name: str) -> Page:
        """What a page can tell about a pipeline of which nothing else is known."""
        return Page(
            repo_id=f"your-name/{name}",
            config=self.transformer.config,
            num_parameters=self.transformer.num_parameters(),
            defaults=self.sampling_defaults,
        )

    def push_to_hub(  # type: ignore[override]  # adds branch, tag and shards; safetensors only
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        tag: str | None = None,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> CommitInfo:
        """Uploads the pipeline to the Hub in one commit: weights, settings, shims and page.

        A page that is already there keeps its text; its metadata are brought up to date. To upload a page of your own
        making, save the pipeline, write `README.md` in its folder and call [`repositories.push_folder`].

        Args:
            repo_id: "user/model"; made if missing.
            commit_message: Title of the commit.
            private: Whether a repository that is made now is private; None leaves it to the account's default.
            token: Access token, None or True for the stored one.
            create_pr: Whether to open a pull request instead of committing.
            revision: Branch to commit to, made if missing, or an open pull request, "refs/pr/1".
            tag: Name to give to the new commit.
            variant: As in [`save_pretrained`].
            max_shard_size: As in [`save_pretrained`].

        Returns:
            The commit, with the address of the pull request if there is one.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, Path(repo_id).name)
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                revision=revision,
                tag=tag,
                update_card_text=False,
            )


def add_repository_files(folder: Path) -> None:
    """Makes the saved pipeline in a folder ready for the Hub: shims, and settings that name them."""
    modules = {"_class_name": ["pipeline", PIPELINE_CLASS], "transformer": ["modeling_tarflow", "TarFlowModel"]}
    edit_json(folder / INDEX, **modules)
    # Without a dtype in the configuration, each variant is loaded in the dtype that its own file has.
    auto_map = {"AutoConfig": "modeling_tarflow.TarFlowConfig", "AutoModel": "modeling_tarflow.TarFlowModel"}
    edit_json(folder / CONFIG, auto_map=auto_map, dtype=None)
    for name, text in _SHIMS.items():
        (folder / name).write_text(text, encoding="utf-8")


def move_pipeline(folder: Path, target: Path) -> None:
    """Moves a complete pipeline to its place, over a former one whose page keeps its text."""
    if (target / "README.md").is_file():
        existing = ModelCard.load(target / "README.md")
        merge(existing, ModelCard.load(folder / "README.md"), update_text=False).save(folder / "README.md")
    (target / "transformer").mkdir(parents=True, exist_ok=True)
    old, new = pipeline_files(target), pipeline_files(folder)
    for name, path in new.items():
        path.replace(target / name)
    for name in replaced_weights(old, new):
        old[name].unlink()


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    update_card_text: bool = True,
) -> CommitInfo:
    """Uploads a saved pipeline in one commit: what lies in the folder itself and in `transformer/`, nothing deeper.

    Weights of the same variant that the folder no longer has are deleted. A page that somebody edited on the Hub keeps
    its text, whatever the folder holds. In the background: `HfApi().run_as_future(push_folder, folder, repo_id)`.

    Args:
        folder: A folder of [`HubPipeline.save_pretrained`], with pictures and logs beside the pipeline if you like.
        repo_id: As in [`HubPipeline.push_to_hub`], and so are the arguments down to `tag`.
        commit_message: Title of the commit.
        private: Whether a new repository is private.
        token: Access token.
        create_pr: Whether to open a pull request.
        revision: Branch to commit to.
        tag: Name to give to the new commit.
        update_card_text: Whether the folder's page replaces an unedited one on the Hub.

    Returns:
        The commit.

    Raises:
        OSError: If the folder is not a complete TarFlow pipeline.
        ValueError: If both `create_pr` and `revision` are given.
        HfHubHTTPError: If the Hub refuses; with status 412 if somebody committed in the moment between.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> TarFlowPipeline(transformer=TarFlowModel(config).eval()).save_pretrained("digits")
        >>> push_folder("digits", "user/digits", commit_message="First version").commit_url  # doctest: +SKIP
        >>> push_folder("nothing", "user/digits")
        Traceback (most recent call last):
            ...
        OSError: nothing is not a TarFlow pipeline: it has no model_index.json
    """
    if create_pr and revision is not None:
        raise ValueError(f"create_pr=True opens a pull request against main: revision must be None, got {revision!r}")
    folder = Path(folder)
    check_index(folder, str(folder))
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = pipeline_files(folder)
    page = files.pop("README.md")
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    api.preupload_lfs_files(repo_id, additions, create_pr=create_pr, revision=revision)

    # From here to the commit it takes moments, and `parent_commit` makes sure that nobody's edit falls between.
    head = api.model_info(repo_id, revision=revision)
    remote = {sibling.rfilename for sibling in head.siblings or []}
    card = for_repository(ModelCard.load(page), repo_id)
    if "README.md" in remote:
        existing = api.hf_hub_download(repo_id, "README.md", revision=head.sha)
        card = merge(ModelCard.load(existing), card, update_text=update_card_text)
    commit = api.create_commit(
        repo_id,
        [
            *additions,
            CommitOperationAdd("README.md", str(card).encode()),
            *(CommitOperationDelete(name) for name in replaced_weights(remote, files)),
        ],
        commit_message=commit_message or f"Upload {PIPELINE_CLASS}",
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


__all__ = ["HubPipeline", "push_folder"]

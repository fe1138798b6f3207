"""Uploading a saved pipeline to the Hub in one commit: what belongs to a pipeline or a run, checked, nothing else."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, cast, get_type_hints

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from tarflow_hf.configuration_tarflow import TarFlowConfig, did_you_mean, read_json
from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.flow.sampling.settings import SamplingSettings
from tarflow_hf.hub.arguments import as_source
from tarflow_hf.hub.autoencoders import check_autoencoder_files
from tarflow_hf.hub.checkpoint_files import (
    IMAGE_PROCESSOR,
    INDEX,
    PIPELINE_CLASS,
    SHIMS,
    Place,
    pipeline_files,
    replaced_weights,
    weight_variants,
)
from tarflow_hf.hub.model_card import SAMPLING_DEFAULTS, for_repository, merge
from tarflow_hf.hub.model_files import check_model_files, read_config
from tarflow_hf.hub.page_files import read_page
from tarflow_hf.hub.pipeline_index import check_index, check_settings, fits, type_text
from tarflow_hf.hub.safetensors_files import check_finite, read_header
from tarflow_hf.images.image_processor import TarFlowImageProcessor

logger = logging.getLogger(__name__)

# What belongs to a pipeline or to a run, in the folder itself and in the folders of the pipeline's parts.
PUSHED = (
    "README.md LICENSE* model_index.json pipeline.py modeling_*.py recipe.yaml metrics.jsonl results*.json *.png "
    "*.jpg adapter_config.json adapter_model.safetensors pytorch_lora_weights.safetensors"
).split()
PUSHED_OF_PARTS = "config.json preprocessor_config.json *.safetensors *.safetensors.index*.json modeling_*.py".split()

_PARTS = {"transformer": None, "vae": None, "inverse": None}


@dataclass(frozen=True)
class PushOptions:
    """Where and how a pipeline is pushed.

    Args:
        commit_message: Title of the commit.
        private: Whether a repository that is made now is private; None leaves it to the account's default.
        token: Access token, None or True for the stored one.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to, made if missing, or an open pull request, "refs/pr/1".
        tag: Name to give to the new commit.

    Raises:
        ValueError: If both `create_pr` and `revision` are given.

    Example:
        >>> PushOptions(tag="v1").commit_message
        'Upload TarFlowPipeline'
        >>> PushOptions(create_pr=True, revision="dev")
        Traceback (most recent call last):
            ...
        ValueError: create_pr=True opens a pull request against main: revision must be None, got 'dev'
    """

    commit_message: str | None = f"Upload {PIPELINE_CLASS}"
    private: bool | None = None
    token: bool | str | None = None
    create_pr: bool = False
    revision: str | None = None
    tag: str | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if not fits(value := getattr(self, name), kind):
                raise ValueError(f"{name} must be {type_text(kind)}, got {value!r:.80}")
        if self.create_pr and self.revision is not None:
            raise ValueError(
                f"create_pr=True opens a pull request against main: revision must be None, got {self.revision!r}"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Those of a call's keyword arguments; ValueError for an unknown one."""
        known = [item.name for item in fields(cls)]
        for name in options.keys() - set(known):
            raise ValueError(f"pushing has no argument {name!r}{did_you_mean(name, known)}")
        return cls(**options)


def push_folder(
    folder: str | os.PathLike[str], repo_id: str, *, update_card_text: bool = True, **options: object
) -> CommitInfo:
    """Uploads a saved pipeline in one commit, after every file of it has been checked.

    Uploaded is what belongs to a pipeline or a run: in the folder itself `README.md`, `LICENSE`, `model_index.json`,
    the two small Python files, `recipe.yaml`, `metrics.jsonl`, `results*.json`, pictures (PNG, JPEG) and adapters; in
    `transformer/` the configuration and the weights. Nothing deeper, no hidden file, and no link that leaves the
    folder; the log lists what goes and what stays.

    Weights of the same variant that the folder no longer has are deleted. A page that somebody edited on the Hub keeps
    its text, whatever the folder holds. In the background: `HfApi().run_as_future(push_folder, folder, repo_id)`.

    Args:
        folder: A folder of [`HubPipeline.save_pretrained`] or of a training run.
        repo_id: "user/model"; made if missing.
        update_card_text: Whether the folder's page replaces an unedited one on the Hub.
        **options: Those of [`PushOptions`].

    Returns:
        The commit, with the address of the pull request if there is one.

    Raises:
        OSError: If the folder is not a complete and sound TarFlow pipeline with its page. Nothing is made on the Hub.
        ValueError: If options contradict each other, or one is unknown or of another type.
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
    how, folder = PushOptions.of(options), Path(as_source(folder, "folder"))
    if not isinstance(repo_id, str):
        raise ValueError(f"repo_id must be the name of a repository, got {repo_id!r:.80}")
    files, page = _checked(folder)
    api = HfApi(token=how.token)
    repo_id = api.create_repo(repo_id, private=how.private, exist_ok=True).repo_id
    if how.revision is not None and not how.revision.startswith("refs/"):
        api.create_branch(repo_id, branch=how.revision, exist_ok=True)
    commit = _commit(api, repo_id, files, page, how, update_card_text=update_card_text)
    if how.tag is not None:
        api.create_tag(repo_id, tag=how.tag, revision=commit.oid)
    return commit


def _checked(folder: Path) -> tuple[dict[str, Path], ModelCard]:
    """The files to upload and the page, which is not among them, of a folder in which all is sound."""
    name = str(folder)
    index = check_index(folder, name)
    files = files_to_push(folder, list(_PARTS))
    autoencoder = index.get("vae", [None, None])
    for variant in sorted(weight_variants(files)) or [""]:
        check_model_files(folder / "transformer", Place(name, "transformer/"), variant or None)
        if (index.get("inverse") or [None])[0] is not None:
            place = Place(name, "inverse/")
            check_model_files(folder / "inverse", place, variant or None, kind=TarFlowInverseConfig)
        if isinstance(autoencoder, list) and autoencoder[-1:] not in ([], [None]):
            check_autoencoder_files(folder / "vae", Place(name, "vae/"), variant or None, autoencoder[-1])
    config = cast(TarFlowConfig, read_config(folder / "transformer", Place(name, "transformer/")))
    _check_settings(index, config, f"{name}: {INDEX}")
    _check_beside(folder, files)
    page = files.pop("README.md", None)
    if page is None:
        raise OSError(f"{name} is incomplete: it has no README.md, the page that save_pretrained writes")
    try:
        return files, read_page(page)
    except ValueError as error:
        raise OSError(str(error).replace(str(page), f"{name}: README.md")) from error


def _check_settings(index: dict[str, Any], config: TarFlowConfig, name: str) -> None:
    """Raises OSError unless the settings of an index are those of a pipeline of a model with this configuration."""
    known = dict(get_type_hints(SamplingSettings))
    sizes: Any = int | list | None
    check_settings(index, {**{key: known[key] for key in SAMPLING_DEFAULTS}, "image_size": sizes} | _PARTS, name)
    try:
        SamplingSettings.of({}, {key: index.get(key) for key in SAMPLING_DEFAULTS}).check(config)
    except ValueError as error:
        raise OSError(f"{name} is damaged: {error}") from error


def _check_beside(folder: Path, files: Mapping[str, Path]) -> None:
    """Raises OSError unless what lies beside settings and weights is whole: shims, image processor, adapters."""
    for shim in SHIMS:
        if shim not in files:
            raise OSError(f"{folder} is incomplete: it has no {shim}, which save_pretrained writes")
    if IMAGE_PROCESSOR in files:
        content = read_json(files[IMAGE_PROCESSOR], f"{folder}: {IMAGE_PROCESSOR}")
        try:
            TarFlowImageProcessor.from_dict(content)
        except (OSError, ValueError, TypeError) as error:
            raise OSError(f"{folder}: transformer/{error}") from error
    for name, path in files.items():
        if "/" not in name and path.suffix == ".safetensors":
            read_header(path, f"{folder}: {name}")
            check_finite(path, f"{folder}: {name}")


def files_to_push(folder: Path, parts: list[str]) -> dict[str, Path]:
    """The files of a pipeline's folder that are uploaded, by their names in the repository.

    Args:
        folder: The folder.
        parts: The pipeline's parts, each a folder in it.

    Raises:
        OSError: If one of them is a link that leaves the folder.

    Example:
        >>> from pathlib import Path
        >>> for name in (".env", "README.md", "notes.txt"):
        ...     _ = Path(name).write_text("")
        >>> list(files_to_push(Path("."), ["transformer"]))
        ['README.md']
    """
    pushed, left = {}, []
    for name, path in pipeline_files(folder, parts).items():
        patterns = PUSHED_OF_PARTS if "/" in name else PUSHED
        if path.name.startswith(".") or not any(fnmatchcase(path.name, pattern) for pattern in patterns):
            left.append(name)
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise OSError(f"{folder}: {name} is a link that leaves the folder, to {path.resolve()}")
        pushed[name] = path
    logger.info("uploaded from %s: %s", folder, ", ".join(pushed))
    if left:
        logger.warning("not uploaded from %s, as no part of a pipeline or run: %s", folder, ", ".join(left))
    return pushed


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    page: ModelCard,
    how: PushOptions,
    *,
    update_card_text: bool,
) -> CommitInfo:
    """Uploads the files, then commits them with the page, whose text on the Hub may have been edited."""
    card = for_repository(page, repo_id)
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    api.preupload_lfs_files(repo_id, additions, create_pr=how.create_pr, revision=how.revision)

    # From here to the commit it takes moments, and `parent_commit` makes sure that nobody's edit falls between.
    head = api.model_info(repo_id, revision=how.revision)
    remote = {sibling.rfilename for sibling in head.siblings or []}
    if "README.md" in remote:
        existing = api.hf_hub_download(repo_id, "README.md", revision=head.sha)
        card = merge(read_page(Path(existing)), card, update_text=update_card_text)
    return api.create_commit(
        repo_id,
        [
            *additions,
            CommitOperationAdd("README.md", str(card).encode()),
            *(CommitOperationDelete(name) for name in replaced_weights(remote, files)),
        ],
        commit_message=how.commit_message or f"Upload {PIPELINE_CLASS}",
        revision=how.revision,
        create_pr=how.create_pr,
        parent_commit=head.sha,
    )


__all__ = ["PUSHED", "PUSHED_OF_PARTS", "PushOptions", "files_to_push", "push_folder"]

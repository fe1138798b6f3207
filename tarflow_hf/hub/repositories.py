"""What makes a pipeline at home on the Hub: loading by name, and saving with the files a repository needs.

A repository holds weights, configuration, a page, and two small Python files ("shims") that import this package, so
that diffusers and transformers find the classes; there is no second copy of the code.
"""

import inspect
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast, get_type_hints

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo

from tarflow_hf.configuration_tarflow import did_you_mean
from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.flow.sampling.one_pass import check_inverse
from tarflow_hf.hub.adapters import refuse_adapters
from tarflow_hf.hub.arguments import as_dtype, as_source, check_saving
from tarflow_hf.hub.autoencoders import check_autoencoder_files, stored_dtype
from tarflow_hf.hub.checkpoint_files import (
    CONFIG,
    IMAGE_PROCESSOR,
    INDEX,
    INVERSE_CONFIG,
    PIPELINE_CLASS,
    SHIMS,
    VAE_CONFIG,
    Place,
    check_replaceable,
    edit_json,
    pipeline_files,
    replaced_weights,
)
from tarflow_hf.hub.download import DownloadOptions, download
from tarflow_hf.hub.model_card import SAMPLING_DEFAULTS, Page, merge, render
from tarflow_hf.hub.model_files import check_model_files
from tarflow_hf.hub.page_files import read_page
from tarflow_hf.hub.pipeline_index import check_index, check_settings
from tarflow_hf.hub.push import PushOptions, push_folder

logger = logging.getLogger(__name__)

_SHIM = '''"""Finds the classes of this repository in the tarflow_hf package; nothing else is here."""

from transformers import PreTrainedModel  # diffusers looks for this name beside the model's

try:
    from tarflow_hf import {names}
except ModuleNotFoundError as error:
    if error.name != "tarflow_hf":
        raise
    raise ModuleNotFoundError("this model needs the tarflow_hf package: pip install tarflow_hf") from error
'''
_MODEL_CLASS = ["tarflow_hf.modeling_tarflow", "TarFlowModel"]  # published names
_INVERSE_CLASS = ["tarflow_hf.hub.inverse_model", "TarFlowInverseModel"]  # where diffusers finds what it looks for
# What `DiffusionPipeline.from_pretrained` takes beside a pipeline's own arguments; others it leaves out in silence.
_OF_LOADING = frozenset(
    "custom_pipeline custom_revision dduf_file device_map disable_mmap dtype flashpack_kwargs from_flax "
    "load_connected_pipeline low_cpu_mem_usage max_memory mirror offload_folder offload_state_dict "
    "output_loading_info provider provider_options proxies quantization_config resume_download sess_options "
    "torch_dtype trust_remote_code "
    "use_flashpack use_onnx".split()
)
_UNFINISHED = ".saving-"
_OF_MODEL = "TarFlowConfig, TarFlowImageProcessor, TarFlowModel"
_SHIM_NAMES = dict.fromkeys(SHIMS, _OF_MODEL) | {"pipeline.py": "TarFlowPipeline"}


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
        config["transformer"] = _MODEL_CLASS
        if (config.get("inverse") or [None])[0] is not None:
            config["inverse"] = _INVERSE_CLASS
        return loaded

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **kwargs: object,
    ) -> Self:
        """Loads a pipeline from a folder or from the Hub; only safetensors weights are read.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a Hub repository, "user/model".
            variant: Weights to load: None for `model.safetensors`, "fp16" for `model.fp16.safetensors`.
            use_safetensors: True or None; other files of weights can run code and are not read.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` as in
                [`download.DownloadOptions`]; `dtype` (also by name, "bfloat16"), `device_map`, a pipeline default such
                as `guidance_scale`, and the other arguments of `DiffusionPipeline.from_pretrained`.

        Returns:
            The pipeline, its model in evaluation mode.

        Raises:
            OSError: If the folder or repository is missing, private, not a TarFlow pipeline, incomplete or damaged;
                the message says which, and names the file.
            ValueError: If an argument is unknown.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors must be True: other files of weights can run code, got False")
        options, owner = DownloadOptions.taken_from(kwargs), as_source(pretrained_model_name_or_path)
        parts = ("transformer", *cls._optional_components, "default")
        kwargs |= {name: as_dtype(name, kwargs[name], parts) for name in ("dtype", "torch_dtype") if name in kwargs}
        folder = Path(owner)
        if not folder.is_dir():
            folder = download(owner, variant=variant, options=options)
        settings = cls._checked(folder, owner, kwargs)
        if "transformer" not in kwargs:
            check_model_files(folder / "transformer", Place(owner, "transformer/"), variant, finite=False)
        if "inverse" not in kwargs and settings.get("inverse", [None])[0] is not None:
            place = Place(owner, "inverse/")
            check_model_files(folder / "inverse", place, variant, finite=False, kind=TarFlowInverseConfig)
        if "vae" not in kwargs and settings.get("vae", [None, None])[1] is not None:
            entries = check_autoencoder_files(folder / "vae", Place(owner, "vae/"), variant, settings["vae"][1])
            if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:  # each part in the type of its own file
                kwargs.pop("torch_dtype", None)
                kwargs["dtype"] = {"transformer": None, "inverse": None, "vae": stored_dtype(entries)}
        try:
            return super().from_pretrained(str(folder), variant=variant, use_safetensors=True, **kwargs)
        except OSError as error:  # of the model, which knows the folder alone
            raise OSError(str(error).replace(f"{folder}/transformer: ", f"{owner}: transformer/")) from error
        except ValueError as error:
            names = [word for word in re.findall(r"\w+", str(error)) if word in settings or word in kwargs]
            if names and names[0] not in kwargs:
                raise OSError(f"{owner}: {INDEX} is damaged: {error}") from error
            raise

    def to(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401  # as diffusers has it
        """Moves the pipeline's parts to a device, a type of weights or both, as diffusers does.

        Args:
            *args: `torch.device`, its name, or a `torch.dtype`.
            **kwargs: `device`, `dtype` and `silence_dtype_warnings`.

        Raises:
            ValueError: If a type is none that a model computes in.
        """
        for dtype in (*args, *kwargs.values()):
            as_dtype("dtype", dtype if isinstance(dtype, torch.dtype) else None)
        return super().to(*args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:  # noqa: ANN401  # as diffusers has it
        """A pipeline of another one's parts and defaults, as diffusers makes it; autoencoder and inverse are kept.

        Args:
            pipeline: The other one.
            **kwargs: Parts and defaults in place of its own, and `dtype` (float32 if left out).

        Raises:
            ValueError: If that is no pipeline.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"pipeline must be a pipeline of diffusers, got {type(pipeline).__name__}")
        own = {name: pipeline.components.get(name) for name in cls._optional_components}
        return super().from_pipe(pipeline, **({name: part for name, part in own.items() if part is not None} | kwargs))

    @classmethod
    def _checked(cls, folder: Path, owner: str, kwargs: Mapping[str, object]) -> dict[str, Any]:
        """The content of a pipeline's index, after the index and the names of a call's arguments have been checked."""
        settings = check_index(folder, owner)
        hints = get_type_hints(cls.__init__)
        known = {
            name: None if parameter.default is inspect.Parameter.empty else hints[name]
            for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        }
        known |= dict.fromkeys(cls._optional_components)
        check_settings(settings, known, f"{owner}: {INDEX}")
        for name in kwargs.keys() - known.keys() - _OF_LOADING:
            raise ValueError(f"from_pretrained has no argument {name!r}{did_you_mean(name, [*known, *_OF_LOADING])}")
        return settings

    def save_pretrained(  # type: ignore[override]  # without flashpack
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **options: object,
    ) -> None:
        """Saves the pipeline as a folder that can be loaded, or pushed as it is.

        A page (`README.md`) that is already there keeps its text. Nothing of a former pipeline is touched before the
        new one is complete and found sound; what a save that was interrupted has left is removed.

        Args:
            save_directory: The folder; made if missing.
            safe_serialization: Whatever it is, safetensors weights are written, as transformers does; False warns.
            variant: Name for these weights beside the plain ones: "fp16" gives `model.fp16.safetensors`.
            max_shard_size: Bytes, or text like "2GB", above which the weights are split into several files.
            push_to_hub: Whether to upload the folder afterwards.
            **options: For that, `repo_id` (the folder's name) and what [`push.PushOptions`] has.

        Raises:
            ValueError: If `save_directory` is a file, an argument is unknown, or adapters are attached to the model.
            OSError: If the new one could not be loaded again, as when a weight is not finite.
        """
        if not safe_serialization:
            logger.warning(
                "safe_serialization=False: safetensors weights are written all the same, others can run code"
            )
        if options and not push_to_hub:
            raise ValueError(f"save_pretrained has no argument {next(iter(options))!r} without push_to_hub=True")
        repo_id = str(options.pop("repo_id", None) or Path(as_source(save_directory, "save_directory")).name)
        how = PushOptions.of(options)
        refuse_adapters(self.transformer)
        check_inverse(self.inverse, self.transformer)
        with cast(Any, self).weights_in_place():
            self._save(save_directory, variant, max_shard_size)
        if push_to_hub:
            push_folder(save_directory, repo_id, update_card_text=False, **asdict(how))

    def _save(
        self, save_directory: str | os.PathLike[str], variant: str | None, max_shard_size: int | str | None
    ) -> None:
        """Writes the pipeline beside its place, checks it there, and moves it."""
        target = Path(as_source(save_directory, "save_directory")).resolve()
        check_saving(variant, max_shard_size)
        if target.is_file():
            raise ValueError(f"save_directory must be a folder, got the file {target}")
        target.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(target)
        try:
            with tempfile.TemporaryDirectory(dir=target, prefix=f"{_UNFINISHED}{os.getpid()}-") as parent:
                folder = Path(parent, target.name)
                super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
                add_repository_files(folder)
                check_model_files(folder / "transformer", Place(f"not saved to {target}", "transformer/"), variant)
                if self.inverse is not None:
                    place = Place(f"not saved to {target}", "inverse/")
                    check_model_files(folder / "inverse", place, variant, kind=TarFlowInverseConfig)
                if self.vae is not None:
                    check_autoencoder_files(folder / "vae", Place(f"not saved to {target}", "vae/"), variant)
                render(self._page(folder.name)).save(folder / "README.md")
                move_pipeline(folder, target)
        finally:
            if not any(target.iterdir()):
                target.rmdir()

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The defaults that are saved with the checkpoint, by the names of the arguments they stand for."""
        return {name: self.config[name] for name in SAMPLING_DEFAULTS}

    def _page(self, name: str) -> Page:
        """What a page can tell about a pipeline of which nothing else is known."""
        return Page(
            repo_id=f"your-name/{name}",
            config=self.transformer.config,
            num_parameters=self.transformer.num_parameters(),
            defaults=self.sampling_defaults,
            **about_images(self),
        )

    def push_to_hub(  # type: ignore[override]  # adds tag and shards
        self,
        repo_id: str,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **options: object,
    ) -> CommitInfo:
        """Uploads the pipeline to the Hub in one commit: weights, settings, shims and page.

        A page that is already there keeps its text; its metadata are brought up to date. To upload a page of your own
        making, save the pipeline, write `README.md` in its folder and call [`push.push_folder`].

        Args:
            repo_id: "user/model"; made if missing.
            safe_serialization: As in [`save_pretrained`].
            variant: As in [`save_pretrained`].
            max_shard_size: As in [`save_pretrained`].
            **options: `commit_message`, `private`, `token`, `create_pr`, `revision` and `tag`, as in
                [`push.PushOptions`].

        Returns:
            The commit, with the address of the pull request if there is one.
        """
        how = PushOptions.of(options)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, Path(str(repo_id)).name)
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return push_folder(folder, repo_id, update_card_text=False, **asdict(how))


def about_images(pipe: Any) -> dict[str, Any]:  # noqa: ANN401  # a pipeline, which is defined above this room
    """What a page tells of a pipeline's autoencoder with its images, and of its inverse, where there are any."""
    told: dict[str, Any] = {}
    if pipe.vae is not None:
        told["autoencoder"] = f"{type(pipe.vae).__name__}, {pipe.vae.num_parameters():,} parameters"
        told["image"] = (pipe.num_channels, *pipe.image_shape)
    if pipe.inverse is not None:
        largest = pipe.inverse.config.max_guidance_scale
        told["inverse"] = f"{pipe.inverse.num_parameters():,} parameters, guidance_scale from 1 to {largest:g}"
    return told


def add_repository_files(folder: Path) -> None:
    """Makes the saved pipeline in a folder ready for the Hub: shims, and settings that name them."""
    modules: dict[str, Any] = {"_class_name": ["pipeline", PIPELINE_CLASS]}
    modules["transformer"] = ["modeling_tarflow", "TarFlowModel"]
    if not (folder / "vae").is_dir():  # a pipeline of pixels says nothing of an autoencoder
        modules |= {"vae": None, "image_size": None}
    has_inverse = (folder / "inverse").is_dir()
    modules["inverse"] = ["tarflow_hf", "TarFlowInverseModel"] if has_inverse else None
    if has_inverse:  # each variant is loaded in the dtype that its own file has, as below
        edit_json(folder / INVERSE_CONFIG, dtype=None)
    edit_json(folder / INDEX, **modules, _name_or_path=None)  # where it was loaded from, a path of this machine
    if (folder / VAE_CONFIG).is_file():
        edit_json(folder / VAE_CONFIG, _name_or_path=None)
    # Without a dtype in the configuration, each variant is loaded in the dtype that its own file has.
    auto_map = {"AutoConfig": "modeling_tarflow.TarFlowConfig", "AutoModel": "modeling_tarflow.TarFlowModel"}
    edit_json(folder / CONFIG, auto_map=auto_map, dtype=None)
    if (folder / IMAGE_PROCESSOR).is_file():
        edit_json(folder / IMAGE_PROCESSOR, auto_map={"AutoImageProcessor": "modeling_tarflow.TarFlowImageProcessor"})
    for name, names in _SHIM_NAMES.items():
        (folder / name).write_text(_SHIM.format(names=names), encoding="utf-8")


def _remove_unfinished(target: Path) -> None:
    """Removes what saves that were interrupted have left in a folder: those of this process, or of one that ended."""
    for path in target.glob(f"{_UNFINISHED}*"):
        number = path.name.removeprefix(_UNFINISHED).partition("-")[0]
        if not (number.isdecimal() and int(number) != os.getpid() and _is_running(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def move_pipeline(folder: Path, target: Path) -> None:
    """Moves a complete pipeline to its place, over a former one whose page keeps its text."""
    old, new = pipeline_files(target), pipeline_files(folder)
    check_replaceable(target, new)
    if (target / "README.md").is_file():
        existing = read_page(target / "README.md")
        merge(existing, read_page(folder / "README.md"), update_text=False).save(folder / "README.md")
    for name, path in new.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(target / name)
    for name in replaced_weights(old, new):
        old[name].unlink()


__all__ = ["HubPipeline"]

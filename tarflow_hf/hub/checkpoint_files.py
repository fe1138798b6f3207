"""The files of a saved pipeline: their names, how messages call them, and which weights replace which."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tarflow_hf.configuration_tarflow import read_json

INDEX = "model_index.json"
CONFIG = "transformer/config.json"
IMAGE_PROCESSOR = "transformer/preprocessor_config.json"
PIPELINE_CLASS, MODEL_CLASS = "TarFlowPipeline", "TarFlowModel"

SHIMS = ("pipeline.py", "modeling_tarflow.py", "transformer/modeling_tarflow.py")

INVERSE_CONFIG = "inverse/config.json"
VAE_CONFIG = "vae/config.json"
VAE_STEM = "diffusion_pytorch_model"  # as diffusers names weights

_WEIGHTS = re.compile(
    r"(?:(?:transformer|inverse)/model|vae/diffusion_pytorch_model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"(?:\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)


def pipeline_files(folder: Path, parts: Iterable[str] = ("transformer", "vae", "inverse")) -> dict[str, Path]:
    """The files of a folder by their names in a repository: those in it and in its parts' folders, nothing deeper."""
    found = [path for inside in (".", *parts) for path in (folder / inside).glob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError unless files can be written to a folder: a folder stands where none of them goes, or a file.

    Args:
        folder: The folder, which need not be there.
        names: The files, "transformer/config.json".
    """
    for name in names:
        path = folder / name
        if path.is_dir():
            raise ValueError(f"{path} must be a file, or not there, to be written; it is a folder: move it away")
        for parent in (folder / inside for inside in Path(name).parents):
            if (parent.exists() or parent.is_symlink()) and not parent.is_dir():
                raise ValueError(f"{parent} must be a folder, or not there, for {path.name}: move it away")


@dataclass(frozen=True)
class Place:
    """What messages call the files of a folder.

    Args:
        owner: The folder or repository that the user has named, "user/model".
        inside: The folder within it, "transformer/".
    """

    owner: str
    inside: str = ""

    def file(self, name: str) -> str:
        """What a message calls a file: "user/model: transformer/config.json"."""
        return f"{self.owner}: {self.inside}{name}"


def weight_names(variant: str | None, stem: str = "model") -> tuple[str, str, str]:
    """The names of the weights of a variant: whole, in shards, and the index of the shards.

    Args:
        variant: None for the plain weights.
        stem: "model", as transformers has it, or `VAE_STEM`, as diffusers has it.
    """
    model, index = (stem, "index") if variant is None else (f"{stem}.{variant}", f"index.{variant}")
    return f"{model}.safetensors", f"{model}-?????-of-?????.safetensors", f"{stem}.safetensors.{index}.json"


def replaced_weights(old: Iterable[str], new: Iterable[str]) -> list[str]:
    """Those of the old files that hold a variant of the weights that the new files hold under other names."""
    new = set(new)
    variants = weight_variants(new)
    return sorted(name for name in set(old) - new if _variant(name) in variants)


def weight_variants(names: Iterable[str]) -> set[str]:
    """The variants of the weights among files, "" for the plain ones."""
    return {variant for name in names if (variant := _variant(name)) is not None}


def _variant(name: str) -> str | None:
    """The variant of a file of weights, "" for the plain one; None for other files."""
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else match["variant"] or match["index_variant"] or ""


def edit_json(path: Path, **changes: object) -> None:
    """Sets entries of a JSON file; None removes one."""
    content = {**read_json(path, str(path)), **changes}
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = [
    "CONFIG",
    "IMAGE_PROCESSOR",
    "INDEX",
    "INVERSE_CONFIG",
    "MODEL_CLASS",
    "PIPELINE_CLASS",
    "SHIMS",
    "VAE_CONFIG",
    "VAE_STEM",
    "Place",
    "check_replaceable",
    "edit_json",
    "pipeline_files",
    "replaced_weights",
    "weight_names",
    "weight_variants",
]

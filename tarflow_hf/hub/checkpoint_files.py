"""The files of a saved pipeline: what must be there, whether it is whole, and which weights replace which."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CONFIG = "transformer/config.json"
PIPELINE_CLASS = "TarFlowPipeline"

_WEIGHTS = re.compile(
    r"transformer/model(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"(?:\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)


def pipeline_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names in a repository: those in it and in `transformer/`, nothing deeper."""
    found = [path for path in [*folder.glob("*"), *folder.glob("transformer/*")] if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def weight_patterns(variant: str | None) -> list[str]:
    """The names that transformers gives to the weights of a variant: whole, in shards, and the index of the shards."""
    model, index = ("model", "index") if variant is None else (f"model.{variant}", f"index.{variant}")
    return [
        f"transformer/{model}.safetensors",
        f"transformer/{model}-?????-of-?????.safetensors",
        f"transformer/model.safetensors.{index}.json",
    ]


def replaced_weights(old: Iterable[str], new: Iterable[str]) -> list[str]:
    """Those of the old files that hold a variant of the weights that the new files hold under other names."""
    new = set(new)
    variants = {_variant(name) for name in new} - {None}
    return sorted(name for name in set(old) - new if _variant(name) in variants)


def _variant(name: str) -> str | None:
    """The variant of a file of weights, "" for the plain one; None for other files."""
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else match["variant"] or match["index_variant"] or ""


def check_index(folder: Path, name: str) -> None:
    """Raises OSError unless the folder's `model_index.json` is a TarFlow pipeline's; `name` is for the message."""
    if not (folder / INDEX).is_file():
        raise OSError(f"{name} is not a TarFlow pipeline: it has no {INDEX}")
    class_name = read_json(folder / INDEX, f"{name}: {INDEX}").get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name != PIPELINE_CLASS:
        raise OSError(f"{name} is not a TarFlow pipeline: its {INDEX} names {class_name}, not {PIPELINE_CLASS}")


def check_weights(folder: Path, name: str, variant: str | None = None) -> set[str]:
    """Raises OSError, naming the file, unless configuration and weights of a pipeline are there and whole.

    Args:
        folder: The pipeline's folder.
        name: What the message calls it.
        variant: The weights that are wanted.

    Returns:
        The names of the tensors.
    """
    if not (folder / CONFIG).is_file():
        raise OSError(f"{name} is incomplete: it has no {CONFIG}")
    read_json(folder / CONFIG, f"{name}: {CONFIG}")
    whole, _, index = weight_patterns(variant)
    if (folder / whole).is_file():
        return check_safetensors(folder / whole, f"{name}: {whole}")
    if not (folder / index).is_file():
        wanted = "" if variant is None else f" of the variant {variant!r}"
        raise OSError(f"{name} has no weights{wanted}: neither {whole} nor shards of it")
    tensors = set()
    for shard in sorted(set(read_json(folder / index, f"{name}: {index}")["weight_map"].values())):
        if not (folder / "transformer" / shard).is_file():
            raise OSError(f"{name} is incomplete: it has no transformer/{shard}, which {index} lists")
        tensors |= check_safetensors(folder / "transformer" / shard, f"{name}: transformer/{shard}")
    return tensors


def check_safetensors(path: Path, name: str) -> set[str]:
    """Raises OSError unless a file has the size that its header says: 8 bytes of length, the header, the tensors.

    Returns:
        The names of the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < start:
            raise OSError(f"{name} is cut short: it has {size} bytes, its header alone {start}")
        try:
            header = json.loads(file.read(start - 8))
        except ValueError as error:
            raise OSError(f"{name} is damaged, or not a safetensors file: {error}") from error
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    expected = start + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != expected:
        raise OSError(f"{name} is cut short: it has {size} of {expected} bytes")
    return set(tensors)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file, which the message calls `name`.

    Raises:
        OSError: If the file is cut short or holds something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{name} is cut short or not JSON: {error}") from error


def edit_json(path: Path, **changes: object) -> None:
    """Sets entries of a JSON file; None removes one."""
    content = {**read_json(path, str(path)), **changes}
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = [
    "CONFIG",
    "INDEX",
    "PIPELINE_CLASS",
    "check_index",
    "check_safetensors",
    "check_weights",
    "edit_json",
    "pipeline_files",
    "read_json",
    "replaced_weights",
    "weight_patterns",
]

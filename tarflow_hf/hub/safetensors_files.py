"""Safetensors files looked through before anything is built from them: whole, what their header says, finite."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tarflow_hf.configuration_tarflow import parse_json

_LONGEST_HEADER = 4 * 2**20  # bytes: some 30,000 tensors; the library itself would take 100 MB
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor.

    Args:
        dtype: As safetensors names it: "F32", "BF16".
        shape: Its shape.
        num_bytes: What it takes in the file.
        file: What a message calls the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str


def read_header(path: Path, name: str) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Args:
        path: The file: 8 bytes of length, a header in JSON, and the tensors one after the other.
        name: What the message calls it.

    Raises:
        OSError: If the file has not the size that its header says, or the header is not one of safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < start:
            raise OSError(f"{name} is cut short: it has {size} bytes, its header alone {start}")
        if start > _LONGEST_HEADER:
            raise OSError(f"{name} is damaged: its header must be at most {_LONGEST_HEADER} bytes, got {start - 8}")
        header = parse_json(file.read(start - 8), f"{name} is damaged, or not a safetensors file: its header")
    header.pop("__metadata__", None)
    ends = [_end(entry) for entry in header.values()]
    if None not in ends and size < (expected := start + max(filter(None, ends), default=0)):
        raise OSError(f"{name} is cut short: it has {size} of {expected} bytes")
    try:
        with safe_open(path, framework="pt"):  # looks at every entry: dtype, shape, place
            return {
                key: Entry(
                    entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0], name
                )
                for key, entry in header.items()
            }
    except SafetensorError as error:
        raise OSError(f"{name} is damaged, or not a safetensors file: {error}") from error


def _end(entry: Any) -> int | None:  # noqa: ANN401  # whatever stands in a damaged file
    """Where the bytes of a tensor end, None where its entry does not tell."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        return offsets[1]
    return None


def check_finite(path: Path, name: str) -> None:
    """Raises OSError, naming the tensor, if a number in a file is not finite; one tensor at a time is read.

    Args:
        path: A file that [`read_header`] has found sound.
        name: What the message calls it.
    """
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # no mapping
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.element_size() == 1:
                continue
            if not all(bound.isfinite() for bound in tensor.aminmax()):
                wrong = int((~tensor.isfinite()).sum())
                raise OSError(f"{name} is damaged: {wrong} of {tensor.numel()} numbers of {key} are not finite")


def shape_text(shape: torch.Size | tuple[int, ...]) -> str:
    """A shape as messages show it, "64 x 16"."""
    return " x ".join(map(str, shape)) or "one number"


__all__ = ["FLOATS", "Entry", "check_finite", "read_header", "shape_text"]

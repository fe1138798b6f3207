"""The tensors of a .pth file, read without running code, and looked through before anything is made of them."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their keys; the message of an error is to be led in by the path.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else than finite floating point weights by name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    _check_records(path)
    state = _load(path)
    if not isinstance(state, dict):
        raise ValueError(f"the file must hold a dict of tensors, got {type(state).__name__}")
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise ValueError(f"the file must hold a dict of tensors by name, got the key {key!r:.60}")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"the file must hold a dict of tensors, got {type(tensor).__name__} at {key!r:.60}")
        _check(key, tensor)
    return state


def _check_records(path: Path) -> None:
    """Raises ValueError unless the parts of a file of torch.save have their checksums, at which torch never looks.

    Files of torch before 1.6, and what is no such file, have none.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):  # torch says what it is
        return
    if wrong is not None:
        raise ValueError(f"the file is damaged: {wrong} has not the checksum that the file holds for it")


def _load(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # torch doubts that it can read other protocols than its own; where it cannot, it raises. Others deprecate.
            warnings.filterwarnings("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        match = re.search(r"WeightsUnpickler error: (.+?)(?: by default|\n|$)", str(error))
        what = match[1] if match else "its pickle was not written by torch.save"
        raise ValueError(f"the file holds more than tensors and is not loaded: {what}") from error
    except Exception as error:  # whatever torch meets in a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the file is not a complete PyTorch checkpoint: {reason}") from error


def _check(key: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless a tensor is what a weight is; costs one pass over its numbers."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{key} must be a plain tensor, got {tensor.layout} of {tensor.dtype} on {tensor.device}")
    if tensor.dtype not in _FLOATS and not (key.endswith("attn_mask") and tensor.dtype is torch.bool):
        raise ValueError(f"{key} must hold floating point numbers, got {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{key} must hold at least one number, got shape {tuple(tensor.shape)}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        raise ValueError(f"{key} claims shape {tuple(tensor.shape)}, and only {stored} numbers of it are stored")
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        wrong = int((~tensor.isfinite()).sum())
        raise ValueError(f"{key} must be finite: {wrong} of {tensor.numel()} numbers are not")


__all__ = ["read_tensors"]

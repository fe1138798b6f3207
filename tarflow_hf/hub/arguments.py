"""Arguments that pipelines and models are loaded and saved by, checked before a file is looked at."""

import os
import re
from collections.abc import Collection
from typing import Any

import torch

_SIZE = re.compile(r"0*[1-9]\d*(?:\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def as_source(value: object, name: str = "pretrained_model_name_or_path") -> str:
    """The folder, or the repository, that an argument names, as text.

    Args:
        value: What was given.
        name: The argument, for the message.

    Raises:
        ValueError: If it is neither text nor a path.

    Example:
        >>> as_source(None)
        Traceback (most recent call last):
            ...
        ValueError: pretrained_model_name_or_path must be a folder or the name of a Hub repository, got None
    """
    if not value or not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        repository = " or the name of a Hub repository" if name.startswith("pretrained") else ""
        raise ValueError(f"{name} must be a folder{repository}, got {value!r:.80}")
    return str(value)


def as_dtype(argument: str, value: Any, components: Collection[str] = ()) -> Any:  # noqa: ANN401  # whatever was given
    """A type of weights, also by its name; None for "auto", which is what was saved.

    Args:
        argument: Its name, for the message.
        value: What was given: a type, its name, None, or one of these for each component.
        components: Those that may be named.

    Raises:
        ValueError: If it is no floating point type that a model computes in, or one of no component.

    Example:
        >>> as_dtype("dtype", "bfloat16")
        torch.bfloat16
    """
    if isinstance(value, dict):
        if unknown := [name for name in value if name not in components]:
            raise ValueError(f"{argument} must name parts among {sorted(components)}, got {unknown[0]!r}")
        return {name: as_dtype(argument, dtype) for name, dtype in value.items()}
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype not in _DTYPES:
        known = "torch.float32, float64, float16 or bfloat16"
        raise ValueError(f"{argument} must be {known}, the name of one or 'auto', got {value!r:.80}")
    return dtype


def check_saving(variant: object, max_shard_size: object) -> None:
    """Raises ValueError unless weights can be saved as this variant and in shards of this size.

    Args:
        variant: A word that the files' names hold, or None.
        max_shard_size: Bytes, or text like "2GB", or None.

    Example:
        >>> check_saving("fp16", "2GB")
        >>> check_saving("../fp16", None)
        Traceback (most recent call last):
            ...
        ValueError: variant must be a word of letters, digits and underscores, got '../fp16'
    """
    if not (variant is None or (isinstance(variant, str) and re.fullmatch(r"\w+", variant))):
        raise ValueError(f"variant must be a word of letters, digits and underscores, got {variant!r:.80}")
    size = max_shard_size
    if not (size is None or (type(size) is int and size > 0) or (isinstance(size, str) and _SIZE.fullmatch(size))):
        raise ValueError(f"max_shard_size must be a number of bytes above 0, or text like '2GB', got {size!r:.80}")


__all__ = ["as_dtype", "as_source", "check_saving"]

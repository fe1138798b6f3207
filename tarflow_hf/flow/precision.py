"""Which numbers are float32 or wider, whatever the weights are and whatever autocast says: asked for here alone."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The narrowest type that holds these and float32: that of patches, predictions, affine steps and log-densities.

    Args:
        *dtypes: Floating point types, of weights and of inputs.

    Example:
        >>> working_dtype(torch.bfloat16, torch.float16), working_dtype(torch.float32, torch.float64)
        (torch.float32, torch.float64)
    """
    return reduce(torch.promote_types, dtypes, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context that computes in the dtype of its inputs, also where autocast is on around it.

    Args:
        device: Where the inputs live.

    Example:
        >>> numbers = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(numbers.device):
        ...     (numbers @ numbers).dtype
        torch.float32
    """
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def is_autocast(device: torch.device) -> bool:
    """Whether autocast chooses the types of what is computed on a device.

    Args:
        device: The device.

    Example:
        >>> is_autocast(torch.device("cpu"))
        False
    """
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def forget_autocast(device: torch.device) -> None:
    """Drops the weights that autocast has cast and keeps for reuse.

    Those that were cast without gradients would be used by a later pass with gradients, which they block; those cast
    in torch's inference mode could not be used at all.

    Args:
        device: Where the weights live.

    Example:
        >>> forget_autocast(torch.device("cpu"))  # nothing to drop
    """
    if is_autocast(device):
        torch.clear_autocast_cache()


__all__ = ["forget_autocast", "is_autocast", "without_autocast", "working_dtype"]

"""Results that are cheap to make again: autograd keeps how they came about in place of their numbers.

A transformer layer keeps sixteen numbers of each channel for its backward pass. Six of them follow at once from others
that are kept anyway: what its two layer norms give, and its activation. `torch.compile` weighs that by itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tarflow_hf.flow.inputs import is_transformed
from tarflow_hf.flow.precision import is_autocast

_NOTHING = nullcontext()


def remaking(made: torch.Tensor, eps: float | None = None) -> AbstractContextManager[object]:
    """A context in which autograd, asked to keep a GELU or a layer norm, remembers what either was made of.

    The backward pass makes it again by the same operation, so that all numbers are the same to the bit. What was made
    otherwise is kept as usual, and all is where other hooks of saved tensors are at work (checkpoints, offloading) or
    none may be (`torch.func`, `torch.compile`). Such contexts nest.

    Args:
        made: Of any shape; a result of the two operations, or a cast of one.
        eps: Of the layer norm; None: it is kept.

    Example:
        >>> inputs, weight = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
        >>> activated = torch.nn.functional.gelu(inputs)
        >>> with remaking(activated):
        ...     product = torch.nn.functional.linear(activated, weight)
        >>> product.sum().backward()
        >>> torch.equal(weight.grad, activated.sum(0).expand(2, 8))
        True
    """
    if torch.compiler.is_compiling() or made.grad_fn is None or not isinstance(made, torch.Tensor):
        return _NOTHING
    make, address = _maker(made.grad_fn, made.dtype, eps), _address(made)
    hooks: Any = torch._C._autograd
    if make is None or address == 0 or not hooks._saved_tensors_hooks_is_enabled():
        return _NOTHING
    around = hooks._top_saved_tensors_default_hooks(False)
    outer = None if around is None else getattr(around[0], "__self__", None)
    if around is not None and not isinstance(outer, _Remaking):
        return _NOTHING
    return _Remaking(address, make, outer)


def as_read(made: torch.Tensor) -> torch.Tensor:
    """A tensor in the type in which autocast's products read it, so that these keep no copy of their own.

    Args:
        made: Of any shape.

    Example:
        >>> inputs = torch.ones(2, 3, requires_grad=True)
        >>> as_read(inputs) is inputs
        True
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     as_read(inputs).dtype
        torch.bfloat16
    """
    if torch.compiler.is_compiling() or not made.requires_grad or not isinstance(made, torch.Tensor):
        return made
    return made.to(torch.get_autocast_dtype(made.device.type)) if is_autocast(made.device) else made


class _Remaking(saved_tensors_hooks):
    """Packs what lies where a tensor does as how to make it; the context around this one is asked about the others."""

    def __init__(self, address: int, make: Callable[[], torch.Tensor], outer: "_Remaking | None") -> None:
        super().__init__(self.pack, _unpack)
        self.address, self.make, self.outer = address, make, outer

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Remade":
        if _address(tensor) == self.address:
            return _Remade(self.make, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return tensor if self.outer is None else self.outer.pack(tensor)


@dataclass(frozen=True)
class _Remade:
    """A view of a tensor that is made when it is wanted."""

    make: Callable[[], torch.Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(kept: torch.Tensor | _Remade) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    with torch.no_grad():
        return kept.make().as_strided(kept.shape, kept.stride, kept.offset)


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie; 0 for one that has none, or not in one place."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage().data_ptr() if plain and not is_transformed(tensor) else 0


def _maker(node: Any, dtype: torch.dtype, eps: float | None) -> Callable[[], torch.Tensor] | None:  # noqa: ANN401
    """How to make a result again, from the node of autograd's graph that made it; None where it is to be kept."""
    name = node.name()
    if name == "ToCopyBackward0":
        make = _maker(node.next_functions[0][0], dtype, eps)
        return None if make is None else lambda: make().to(dtype)
    if name == "GeluBackward0":
        return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    if name == "NativeLayerNormBackward0" and eps is not None:
        shape = node._saved_normalized_shape
        return lambda: torch.layer_norm(node._saved_input, shape, node._saved_weight, node._saved_bias, eps)
    return None


__all__ = ["as_read", "remaking"]

"""Results that are cheap to make again: what reads them keeps what they were made of for the backward pass.

A transformer layer keeps sixteen numbers of each channel. Six of them follow at once from others that are kept anyway:
what its two layer norms give, and its activation. `torch.compile` weighs that by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

_LEAST = 2**15  # numbers below which a call of Python costs more than memory is worth
_NAME = "_made_of"


@dataclass(frozen=True)
class Origin:
    """How a tensor was made.

    Args:
        function: Makes it of the sources, up to the type of its numbers; holds no tensors.
        sources: What it was made of.
        version: Of the tensor when it was made.

    Example:
        >>> made = Origin(torch.add, (torch.ones(2), torch.ones(2)), version=0)
        >>> made.function(*made.sources)
        tensor([2., 2.])
    """

    function: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]
    version: int


def remember(
    made: torch.Tensor,
    function: Callable[..., torch.Tensor],
    *sources: torch.Tensor,
    copied: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The same tensor, which [`origin`] tells apart where it pays and nothing else has a part in what autograd keeps.

    That is none of small tensors, without gradients, in `torch.compile`, `torch.func`, forward mode or a trace, nor
    where hooks of saved tensors are at work (checkpoints, offloading).

    Args:
        made: function(*sources, *copied), or a cast of it.
        function: See [`Origin`].
        *sources: What autograd keeps anyway.
        copied: Small ones which may be taken away before the backward pass, as sharding does with weights.

    Example:
        >>> inputs = torch.ones(2**15, requires_grad=True)
        >>> activated = remember(torch.nn.functional.gelu(inputs), torch.nn.functional.gelu, inputs)
        >>> origin(activated).sources[0] is inputs, origin(activated + 0) is None
        (True, True)
    """
    if torch.is_grad_enabled() and _may_be_remade(made):
        every = (*sources, *(source.clone() for source in copied))
        setattr(made, _NAME, Origin(function, every, made._version))
    return made


def origin(made: torch.Tensor) -> Origin | None:
    """How a tensor was made, if that is remembered and its numbers are still those.

    Args:
        made: Any tensor.

    Example:
        >>> origin(torch.ones(3)) is None
        True
    """
    found = None if torch.compiler.is_compiling() else getattr(made, _NAME, None)
    return found if isinstance(found, Origin) and found.version == made._version else None


def is_followed() -> bool:
    """Whether `torch.func`, forward mode or a trace follow what is computed now, which have no rules for our products.

    Example:
        >>> is_followed(), torch.func.vmap(lambda number: number + is_followed())(torch.zeros(2))
        (False, tensor([1., 1.]))
    """
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
    )


def _may_be_remade(made: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(made) is torch.Tensor
        and made.requires_grad
        and made.numel() >= _LEAST
        and not is_followed()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


__all__ = ["Origin", "is_followed", "origin", "remember"]

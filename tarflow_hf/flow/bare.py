"""The parts of a flow block without what `nn.Module` does around each call: for loops that call them by the thousand.

A call of a module looks for hooks, and each of its parts and weights is found by a function of Python. Decoding one
token of a small block takes as long in that as in arithmetic.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from tarflow_hf.flow import blocks
from tarflow_hf.flow.offloading import is_hooked
from tarflow_hf.flow.products import PackedLinear, least_inputs, linear

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    blocks.TarFlowAttention,
    blocks.TarFlowBlock,
    blocks.TarFlowLayer,
    blocks.TarFlowLayerNorm,
    blocks.TarFlowMLP,
    blocks.TarFlowProjection,
)


class _Bare:
    """Has a module's attributes, weights and parts as plain attributes, and its `forward` as its call."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        own = vars(self)
        own.update(vars(module))
        own.update(module._parameters)
        own.update(module._buffers)
        for name, part in module._modules.items():
            own[name] = (
                [_stand_in(each, rows) for each in part] if type(part) is nn.ModuleList else _stand_in(part, rows)
            )
        own["module"] = module

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever else the module has
        if name == "module":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.module, name)


class _BareLinear(_Bare):
    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__(module, rows)
        self.least = least_inputs(self.weight)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        product = F.linear if inputs.numel() < self.least else linear
        return product(inputs, self.weight, self.bias)


def _bare_kind(kind: type[nn.Module]) -> type[_Bare]:
    """The class of a stand-in; its call is free of transformers' wrapper that checkpoints activations in training."""
    return type(f"Bare{kind.__name__}", (_Bare,), {"__call__": inspect.unwrap(kind.forward)})


_BARE = {kind: _bare_kind(kind) for kind in _KINDS} | {nn.Linear: _BareLinear}
_CALLS = {kind: (kind.__call__, kind.forward) for kind in _KINDS}  # what a user may have set on a class since


def bare(block: nn.Module, rows: int) -> Any:  # noqa: ANN401  # has the attributes of the block
    """What computes as a block does, without `nn.Module`'s machinery; the block itself where that has a part in it.

    It holds the present weights, so it is made anew for each use. Parts that are no longer this package's (adapters,
    quantised layers) or are compiled are called as they are.

    Args:
        block: A block, or any part of one.
        rows: How many rows (images times tokens) most calls have; where there are many, weights are packed for them.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> inputs = torch.ones(1, 2)
        >>> bool((bare(layer, 1)(inputs) == layer(inputs)).all()), type(bare(layer, 1)).__name__
        (True, '_BareLinear')
        >>> _ = layer.register_forward_hook(lambda module, inputs, output: None)
        >>> bare(layer, 1) is layer
        True
    """
    return block if torch_module._has_any_global_hook() or is_hooked(block) else _stand_in(block, rows)


def _stand_in(module: Any, rows: int) -> Any:  # noqa: ANN401  # a module or None; has the attributes of the module
    kind: Any = type(module)
    if kind not in _BARE or _CALLS[kind] != (kind.__call__, kind.forward) or module._compiled_call_impl is not None:
        return module
    if kind is nn.Linear and PackedLinear.pays(module.weight, module.bias, rows):
        return PackedLinear(module.weight, module.bias, rows)
    return _BARE[kind](module, rows)


__all__ = ["bare"]

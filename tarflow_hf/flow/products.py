"""Linear layers in float32 on a CPU, by the faster of the two libraries for matrix products that PyTorch brings.

PyTorch gives such products to Intel's MKL, which leaves AVX-512 aside on AMD's processors. There oneDNN, which does
not, takes half the time for products that are not small.
"""

import math
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import flop_registry, register_flop_formula

from tarflow_hf.flow.offloading import is_hooked
from tarflow_hf.flow.precision import is_autocast
from tarflow_hf.flow.remaking import Origin, is_followed, origin

_LEAST, _LEAST_PACKED = 2**21, 2**20  # multiplications that pay for a call of oneDNN, some ten microseconds
_KINDS = (torch.Tensor, nn.Parameter)  # others, such as quantised and distributed ones, have products of their own
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts
_CALL = nn.Linear.__call__, nn.Linear.forward  # what a user may have set on the class since


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """inputs @ weight^T + bias, as `torch.nn.functional.linear`, up to rounding.

    Everything that is not plain float32 on a CPU (other types, autocast, subclasses of tensors, `torch.compile`,
    `torch.func`), and small products, are that function's. `torch.backends.mkldnn.flags(enabled=False)` leaves it all
    to it.

    Args:
        inputs: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or None.

    Returns:
        (..., out_features).

    Example:
        >>> linear(torch.ones(2, 3), torch.eye(3), torch.ones(3)).tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    return (_product if _is_taken(inputs, weight, bias) else F.linear)(inputs, weight, bias)


def call_linear(layer: Any, inputs: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # a layer, or what stands for one
    """What a layer makes of its inputs, by [`linear`] where it is PyTorch's own and nobody watches it.

    Inputs whose [`remaking.origin`] is remembered are not kept for the backward pass then, which makes them again.

    Args:
        layer: A linear layer, or whatever took its place, which is called.
        inputs: (..., in_features).

    Example:
        >>> call_linear(torch.nn.Linear(3, 2), torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    if type(layer) is nn.Linear:
        made = origin(inputs)
        if made is not None and _may_remake(inputs, layer.weight, layer.bias) and not _is_watched(layer):
            return _remade_product(made, inputs, layer.weight, layer.bias)
        if _is_taken(inputs, layer.weight, layer.bias) and not _is_watched(layer):
            return _product(inputs, layer.weight, layer.bias)
    output: torch.Tensor = layer(inputs)
    return output


class PackedLinear:
    """A linear layer's present weight, lying as oneDNN reads it fastest: for many products with it, without gradients.

    Args:
        weight: (out_features, in_features), of which [`pays`] says that it may be packed, as its bias.
        bias: (out_features,), or None.
        rows: How many rows the products mostly have.

    Example:
        >>> layer = torch.nn.Linear(256, 256).requires_grad_(False)
        >>> if PackedLinear.pays(layer.weight, layer.bias, 32):
        ...     packed = PackedLinear(layer.weight, layer.bias, 32)
        ...     assert torch.allclose(packed(torch.ones(32, 256)), layer(torch.ones(32, 256)), atol=1e-5)
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _onednn(inputs, self.weight, self.bias)

    @staticmethod
    def pays(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> bool:
        """Whether products with so many rows are faster so, of plain weights that need no gradients.

        Args:
            weight: (out_features, in_features).
            bias: (out_features,), or None.
            rows: How many rows each of the products has.
        """
        return (
            not torch.is_grad_enabled()
            and _is_plain(weight)
            and rows * weight.numel() >= _LEAST_PACKED
            and _fit(weight, bias)
            and _onednn_may()
        )


def _product(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, made: Origin | None = None
) -> torch.Tensor:
    """A product that [`_is_taken`], or of inputs that are made again, with gradients where they are asked for."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (rows, weight, bias)):
        function, sources = (_itself, (rows,)) if made is None else (made.function, made.sources)
        product = _Product.apply(rows, weight, bias, function, *sources)
    else:
        product = _onednn(rows, weight, bias)
    return product.view(*inputs.shape[:-1], weight.shape[0])


def _itself(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _remade_product(
    made: Origin, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A product of inputs that are made again, in the type that autocast, if it is on, computes in."""
    if is_autocast(inputs.device):
        dtype = torch.get_autocast_dtype(inputs.device.type)
        inputs, weight, bias = inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _product(inputs, weight, bias, made)


def _may_remake(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product with inputs whose origin is known is PyTorch's plain one, and gradients want its inputs."""
    parts = (weight,) if bias is None else (weight, bias)
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and inputs.shape[-1] == weight.shape[-1]
        and all(type(part) in _KINDS and part.device == inputs.device for part in parts)
        and all(
            part.dtype in _FLOATS if is_autocast(inputs.device) else part.dtype == inputs.dtype
            for part in (*parts, inputs)
        )
    )


def _onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return output


def _is_taken(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product is large and plain enough; what is wrong with one that does not fit is PyTorch's to say."""
    return (
        not torch.compiler.is_compiling()  # graphs depend on no size then
        and type(inputs) in _KINDS
        and type(weight) in _KINDS
        and inputs.numel() >= least_inputs(weight)
        and _is_plain(inputs)
        and _is_plain(weight)
        and _fit(weight, bias)
        and inputs.shape[-1] == weight.shape[1]
        and _onednn_may()
    )


def least_inputs(weight: torch.Tensor) -> float:
    """How many numbers the inputs of a weight must be at least for their product to be oneDNN's.

    Args:
        weight: (out_features, in_features).

    Example:
        >>> least_inputs(torch.zeros(64, 32))
        32768.0
    """
    return _LEAST / weight.shape[0] if weight.ndim == 2 and weight.numel() else math.inf


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in _KINDS
        and tensor.ndim > 0
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _fit(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the weight is a matrix and the bias, if any, a plain vector for it, which oneDNN reads without gaps."""
    fits = bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1] and bias.is_contiguous())
    return weight.ndim == 2 and fits


def _onednn_may() -> bool:
    return (
        onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and not is_followed()
    )


def _is_watched(layer: nn.Linear) -> bool:
    """Whether hooks, a compiler or a patch have a part in a call of the layer."""
    return bool(
        is_hooked(layer)
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_module._has_any_global_hook()
        or layer._compiled_call_impl is not None
        or (nn.Linear.__call__, nn.Linear.forward) != _CALL
    )


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL here: with AVX-512, on a processor of AMD's.

    Example:
        >>> onednn_is_faster() in (True, False)
        True
    """
    libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    """What the system says of the processor; its maker among it, on Linux and Windows."""
    listed = Path("/proc/cpuinfo")
    return listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else platform.processor()


class _Product(torch.autograd.Function):
    """A product that keeps what its rows are made of; the gradients of those go by the rows."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        function: Callable[..., torch.Tensor],
        *sources: torch.Tensor,
    ) -> torch.Tensor:
        of_rows, of_weight, *_ = ctx.needs_input_grad
        ctx.function = function
        ctx.save_for_backward(weight if of_rows else None, *(sources if of_weight else ()))
        product = _onednn if _is_taken(rows, weight, bias) else F.linear
        return product(rows, weight, bias)  # no view, which could not be written to

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        weight, *sources = ctx.saved_tensors
        of_rows, of_weight, of_bias, *others = ctx.needs_input_grad
        of_the_weight = None
        if of_weight:
            of_the_weight = _transposed_product(gradient, ctx.function(*sources).to(gradient.dtype).flatten(0, -2))
        return (
            linear(gradient, weight.t(), None) if of_rows else None,
            of_the_weight,
            gradient.sum(0) if of_bias else None,
            *[None] * len(others),
        )


def _transposed_product(gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """gradient^T @ rows. A product copies its first factor into order, which is cheaper for the narrower one."""
    if rows.shape[1] < gradient.shape[1]:
        return linear(rows.t(), gradient.t(), None).t()
    return linear(gradient.t(), rows.t(), None)


def _count_operations(inputs: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """What PyTorch's counter of floating-point operations counts for a product."""
    return 2 * math.prod(inputs) * weight[0]


if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_operations)

__all__ = ["PackedLinear", "call_linear", "least_inputs", "linear", "onednn_is_faster"]

"""Linear layers in float32 on a CPU, by the faster of the two libraries for matrix products that PyTorch brings.

PyTorch gives such products to Intel's MKL, which leaves AVX-512 aside on other makers' processors. There oneDNN, which
does not, takes half the time for products that are not small.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

_LEAST, _LEAST_PACKED = 2**21, 2**20  # multiplications that pay for a call of oneDNN, some ten microseconds

_KINDS = (torch.Tensor, nn.Parameter)  # others, such as quantised and distributed ones, have products of their own


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
    if inputs.numel() * weight.shape[0] < _LEAST or not _is_plain(inputs, weight):
        return F.linear(inputs, weight, bias)
    return _product(inputs, weight, bias)


class TarFlowLinear(nn.Linear):
    """A linear layer that computes by [`linear`]; whatever replaces or wraps `nn.Linear` takes it for one.

    Example:
        >>> TarFlowLinear(3, 2)(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(inputs, self.weight, self.bias)


class PackedLinear:
    """A linear layer's present weight, lying as oneDNN reads it fastest: for many products with it, without gradients.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        rows: How many rows the products mostly have.

    Example:
        >>> layer = TarFlowLinear(256, 256).requires_grad_(False)
        >>> if PackedLinear.pays(layer.weight, 32):
        ...     packed = PackedLinear(layer.weight, layer.bias, 32)
        ...     assert torch.allclose(packed(torch.ones(32, 256)), layer(torch.ones(32, 256)), atol=1e-5)
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")

    @staticmethod
    def pays(weight: torch.Tensor, rows: int) -> bool:
        """Whether products with so many rows are oneDNN's, see [`linear`], and need no gradients.

        Args:
            weight: (out_features, in_features).
            rows: How many rows each of the products has.
        """
        return rows * weight.numel() >= _LEAST_PACKED and not torch.is_grad_enabled() and _is_plain(weight, weight)


def _is_plain(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and onednn_is_faster()
        and type(inputs) in _KINDS
        and type(weight) in _KINDS
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._get_tracing_state()
    )


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL here: with AVX-512, on no processor of Intel's.

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


def _product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """inputs @ weight^T + bias, with gradients of every order where they are asked for."""
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (inputs, weight, bias)):
        return _Product.apply(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t(), None) if of_inputs else None,
            _transposed_product(gradient, inputs) if of_weight else None,
            gradient.sum(tuple(range(gradient.ndim - 1))) if of_bias else None,
        )


def _transposed_product(gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """gradient^T @ inputs. A product copies its first factor into order, which is cheaper for the narrower one."""
    gradient, inputs = gradient.reshape(-1, gradient.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    if inputs.shape[1] < gradient.shape[1]:
        return _product(inputs.t(), gradient.t(), None).t()
    return _product(gradient.t(), inputs.t(), None)


__all__ = ["PackedLinear", "TarFlowLinear", "linear", "onednn_is_faster"]

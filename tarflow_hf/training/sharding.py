"""Tensors that FSDP shards over processes: whole ones from parts, and parts of whole ones."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def tensor_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and floating-point buffers by name, as the tensors that the model computes with."""
    state = {name: parameter.data for name, parameter in model.named_parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return state | buffers


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of the model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. All processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """A copy of a nested state with whole tensors on the CPU. All processes call it together.

    Args:
        state: Tensors, numbers and text, nested in dicts and lists; sharded tensors are put together.
        keep: Whether this process wants the result; otherwise its tensors are empty.
    """

    def gather(value: object) -> object:
        if isinstance(value, dict):
            return {name: gather(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [gather(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        whole = whole_tensor(value)
        return whole.detach().to("cpu", copy=True) if keep else torch.empty(0)

    return {name: gather(value) for name, value in state.items()}


def shard_like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor as the part of it that this process holds of `target`. All processes call it together."""
    if isinstance(target, DTensor):
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    return whole


__all__ = ["gather_state", "is_sharded", "shard_like", "tensor_state", "whole_tensor"]

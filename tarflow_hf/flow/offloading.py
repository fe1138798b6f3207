"""Offloading as diffusers does it: weights that come to the device where a module's `forward` is called, and go after.

A flow computes outside of those calls as well: decoding calls blocks one by one and many times each, the score needs
weights until the backward pass. There weights are held.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import cpu_offload
from diffusers.hooks.group_offloading import GroupOffloadingHook, _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

_NOBODY: Any = object()  # leads a group that is held, so that no module's forward moves it


def held(module: nn.Module, *, recurse: bool = True) -> AbstractContextManager[None]:
    """A context in which the weights that diffusers offloads in groups are, and stay, where they are computed with.

    Args:
        module: A model or a block of it.
        recurse: Whether its submodules' weights are held too.

    Example:
        >>> layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> with held(layer):  # nothing is offloaded: nothing to do
        ...     layer(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """
    modules = list(module.modules()) if recurse else [module]
    if torch.compiler.is_compiling() or not any(hasattr(part, "_diffusers_hook") for part in modules):
        return nullcontext()
    return _hold([part._diffusers_hook for part in modules if hasattr(part, "_diffusers_hook")])


@contextmanager
def _hold(registries: list[Any]) -> Iterator[None]:
    hooks = [hook for registry in registries for hook in registry.hooks.values()]
    groups = {id(hook.group): hook.group for hook in hooks if isinstance(hook, GroupOffloadingHook)}
    moved = [group for group in groups.values() if group.onload_leader is not _NOBODY]  # others are held already
    leaders = [(group.onload_leader, group.offload_leader) for group in moved]
    try:
        for group in moved:
            group.onload_()
            group.onload_leader = group.offload_leader = _NOBODY
        for group in moved:
            if group.stream is not None:  # on which weights may still be on their way
                group.stream.synchronize()
        yield
    finally:
        for group, (onload_leader, offload_leader) in zip(moved, leaders, strict=True):
            group.onload_leader, group.offload_leader = onload_leader, offload_leader
            group.offload_()


def bring_in(model: nn.Module) -> None:
    """Moves a model that is offloaded as a whole to where it computes, as a call of it does.

    Args:
        model: A model whose parts are about to be called by themselves.

    Example:
        >>> from tarflow_hf.flow.offloading import bring_in
        >>> bring_in(torch.nn.Linear(2, 2))  # nothing is offloaded: nothing to do
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


def is_hooked(model: nn.Module) -> bool:
    """Whether anything (offloading, sharding, a user's hook) runs around the forward of a part of the model.

    Hooks may bring weights in, and weights made in torch's inference mode could not be trained afterwards.

    Args:
        model: The model.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.register_forward_hook(lambda module, inputs, output: None)
        >>> is_hooked(layer), is_hooked(torch.nn.Linear(2, 2))
        (True, False)
    """
    return any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in model.modules())


class OffloadingPipeline(DiffusionPipeline):
    """A pipeline of which each leaf's weights may be on the device only while it computes, whatever the device is.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> pipe.enable_sequential_cpu_offload(device="cpu")
        >>> pipe.transformer.blocks[0].proj_in.weight.device
        device(type='meta')
    """

    @property
    def _execution_device(self) -> torch.device:
        """Where the models compute, see diffusers, which asks each of their parts several times."""
        models = [component for component in self.components.values() if isinstance(component, nn.Module)]
        parts = (vars(part) for model in models for part in model.modules())
        if any("_diffusers_hook" in part or "_hf_hook" in part for part in parts):
            device: torch.device = super()._execution_device
            return device
        return self.device

    @contextmanager
    def weights_in_place(self) -> Iterator[None]:
        """Takes the hooks of offloading off for as long as weights are read or attached, and puts them on again."""
        device = self._execution_device
        whole, by_leaf, in_groups = [*_func_optionally_disable_offloading(self), False][:3]
        try:
            yield
        finally:
            if whole:
                self.enable_model_cpu_offload(device=device)
            elif by_leaf:
                self.enable_sequential_cpu_offload(device=device)
            elif in_groups:
                for component in self.components.values():
                    if isinstance(component, nn.Module):
                        _maybe_remove_and_reapply_group_offloading(component)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Offloads the weights of each leaf of the model while another one computes, as diffusers does.

        Args:
            gpu_id: Number of the accelerator; None: the first.
            device: Where to compute; None: the accelerator. The CPU may be named to try it out.

        Raises:
            RuntimeError: If there is no accelerator and no device is named.
        """
        if device is None or torch.device(device).type != "cpu":
            super().enable_sequential_cpu_offload(gpu_id, cast(str, device))  # typed as if None were none
            return
        self.remove_all_hooks()  # diffusers names the CPU "cpu:0", of which torch makes copies that are no parameters
        for component in self.components.values():
            if isinstance(component, nn.Module):
                cpu_offload(component, torch.device("cpu"))


__all__ = ["OffloadingPipeline", "held", "is_hooked"]

"""How much memory sampling may use for what grows with the number of images."""

import torch

from .configuration_tarflow import TarFlowConfig

_CPU_BYTES = 2 * 2**30


def working_bytes(device: torch.device) -> int:
    """Bytes that keys and values, or activations under gradients, may take at once.

    Half of what is free on a GPU; 2 GiB elsewhere.

    Args:
        device: Where the work runs.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 2
    return _CPU_BYTES


def denoising_chunk_size(config: TarFlowConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Images whose activations under gradients fit into the memory set aside for denoising."""
    per_layer = config.num_tokens * config.hidden_size * (12 + 2 * config.mlp_ratio)
    bytes_per_image = per_layer * sum(config.block_depths) * dtype.itemsize
    return max(1, working_bytes(device) // bytes_per_image)


__all__ = ["denoising_chunk_size", "working_bytes"]

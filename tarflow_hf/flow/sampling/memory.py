"""How much memory sampling may use for what grows with the number of images."""

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig

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


def decoding_max_batch(config: TarFlowConfig, branches: int, dtype: torch.dtype, device: torch.device) -> int:
    """Images whose keys and values of one block fit into the memory that decoding may use.

    Args:
        config: Sizes of the model.
        branches: 2 under guidance, else 1.
        dtype: Type of the weights.
        device: Where the model runs.
    """
    numbers = 2 * max(config.block_depths) * branches * config.num_tokens * config.hidden_size
    return max(1, working_bytes(device) // (numbers * dtype.itemsize))


def denoising_chunk_size(
    config: TarFlowConfig, dtype: torch.dtype, device: torch.device, *, recompute: bool = False
) -> int:
    """Images whose activations under gradients fit into the memory set aside for denoising.

    Args:
        config: Sizes of the model.
        dtype: Type of its weights.
        device: Where it runs.
        recompute: Whether only one block's activations live at a time.
    """
    per_layer = config.num_tokens * config.hidden_size * (12 + 2 * config.mlp_ratio)
    layers = max(config.block_depths) if recompute else sum(config.block_depths)
    bytes_per_image = per_layer * layers * dtype.itemsize
    return max(1, working_bytes(device) // bytes_per_image)


__all__ = ["decoding_max_batch", "denoising_chunk_size", "working_bytes"]

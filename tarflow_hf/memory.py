"""How much memory sampling may use for what grows with the number of images."""

import torch

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


__all__ = ["working_bytes"]

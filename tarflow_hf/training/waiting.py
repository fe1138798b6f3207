"""Processes that wait for each other however long that takes."""

from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator


def wait_for_all(accelerator: Accelerator) -> None:
    """Waits until every process has come here.

    Args:
        accelerator: The processes.

    Example:
        >>> from accelerate import Accelerator
        >>> wait_for_all(Accelerator(cpu=True))
    """
    if accelerator.num_processes > 1:
        dist.barrier(patient_group())


def patient_group() -> dist.ProcessGroup:
    """A group of all processes for waiting alone; the training's own has a shorter time to do so. All call it.

    Example:
        >>> patient_group.__annotations__["return"].__name__
        'ProcessGroup'
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


__all__ = ["patient_group", "wait_for_all"]

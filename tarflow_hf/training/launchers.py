"""The processes and devices of a run, as a launcher made them."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from tarflow_hf.training.arguments import OptimizationArguments


def make_accelerator(settings: OptimizationArguments, *, trackers: Sequence[str], folder: Path) -> Accelerator:
    """The processes and devices of this run, as `accelerate launch`, torchrun or a plain start made them.

    Args:
        settings: The options of the optimisation.
        trackers: Names of the experiment trackers.
        folder: Where trackers may write.

    Raises:
        ValueError: If a tracker is not installed.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> settings = OptimizationArguments(batch_size=4, max_steps=10, learning_rate=1e-2)
        >>> accelerator = make_accelerator(settings, trackers=[], folder=Path("runs"))
        >>> accelerator.num_processes, accelerator.is_main_process
        (1, True)
    """
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise ValueError(f"report_to names trackers that are not installed: pip install {' '.join(missing)}")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # said aloud, or several processes would not find each other
        mixed_precision="no",  # the training step casts by itself, so that evaluation and sampling stay in float32
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


__all__ = ["make_accelerator"]

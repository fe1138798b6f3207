"""A state that several processes wrote in shards, put together as one file."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

WHOLE = "state.pt"
METADATA = ".metadata"
"""What `torch.distributed.checkpoint` writes last: its presence tells a folder of shards."""
_TOGETHER = ".together.pt"


def map_state(checkpoint: Path) -> dict[str, Any]:
    """The state in a checkpoint's folder, on the CPU, mapped from a file: what is not used is not read.

    Shards are put together by the first process that asks, into a file beside them that goes with the checkpoint;
    every other process maps it.

    Args:
        checkpoint: The folder.
    """
    file = checkpoint / WHOLE
    if not file.exists() and (checkpoint / METADATA).exists():
        file = checkpoint / _TOGETHER
        if not file.exists():
            unfinished = checkpoint / f"{_TOGETHER}.{os.getpid()}"
            dcp_to_torch_save(checkpoint, unfinished)
            os.replace(unfinished, file)
        return _restored(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _restored(state: dict[str, Any]) -> dict[str, Any]:
    """Keys that are numbers come back as text, and empty parts not at all."""
    optimizer = state["optimizer"]
    moments = {int(index): entry for index, entry in optimizer.get("state", {}).items()}
    return {"posthoc": {}, **state, "optimizer": {**optimizer, "state": moments}}


__all__ = ["METADATA", "WHOLE", "map_state"]

"""The most memory that a piece of code uses for tensors, counted operation by operation."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and the most that live at one time.

    For the CPU, where torch keeps no count; on a GPU `torch.cuda.max_memory_allocated` tells.

    Example:
        >>> with PeakMemory() as memory:
        ...     for _ in range(3):
        ...         total = torch.zeros(1000, 250).sum()
        >>> 1_000_000 <= memory.peak < 1_100_000
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_mkldnn:  # which shows no storage
                self.count(tensor, id(tensor), tensor.numel() * tensor.element_size())
            elif isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.count(storage, storage.data_ptr(), storage.nbytes())
        return result

    def count(self, owner: object, address: int, size: int) -> None:
        """Adds a piece of memory, once for each address, until its owner is freed."""
        if address in self.known or size == 0:
            return
        self.known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(owner, self.release, address, size)

    def release(self, address: int, size: int) -> None:
        """Takes a freed piece off."""
        self.known.discard(address)
        self.live -= size


__all__ = ["PeakMemory"]

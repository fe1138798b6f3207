"""Which images make a batch, and which of them a process reads.

The order of a stored data set depends on the seed, the epoch and the batch size alone: not on the number of processes
or workers, and not on where a run was interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

ORDER_STREAM = 0  # tells the random numbers of the order from those of the augmentation


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is divided over micro-batches, one after the other, and processes, side by side.

    Args:
        batch_size: Images of an optimizer step.
        micro_batches: Gradient accumulation steps.
        process_index: This process.
        num_processes: All processes.

    Raises:
        ValueError: If the batch cannot be divided evenly.

    Example:
        >>> layout = BatchLayout(batch_size=64, micro_batches=2, process_index=1, num_processes=4)
        >>> layout.micro_batch_size, layout.positions(0), layout.positions(1)
        (8, slice(8, 16, None), slice(40, 48, None))
        >>> BatchLayout(batch_size=10, num_processes=4)
        Traceback (most recent call last):
            ...
        ValueError: batch_size=10 must be a multiple of gradient_accumulation_steps=1 times the number of processes, 4
    """

    batch_size: int
    micro_batches: int = 1
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batches * self.num_processes):
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of gradient_accumulation_steps="
                f"{self.micro_batches} times the number of processes, {self.num_processes}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images that one process reads at once."""
        return self.batch_size // (self.micro_batches * self.num_processes)

    def positions(self, micro_batch: int) -> slice:
        """Where in the batch the images of this process are."""
        start = (micro_batch * self.num_processes + self.process_index) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def check_batch_size(batch_size: int, num_images: int) -> None:
    """Raises ValueError if a batch is larger than the data set.

    Args:
        batch_size: Images of a step.
        num_images: Rows of the data set.

    Example:
        >>> check_batch_size(4, num_images=10)
    """
    if num_images < batch_size:
        raise ValueError(f"batch_size={batch_size} must not be larger than the data set of {num_images} images")


class StepSampler(Sampler[list[int]]):
    """The rows of this process, micro-batch by micro-batch, over all steps of a run.

    Step s reads rows perm_e[b B ... b B + B - 1] with e, b = divmod(s, steps per epoch), B the batch size over all
    processes and perm_e a permutation drawn from (seed, e). An incomplete last batch of an epoch is left out; which
    rows that leaves out differs from epoch to epoch.

    Args:
        num_images: Rows of the data set.
        batch_size: B.
        layout: Which part of the batch this process reads.
        seed: Of the permutations.
        steps: The steps to read for.

    Raises:
        ValueError: If the data set is smaller than a batch.

    Example:
        >>> layout = BatchLayout(batch_size=4)
        >>> whole = list(StepSampler(num_images=10, batch_size=4, layout=layout, seed=0, steps=range(5)))
        >>> len(whole), len(whole[0])
        (5, 4)
        >>> list(StepSampler(10, 4, layout, seed=0, steps=range(3, 5))) == whole[3:]  # taken up again at step 3
        True
    """

    def __init__(self, num_images: int, batch_size: int, layout: BatchLayout, seed: int, steps: range) -> None:
        check_batch_size(batch_size, num_images)
        self.num_images = num_images
        self.batch_size = batch_size
        self.layout = layout
        self.seed = seed
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps) * self.layout.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            step_epoch, batch = divmod(step, self.num_images // self.batch_size)
            if step_epoch != epoch:
                epoch = step_epoch
                order = np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(self.num_images)
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            for micro_batch in range(self.layout.micro_batches):
                yield rows[self.layout.positions(micro_batch)].tolist()


__all__ = ["BatchLayout", "StepSampler", "check_batch_size"]

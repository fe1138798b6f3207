"""Arrays computed batch by batch over any number of processes, each batch kept in a file of its own.

Work can stop at any moment and go on later, and the result does not depend on the number of processes: a batch holds
the same items whoever computes it, and each item is in exactly one batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from tarflow_hf.metrics.atomic import replacing

Arrays = dict[str, np.ndarray]


def bar_disabled(state: PartialState) -> bool | None:
    """Whether a process shows no progress bar; None, to tqdm: the main process shows one on a terminal only.

    Example:
        >>> from accelerate import PartialState
        >>> bar_disabled(PartialState(cpu=True)) is None
        True
    """
    return None if state.is_main_process else True


@dataclass(frozen=True)
class BatchFiles:
    """The batches of `num_items` items in `folder`, `batch_size` items each, the last one what remains.

    Processes must share the folder: with several machines it lies on a shared file system.
    """

    folder: Path
    num_items: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.num_items < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_items and batch_size must be at least 1, got {self.num_items} and {self.batch_size}"
            )

    @classmethod
    def open(cls, root: Path, num_items: int, batch_size: int, settings: Mapping[str, Any]) -> "BatchFiles":
        """The folder of work with these settings, made or taken up again: `root/<hash of the settings>`.

        Args:
            root: Folder of the folders.
            num_items: Items in all; may differ from what it was, computed batches are kept.
            batch_size: Items of a batch; part of the settings.
            settings: Whatever decides the values, as JSON; kept as `settings.json` for people to read.
        """
        text = json.dumps({**settings, "batch_size": batch_size}, indent=2, sort_keys=True)
        files = cls(root / hashlib.sha256(text.encode()).hexdigest()[:16], num_items, batch_size)
        files.folder.mkdir(parents=True, exist_ok=True)
        with replacing(files.folder / "settings.json") as partial:
            partial.write_text(text + "\n")
        return files

    @property
    def batches(self) -> list[range]:
        """The items of each batch."""
        starts = range(0, self.num_items, self.batch_size)
        return [range(start, min(start + self.batch_size, self.num_items)) for start in starts]

    def path(self, batch: range) -> Path:
        """The file of a batch."""
        return self.folder / f"{batch.start:09d}-{batch.stop:09d}.npz"

    def run(self, compute: Callable[[range], Arrays], state: PartialState, description: str) -> None:
        """Computes the batches of this process that are not there yet, and waits for the other processes.

        Args:
            compute: Gives the arrays of a batch, each with one row an item.
            state: The processes that share the work.
            description: What the progress bar says.
        """
        mine = self.batches[state.process_index :: state.num_processes]
        total = sum(map(len, mine))
        with tqdm(total=total, desc=description, unit="image", disable=bar_disabled(state)) as progress:
            for batch in mine:
                if not self.path(batch).exists():
                    self._write(batch, compute(batch))
                progress.update(len(batch))
        state.wait_for_everyone()

    def read(self, batch: range) -> Arrays:
        """The arrays of a computed batch."""
        with np.load(self.path(batch), allow_pickle=False) as file:
            return dict(file)

    def __iter__(self) -> Iterator[Arrays]:
        """The arrays of every batch in the order of the items, read one at a time."""
        return map(self.read, self.batches)

    def gather(self) -> Arrays:
        """The arrays of all items together; for small arrays."""
        parts = list(self)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _write(self, batch: range, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if len(array) != len(batch):
                raise ValueError(f"{name} must have {len(batch)} rows for the items {batch}, got {len(array)}")
        with replacing(self.path(batch)) as partial:
            np.savez(partial, **arrays)  # type: ignore[arg-type]  # the stubs take every keyword for an option


__all__ = ["Arrays", "BatchFiles", "bar_disabled"]

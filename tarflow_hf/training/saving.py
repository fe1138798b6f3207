"""How checkpoints are written: whole or in shards, at once or while the training goes on."""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint.state_dict_saver import async_save

from tarflow_hf.training.checkpoints import CheckpointError, prepare_checkpoint

CheckpointFormat = Literal["whole", "sharded"]
_ONE_PROCESS = "torch.distributed is disabled"  # how the library greets a run of one process


class Saver:
    """Writes one checkpoint at a time, for all processes of a run.

    Whole checkpoints are gathered and written by the main process. Of sharded ones each process writes what it holds,
    by `torch.distributed.checkpoint`. In the background, a copy of the state is made at once and written by a thread;
    either way a checkpoint gets its name when everything is on the disk.

    Args:
        accelerator: The processes.
        sharded: Whether each process writes its own part.
        background: Whether the training goes on meanwhile.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> from tarflow_hf.training.checkpoints import write_checkpoint
        >>> saver = Saver(Accelerator(cpu=True), sharded=False, background=True)
        >>> def complete(written):
        ...     return write_checkpoint(Path("checkpoints"), 10, written, {"seed": 0}, keep=2)
        >>> saver.start(Path("checkpoints"), 10, {"weight": torch.ones(2)}, complete)
        >>> saver.wait()
        >>> Path("checkpoints/step-00000010/state.pt").exists()
        True
    """

    def __init__(self, accelerator: Accelerator, *, sharded: bool, background: bool) -> None:
        self.accelerator = accelerator
        self.sharded = sharded
        self.background = background
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[object] | None = None
        # Its own group: what the saving thread says to the other processes must not mix with the training's.
        self._group = dist.new_group(backend="gloo") if sharded and accelerator.num_processes > 1 else None
        if sharded:
            warnings.filterwarnings("ignore", message=_ONE_PROCESS, category=UserWarning)

    def start(self, folder: Path, step: int, state: dict[str, Any], complete: Callable[[Any], object]) -> None:
        """Begins to write a state. All processes call it together, after [`wait`].

        Args:
            folder: Folder of the run's checkpoints.
            step: Optimizer steps taken.
            state: Whole tensors on the CPU of the main process, or, if sharded, what each process holds.
            complete: Called by the main process with the state, or with a function that waits until the shards are
                written, to make a checkpoint of it: [`write_checkpoint`].
        """
        main = self.accelerator.is_main_process
        if self.sharded:
            written = self._start_shards(folder, step, state)
            self._pending = self._executor.submit(complete, written) if main else self._executor.submit(written)
        elif main:
            self._pending = self._executor.submit(complete, state)
        if not self.background:
            self.wait()

    def _start_shards(self, folder: Path, step: int, state: dict[str, Any]) -> Callable[[], None]:
        if self.accelerator.is_main_process:
            prepare_checkpoint(folder, step)
        self.accelerator.wait_for_everyone()
        place = prepare_checkpoint(folder, step, clean=False)
        future = cast(
            "Future[object]",
            async_save(state, checkpoint_id=place, process_group=self._group, no_dist=self._group is None),
        )

        def written() -> None:
            try:
                future.result()
            except dcp.api.CheckpointException as error:  # not an Exception to torch
                reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
                raise CheckpointError(f"the shards cannot be written: {reasons}") from None

        return written

    def wait(self) -> None:
        """Waits until the checkpoint that was begun is complete. All processes call it together.

        Raises:
            CheckpointError: If some process could not write it.
        """
        pending, self._pending = self._pending, None
        errors: list[str] = []
        if pending is not None and (error := pending.exception()) is not None:
            errors.append(str(error))
        errors = gather_object(errors)
        if errors:
            raise CheckpointError(errors[0])

    def close(self) -> None:
        """Lets what was begun be finished; each process by itself."""
        self._executor.shutdown()


__all__ = ["CheckpointFormat", "Saver"]

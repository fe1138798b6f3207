"""The checkpoints of one run: what is written, what is kept, what is gone on from and gone back to."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.checkpoints import (
    CheckpointError,
    all_checkpoints,
    complete_checkpoints,
    read_state,
    remove_checkpoints_after,
    step_of,
    write_checkpoint,
)
from tarflow_hf.training.inspection import check_state
from tarflow_hf.training.progress import Progress
from tarflow_hf.training.resume import Resumable, newest_sound
from tarflow_hf.training.saving import Saver
from tarflow_hf.training.sharding import tensor_state
from tarflow_hf.training.trainer import Trainer


class RunCheckpoints:
    """The folder of checkpoints of a run, for all its processes: the main one reads, decides and writes.

    A checkpoint is proven sound by the next step: its loss is the first that the saved weights give. The newest one
    that is proven is never removed, so that a run that diverges has where to go back to.

    Args:
        folder: The folder.
        trainer: The state of the run.
        arguments: All options.
        configuration: Those that decide the result, and what else must agree.
        content: Fingerprint of the training data.

    Example:
        >>> from tarflow_hf.training.progress import Progress
        >>> proven([4, 8, 12], Progress(step=14, bad_steps=3))  # the weights of step 8 gave a good step 9
        8
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        arguments: TrainingArguments,
        configuration: dict[str, Any],
        content: str | None,
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.accelerator: Accelerator = trainer.accelerator
        self.arguments = arguments
        self.configuration = configuration
        self.content = content
        self.saved_step: int | None = None
        output = arguments.output
        self.saver = Saver(
            trainer.accelerator, sharded=output.checkpoint_format == "sharded", background=output.async_checkpoints
        )

    def resume(self) -> dict[str, list[Any]]:
        """Goes on from the newest sound checkpoint, if there is one; the options that changed since."""
        found = self._load(lambda: self._newest())
        changes: dict[str, list[Any]] = found["changes"]
        if changes:  # what is changed may be what made the run go wrong
            self.trainer.progress.bad_steps = self.trainer.progress.rollbacks = 0
        return changes

    def go_back(self) -> int | None:
        """Goes back to the newest checkpoint that is proven sound, without what came after it; its step.

        None if there is none. All processes call it together.
        """
        self.saver.wait()
        progress = self.trainer.progress

        def find() -> Resumable | None:
            steps = [step_of(path) for path in complete_checkpoints(self.folder)]
            last = proven(steps, progress)
            return None if last is None else self._newest(last)

        found = self._load(find)
        if found["path"] is None:
            return None
        if self.accelerator.is_main_process:
            remove_checkpoints_after(self.folder, self.trainer.progress.step)
        self.accelerator.wait_for_everyone()
        return self.trainer.progress.step

    def save(self, *, best: Collection[int] = ()) -> None:
        """Writes the state as it is now, or begins to. All processes call it together.

        Args:
            best: Steps of the lowest validation bits, whose checkpoints are kept.
        """
        self.saver.wait()
        state, step = self.trainer.state(whole=not self.saver.sharded), self.trainer.progress.step
        complete = partial(
            write_checkpoint,
            self.folder,
            step,
            configuration=self.configuration,
            keep=self.arguments.output.keep_checkpoints,
            protected=self._protected(best),
            options=self.arguments.published(self.folder.parent),
            content=self.content,
        )
        self.saver.start(self.folder, step, state, complete)
        self.saved_step = step

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. All processes call it together."""
        self.saver.wait()

    def close(self) -> None:
        """Lets a checkpoint that is being written be finished, whatever became of the run."""
        self.saver.close()

    def _protected(self, best: Collection[int]) -> set[int]:
        every, steps = self.arguments.output.keep_every, [step_of(path) for path in all_checkpoints(self.folder)]
        kept = {step for step in steps if every is not None and step % every == 0} | set(best)
        sound = proven(steps, self.trainer.progress)
        return kept if sound is None else kept | {sound}

    def _newest(self, last_step: int | None = None) -> Resumable | None:
        return newest_sound(
            self.folder,
            self.arguments,
            self.configuration,
            content=self.content,
            check=self._check,
            last_step=last_step,
        )

    def _check(self, state: dict[str, Any], step: int) -> None:
        parameters = [parameter for group in self.trainer.optimizer.param_groups for parameter in group["params"]]
        check_state(state, model=tensor_state(self.trainer.model), parameters=parameters, step=step)

    def _load(self, find: Callable[[], Resumable | None]) -> dict[str, Any]:
        """Loads what the main process finds in every process; what it found, or the error it met."""
        found: Resumable | None = None
        told: dict[str, Any] = {"path": None, "changes": {}, "error": None}
        if self.accelerator.is_main_process:
            try:
                found = find()
            except CheckpointError as error:
                told["error"] = str(error)
            if found is not None:
                told |= {"path": found.path, "changes": found.changes}
        (told,) = broadcast_object_list([told])
        if told["error"] is not None:
            raise CheckpointError(told["error"])
        if told["path"] is not None:
            self.trainer.load_state(read_state(told["path"]) if found is None else found.state)
            self.saved_step = self.trainer.progress.step
        return told


def proven(steps: Collection[int], progress: Progress) -> int | None:
    """The newest of these steps whose weights gave a good step afterwards; without one, the newest before the bad.

    Args:
        steps: Steps of checkpoints.
        progress: How far the run is, and how many of its last steps were bad.

    Example:
        >>> from tarflow_hf.training.progress import Progress
        >>> proven([4], Progress(step=20, bad_steps=16)), proven([8], Progress(step=20, bad_steps=16)) is None
        (4, True)
    """
    last_good = progress.step - progress.bad_steps
    before = [step for step in steps if step <= last_good]
    return max((step for step in before if step < last_good), default=max(before, default=None))


__all__ = ["RunCheckpoints", "proven"]

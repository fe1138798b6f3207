"""What a training run reports: metrics.jsonl, a progress bar and experiment trackers."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


class MetricsFile:
    """One JSON object a line, each with the `step` after which it was written.

    Holds only what the run computes, no times: an interrupted and resumed run ends with the very same bytes.

    Args:
        path: The file; it is appended to.

    Example:
        >>> from pathlib import Path
        >>> metrics = MetricsFile(Path("metrics.jsonl"))
        >>> for step, loss in ((10, 0.9), (20, 0.7), (30, 0.6)):
        ...     metrics.append({"step": step, "loss": loss})
        >>> metrics.rewind(20)  # a run goes on from its checkpoint of step 20
        >>> metrics.curve("loss")
        ([10, 20], [0.9, 0.7])
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Removes what was written after the checkpoint of a step, and a line that a kill cut short.

        The checkpoint comes after the line with the losses up to its step, and before an evaluation at that step.
        """
        kept = [row for row in self.rows() if row["step"] < step or (row["step"] == step and "loss" in row)]
        lines = [json.dumps(row) + "\n" for row in kept]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")
        temporary.write_text("".join(lines))
        os.replace(temporary, self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a line; it survives a kill or a crash from now on."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        rows = [row for row in self.rows() if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def start_trackers(accelerator: Accelerator, options: Mapping[str, Any], *, run_name: str) -> None:
    """Starts the experiment trackers of an accelerator and tells them the options of the run.

    Args:
        accelerator: The processes; the main one talks to the trackers.
        options: Options by name; what is no number, switch or text is told as text.
        run_name: What wandb and trackio call the run.

    Example:
        >>> from accelerate import Accelerator
        >>> start_trackers(Accelerator(cpu=True), {"learning_rate": 1e-4}, run_name="digits")  # nothing to start
    """
    config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
    names = {tracker: {"name": run_name} for tracker in ("wandb", "trackio")}
    accelerator.init_trackers("tarflow", config=config, init_kwargs=names)


class TrainingLog:
    """Progress bar, metrics.jsonl and trackers of a run; only the main process writes.

    Args:
        accelerator: The processes and the trackers.
        path: The metrics file.
        total_steps: Planned length of the training.
        batch_size: Images of a step.
        start: Steps already taken.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> accelerator, path = Accelerator(cpu=True), Path("metrics.jsonl")
        >>> with TrainingLog(accelerator, path, total_steps=20, batch_size=64, start=0) as log:
        ...     log.advance(10)
        ...     log.write(10, {"loss": 0.9})
        >>> log.metrics.rows()
        [{'step': 10, 'loss': 0.9}]
    """

    def __init__(self, accelerator: Accelerator, path: Path, *, total_steps: int, batch_size: int, start: int) -> None:
        self.accelerator = accelerator
        self.metrics = MetricsFile(path)
        if accelerator.is_main_process:
            self.metrics.rewind(start)
        self.batch_size = batch_size
        self.bar = tqdm(
            total=total_steps,
            initial=start,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self.shown: dict[str, str] = {}
        self.window_start, self.window_step = time.perf_counter(), start

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar on."""
        self.bar.update(step - self.bar.n)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes a line of metrics, shows it in the bar and sends it to the trackers.

        Args:
            step: Optimizer steps taken.
            values: Metrics by name.
        """
        if not self.accelerator.is_main_process:
            return
        self.metrics.append({"step": step, **values})
        self.accelerator.log(dict(values), step=step)
        self.show({name: f"{value:.4g}" for name, value in values.items()})

    def speed(self, step: int) -> None:
        """Shows and sends to the trackers the images per second since the last call."""
        now = time.perf_counter()
        rate = (step - self.window_step) * self.batch_size / max(now - self.window_start, 1e-9)
        self.window_start, self.window_step = now, step
        self.accelerator.log({"images_per_second": rate}, step=step)
        self.show({"images/s": f"{rate:.4g}"})

    def pause(self, step: int) -> None:
        """Leaves the time since the last call of `speed` out, after an evaluation or a checkpoint."""
        self.window_start, self.window_step = time.perf_counter(), step

    def show(self, texts: Mapping[str, str]) -> None:
        """Shows values in the bar next to those already there."""
        names = {"bits_per_dim": "bits/dim", "validation_bits_per_dim": "val bits/dim", "learning_rate": "lr"}
        hidden = ("epoch", "grad_norm")
        self.shown |= {names.get(name, name): text for name, text in texts.items() if name not in hidden}
        bad = ("skipped_steps", "skipped_images")
        self.bar.set_postfix({name: text for name, text in self.shown.items() if name not in bad or text != "0"})

    def say(self, text: Iterable[str] | str) -> None:
        """Prints a line above the bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text if isinstance(text, str) else "\n".join(text))


__all__ = ["MetricsFile", "TrainingLog", "start_trackers"]

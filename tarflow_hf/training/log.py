"""What a training run reports: metrics.jsonl, timing.jsonl, lines or a progress bar, and experiment trackers."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from tarflow_hf.training.json_lines import read_rows
from tarflow_hf.training.speed import Stopwatch


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
        1
        >>> metrics.curve("loss")
        ([10, 20], [0.9, 0.7])
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> int:
        """Removes what was written after the checkpoint of a step, and a line that a kill cut short.

        The checkpoint comes after the line with the losses up to its step, and before an evaluation at that step.

        Returns:
            How many lines were removed.
        """
        rows = self.rows()
        kept = [
            row
            for row in rows
            if row["step"] < step or (row["step"] == step and not any(name.startswith("validation_") for name in row))
        ]
        lines = [json.dumps(row) + "\n" for row in kept]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")
        temporary.write_text("".join(lines))
        os.replace(temporary, self.path)
        return len(rows) - len(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a line; it survives a kill or a crash from now on."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines."""
        return read_rows(self.path)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        rows = [row for row in self.rows() if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


class TrainingLog:
    """What a person sees of a run, metrics.jsonl, timing.jsonl and trackers; only the main process writes.

    On a terminal there is a progress bar; anywhere else, such as in the log file of a job, a plain line for each line
    of metrics. What a clock tells is in timing.jsonl, as metrics.jsonl has the same bytes after an interruption.

    Args:
        accelerator: The processes and the trackers.
        path: The metrics file.
        total_steps: Planned length of the training.
        batch_size: Images of a step.
        start: Steps already taken.
        most_images_per_second: As in [`Stopwatch`].

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

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        *,
        total_steps: int,
        batch_size: int,
        start: int,
        most_images_per_second: float | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.metrics = MetricsFile(path)
        self.timing = MetricsFile(path.with_name("timing.jsonl"))
        self.removed_lines = 0
        if accelerator.is_main_process:
            self.removed_lines = self.metrics.rewind(start)
            self.timing.rewind(start)
        self.watch = Stopwatch(
            batch_size=batch_size,
            total_steps=total_steps,
            start=start,
            most_images_per_second=most_images_per_second,
            device=accelerator.device,
        )
        self.total_steps = total_steps
        self.lines = accelerator.is_main_process and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=start,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=self.lines or not accelerator.is_main_process,
        )
        self.shown: dict[str, str] = {}
        self.latest: dict[str, float | int] = {}

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
        self.latest = dict(values)
        if self.lines and "loss" not in values:
            self.say(line(step, self.total_steps, values))

    def speed(self, step: int) -> None:
        """Writes, shows and sends to the trackers the speed since the last call, with what was last written.

        Args:
            step: Optimizer steps taken.
        """
        speed = self.watch.measure(step)
        if not self.accelerator.is_main_process:
            return
        values = {name: value for name, value in asdict(speed).items() if value is not None}
        self.timing.append({"step": step, **values, "time": datetime.now(UTC).isoformat(timespec="seconds")})
        self.accelerator.log(values, step=step)
        self.show({"images/s": f"{speed.images_per_second:.4g}"})
        if self.lines:
            self.say(line(step, self.total_steps, self.latest | values))

    def rewind(self, step: int) -> None:
        """Goes back to the checkpoint of a step, in the bar and in `metrics.jsonl`."""
        if self.accelerator.is_main_process:
            self.metrics.rewind(step)
            self.timing.rewind(step)
        self.advance(step)
        self.pause(step)

    def pause(self, step: int) -> None:
        """Leaves the time since the last call of `speed` out, after an evaluation or a checkpoint."""
        self.watch.pause(step)

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
            tqdm.write(text if isinstance(text, str) else "\n".join(text))
            sys.stdout.flush()


_TEXTS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "bits_per_dim": "bits {:.4f}".format,
    "validation_bits_per_dim": "held-out bits {:.4f}".format,
    "nats_per_dim": "nats {:.4f}".format,
    "validation_nats_per_dim": "held-out nats {:.4f}".format,
    "learning_rate": "lr {:.2e}".format,
    "grad_norm": "grad norm {:.3g}".format,
    "images_per_second": "{:.4g} images/s".format,
    "hours_left": "{:.2f} h left".format,
    "peak_memory_gb": "{:.1f} GB".format,
    "mfu": "MFU {:.1%}".format,
    "skipped_steps": "{:.0f} steps skipped".format,
    "skipped_images": "{:.0f} images replaced".format,
}


def line(step: int, total_steps: int, values: Mapping[str, float | int]) -> str:
    """One plain line of a log.

    Args:
        step: Optimizer steps taken.
        total_steps: Planned length of the training.
        values: Metrics by name; what was skipped is told where it is not 0, other names as they are.

    Example:
        >>> line(20, 1000, {"loss": 0.41, "bits_per_dim": 4.81, "skipped_steps": 0, "hours_left": 1.5})
        'step 20/1000, loss 0.4100, bits 4.8100, 1.50 h left'
    """
    shown = {name: value for name, value in values.items() if value or not name.startswith("skipped_")}
    texts = [_TEXTS[name](value) for name, value in shown.items() if name in _TEXTS]
    others = [f"{name} {value:.4g}" for name, value in shown.items() if name not in _TEXTS]
    return ", ".join([f"step {step}/{total_steps}", *texts, *others])


__all__ = ["MetricsFile", "TrainingLog", "line"]

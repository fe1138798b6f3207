"""Experiment trackers of a run: the same entry after every start, the user's own project, numbers and pictures."""

import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from tarflow_hf.configuration_tarflow import read_json

logger = logging.getLogger(__name__)


def start_trackers(accelerator: Accelerator, options: Mapping[str, Any], *, folder: Path) -> None:
    """Starts the experiment trackers of an accelerator and tells them the options of the run.

    A run that goes on goes on in the same entry: the id that wandb knows it by is kept in `trackers.json`. wandb's own
    variables (`WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_NAME`, `WANDB_RUN_ID`, `WANDB_MODE` and the others) decide where
    they are set; else the project is "tarflow" and the entry is called like the folder.

    Args:
        accelerator: The processes; the main one talks to the trackers.
        options: Options by name; what is no number, switch or text is told as text.
        folder: Folder of the run.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> start_trackers(Accelerator(cpu=True), {"learning_rate": 1e-4}, folder=Path("runs/digits"))  # nothing to do
    """
    config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
    wanted = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
    settings: dict[str, dict[str, Any]] = {}
    if "trackio" in wanted:
        settings["trackio"] = {"name": folder.name, "resume": "allow"}
    if "wandb" in wanted and accelerator.is_main_process:
        name = {} if "WANDB_NAME" in os.environ else {"name": folder.name}
        settings["wandb"] = name | {"id": run_id(folder / "trackers.json"), "resume": "allow"}
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "tarflow"), config=config, init_kwargs=settings)


def run_id(path: Path) -> str:
    """The id of this run: of the environment, of the run's earlier starts, or a new one.

    Args:
        path: Where it is kept.

    Raises:
        OSError: If something else stands there.

    Example:
        >>> from pathlib import Path
        >>> run_id(Path("trackers.json")) == run_id(Path("trackers.json"))
        True
    """
    known = read_json(path, str(path)) if path.exists() else {}
    if not isinstance(known.get("wandb", ""), str):
        raise OSError(f"{path} is damaged: wandb must be the id of a run, got {known['wandb']!r:.60}")
    run_id = os.environ.get("WANDB_RUN_ID") or known.get("wandb") or uuid.uuid4().hex[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {"wandb": run_id}) + "\n")
    return run_id


def track_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Sends a picture to every tracker that shows pictures. A failure is a warning.

    Args:
        accelerator: The processes and the trackers.
        name: What the trackers call it.
        path: The file.
        step: Optimizer steps taken.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> track_picture(Accelerator(cpu=True), "samples", Path("grid.png"), step=10)  # no tracker, nothing to do
    """
    for tracker in accelerator.trackers:
        try:
            with Image.open(path) as picture:
                levels = np.asarray(picture.convert("RGB"))
            if tracker.name == "tensorboard":
                tracker.log_images({name: levels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(levels)}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [levels]}, step=step)
        except Exception as error:  # whatever happens there is not worth a run
            logger.warning("%s did not take the picture %s of step %d: %s", tracker.name, name, step, error)


__all__ = ["run_id", "start_trackers", "track_picture"]

"""Checkpoints of a training run: written so that a kill or a full disk never costs a complete one.

A checkpoint is a folder `step-00000120` with `state.pt` (everything needed to go on) and `checkpoint.json` (the step,
the options that decide the run's result, and the size of every file). It is written under another name, flushed to
the disk, and renamed in one move, so that a folder of that name is complete. States are saved whole, also where FSDP
shards them: a run can go on with another number of processes.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tarflow_hf.images.arguments import public_place

_COMPLETE = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not belong to this run."""


class StopSignal:
    """Notes SIGTERM, a cluster's notice of a coming kill, so that the run can save and end by itself.

    Example:
        >>> import os, signal
        >>> with StopSignal() as stop:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print(stop.received)
        True
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def write_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    configuration: dict[str, Any],
    *,
    keep: int,
    options: dict[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest ones. To be called by one process.

    Args:
        folder: Folder of the run's checkpoints.
        step: Optimizer steps taken.
        state: Whole tensors, numbers and text, nested in dicts and lists.
        configuration: The options that decide the run's result, as JSON.
        keep: Complete checkpoints to keep, this one included.
        options: All options of the run, for whoever makes a pipeline of the checkpoint.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: If it cannot be written. Complete checkpoints are as they were.

    Example:
        >>> from pathlib import Path
        >>> for step in (10, 20, 30):
        ...     path = write_checkpoint(Path("checkpoints"), step, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> [path.name for path in complete_checkpoints(Path("checkpoints"))]
        ['step-00000020', 'step-00000030']
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    unfinished = folder / f"{_UNFINISHED}{final.name}"
    _remove_unfinished(folder)
    try:
        unfinished.mkdir()
        _write(unfinished / "state.pt", lambda file: torch.save(state, file))
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        about = {"step": step, "configuration": configuration, "options": options, "files": sizes}
        _write(unfinished / "checkpoint.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
        _flush_folder(unfinished)
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        os.replace(unfinished, final)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        last = latest_checkpoint(folder)
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder}: {error}. "
            f"The last complete checkpoint is {last.name if last else 'none'}"
        ) from error
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints, oldest first.

    Example:
        >>> from pathlib import Path
        >>> _ = write_checkpoint(Path("checkpoints"), 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> Path("checkpoints", "step-00000020").mkdir()  # nothing in it: not complete
        >>> [path.name for path in complete_checkpoints(Path("checkpoints"))]
        ['step-00000010']
    """
    names = [path for path in folder.glob("step-*") if _COMPLETE.fullmatch(path.name) and _is_complete(path)]
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path | None:
    """Folder of the newest complete checkpoint, or None.

    Example:
        >>> from pathlib import Path
        >>> folder = Path("checkpoints")
        >>> latest_checkpoint(folder) is None
        True
        >>> write_checkpoint(folder, 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2) == latest_checkpoint(folder)
        True
    """
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def read_checkpoint(path: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """Reads the state of a complete checkpoint, tensors on the CPU.

    Args:
        path: Folder of the checkpoint.
        configuration: The options of the run that wants to go on from it.

    Returns:
        The state that was written.

    Raises:
        CheckpointError: If it was made with other options; the message names each difference.

    Example:
        >>> from pathlib import Path
        >>> path = write_checkpoint(Path("checkpoints"), 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> read_checkpoint(path, {"seed": 0})["weight"]
        tensor([1., 1.])
        >>> read_checkpoint(path, {"seed": 1})
        Traceback (most recent call last):
            ...
        tarflow_hf.training.checkpoints.CheckpointError: checkpoints/step-00000010 is a checkpoint of another run: ...
    """
    saved = json.loads((path / "checkpoint.json").read_text())["configuration"]
    places = {name: public_place(saved[name]) for name in ("data", "eval_data", "init_from") if saved.get(name)}
    saved |= places  # where a checkpoint of version 0.1.0 has the whole path
    wanted = json.loads(json.dumps(configuration))
    differences = [
        f"{name} was {saved.get(name, 'absent')!r} and is now {wanted.get(name, 'absent')!r}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name, "absent") != wanted.get(name, "absent")
    ]
    if differences:
        raise CheckpointError(
            f"{path} is a checkpoint of another run: {'; '.join(differences)}. "
            "Choose another output_dir, or remove the old run to start anew"
        )
    return read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU, mapped from the file: only what is used is read.

    Args:
        path: Folder of the checkpoint.

    Example:
        >>> from pathlib import Path
        >>> path = write_checkpoint(Path("checkpoints"), 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> read_state(path)["weight"]
        tensor([1., 1.])
    """
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)


def _is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / "checkpoint.json").read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)


def _write(path: Path, write: Callable[[Any], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "CheckpointError",
    "StopSignal",
    "complete_checkpoints",
    "latest_checkpoint",
    "read_checkpoint",
    "read_state",
    "write_checkpoint",
]

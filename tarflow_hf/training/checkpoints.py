"""Checkpoints of a training run: written so that a kill or a full disk never costs a complete one.

A checkpoint is a folder `step-00000120` with `state.pt` (everything needed to go on) and `checkpoint.json` (the step,
the options that decide the run's result, and size and checksum of every file). It is written under another name,
flushed to the disk, and renamed in one move, so that a folder of that name is complete. States are saved whole, also
where FSDP shards them: a run can go on with another number of processes.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tarflow_hf.images.arguments import public_place
from tarflow_hf.training.disk import checksum_of, flush_folder, remove, remove_if_possible, write_summed
from tarflow_hf.training.shards import METADATA, WHOLE, map_state

_COMPLETE = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not belong to this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written, or no state of this model."""


def write_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any] | Callable[[], object],
    configuration: dict[str, Any],
    *,
    keep: int,
    options: dict[str, Any] | None = None,
    protected: Collection[int] = (),
    content: str | None = None,
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest ones. To be called by one process.

    Args:
        folder: Folder of the run's checkpoints.
        step: Optimizer steps taken.
        state: Whole tensors, numbers and text, nested in dicts and lists; or a function that returns when all shards
            are in the folder of [`prepare_checkpoint`].
        configuration: The options that decide the run's result, as JSON.
        keep: Complete checkpoints to keep, this one included.
        options: All options of the run, for whoever makes a pipeline of the checkpoint.
        protected: Steps whose checkpoints are kept beside them.
        content: Fingerprint of the training data.

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
    final, shards = folder / f"step-{step:08d}", callable(state)
    unfinished = prepare_checkpoint(folder, step, clean=not shards)
    try:
        if callable(state):
            state()
            checksums = {path.name: checksum_of(path) for path in sorted(unfinished.iterdir())}
        else:
            checksums = {WHOLE: write_summed(unfinished / WHOLE, lambda file: torch.save(state, file))}
        sizes = {name: (unfinished / name).stat().st_size for name in checksums}
        about = {"step": step, "configuration": configuration, "options": options, "content": content}
        about |= {"files": sizes, "checksums": checksums}
        write_summed(unfinished / "checkpoint.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
        flush_folder(unfinished)
        _put_in_place(unfinished, final)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(_not_written(folder, step, error)) from error
    for old in complete_checkpoints(folder)[:-keep]:
        if step_of(old) not in protected:
            remove_if_possible(old)
    return final


def _not_written(folder: Path, step: int, error: Exception) -> str:
    """Why a checkpoint could not be written, and what is left."""
    last, free = latest_checkpoint(folder), shutil.disk_usage(folder).free
    # torch's own file format answers a short write with two positions in the file
    reason = "a file is cut short, the disk may be full" if "unexpected pos" in str(error) else str(error)
    return (
        f"cannot write the checkpoint of step {step} to {folder}: {reason}. The disk has {free / 1e9:.3g} GB "
        f"free. The last complete checkpoint is {last.name if last else 'none'}"
    )


def prepare_checkpoint(folder: Path, step: int, *, clean: bool = True) -> Path:
    """The folder that a checkpoint is written in until it is complete, and what others left unfinished removed.

    Args:
        folder: Folder of the run's checkpoints.
        step: Optimizer steps taken.
        clean: Whether to remove and make it; otherwise it is there.

    Example:
        >>> from pathlib import Path
        >>> prepare_checkpoint(Path("checkpoints"), 10).name
        '.unfinished-step-00000010'
    """
    unfinished = folder / f"{_UNFINISHED}step-{step:08d}"
    if clean:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)
        unfinished.mkdir()
    return unfinished


def remove_checkpoints_after(folder: Path, step: int) -> list[str]:
    """Removes the checkpoints of later steps, the newest first; their names.

    Example:
        >>> from pathlib import Path
        >>> for step in (10, 20, 30):
        ...     path = write_checkpoint(Path("checkpoints"), step, {"weight": torch.ones(2)}, {"seed": 0}, keep=3)
        >>> remove_checkpoints_after(Path("checkpoints"), 10)
        ['step-00000030', 'step-00000020']
    """
    later = [path for path in reversed(all_checkpoints(folder)) if step_of(path) > step]
    for path in later:
        remove(path)
    return [path.name for path in later]


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint's folder tells.

    Example:
        >>> from pathlib import Path
        >>> step_of(Path("checkpoints/step-00000120"))
        120
    """
    return int(checkpoint.name.removeprefix("step-"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Folders of the checkpoints, damaged ones too, oldest first.

    Example:
        >>> from pathlib import Path
        >>> Path("checkpoints/step-00000020").mkdir(parents=True)
        >>> [path.name for path in all_checkpoints(Path("checkpoints"))]
        ['step-00000020']
    """
    for aside in folder.glob(f"{_REPLACED}*"):  # a kill came between the two moves of its replacement
        final = folder / aside.name.removeprefix(_REPLACED)
        if final.exists():
            remove(aside)
        else:
            os.replace(aside, final)
    return sorted((path for path in folder.glob("step-*") if _COMPLETE.fullmatch(path.name)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of the complete checkpoints, oldest first.

    Example:
        >>> from pathlib import Path
        >>> _ = write_checkpoint(Path("checkpoints"), 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> Path("checkpoints", "step-00000020").mkdir()  # nothing in it: not complete
        >>> [path.name for path in complete_checkpoints(Path("checkpoints"))]
        ['step-00000010']
    """
    return [path for path in all_checkpoints(folder) if _is_complete(path)]


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
    saved = read_manifest(path)["configuration"]
    wanted = json.loads(json.dumps(configuration))
    changes = differences(saved, wanted)
    if changes:
        raise CheckpointError(
            f"{path} is a checkpoint of another run: {'; '.join(changes.values())}. "
            "Choose another output_dir, or remove the old run to start anew"
        )
    return read_state(path)


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """What was and what is now, of every option that differs.

    Lists of numbers may differ in their last digits: a fingerprint is made of sums, which round otherwise on another
    machine or with another number of threads.

    Example:
        >>> differences({"seed": 0, "batch_size": 8}, {"seed": 0, "batch_size": 16})
        {'batch_size': 'batch_size was 8 and is now 16'}
        >>> differences({"flow_fingerprint": [0.3]}, {"flow_fingerprint": [0.1 + 0.2]})
        {}
    """
    return {
        name: f"{name} was {saved.get(name, 'absent')!r} and is now {wanted.get(name, 'absent')!r}"
        for name in sorted(saved.keys() | wanted.keys())
        if not _agree(saved.get(name, "absent"), wanted.get(name, "absent"))
    }


def _agree(one: object, other: object) -> bool:
    if not (isinstance(one, list) and isinstance(other, list)) or len(one) != len(other):
        return one == other
    numbers = all(isinstance(value, float) for value in (*one, *other))
    return all(map(partial(math.isclose, abs_tol=1e-9), one, other)) if numbers else one == other


def read_manifest(path: Path) -> dict[str, Any]:
    """What `checkpoint.json` says: step, configuration, and size and checksum of each file.

    Args:
        path: Folder of the checkpoint.

    Raises:
        DamagedCheckpointError: If it cannot be read or says something else.

    Example:
        >>> from pathlib import Path
        >>> path = write_checkpoint(Path("checkpoints"), 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> read_manifest(path)["configuration"]
        {'seed': 0}
    """
    file = path / "checkpoint.json"
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(about, dict):
        raise DamagedCheckpointError(f"{file} must hold an object, got {str(about)[:50]!r}")
    for name, kind in (("step", int), ("configuration", dict), ("files", dict)):
        if type(about.get(name)) is not kind:
            raise DamagedCheckpointError(f"{file} must hold {name!r}, a {kind.__name__}, got {about.get(name)!r}")
    if _COMPLETE.fullmatch(path.name) and about["step"] != step_of(path):
        raise DamagedCheckpointError(f"{file} must be of the step of its folder, got {about['step']}")
    if not all(type(size) is int for size in about["files"].values()) or not {WHOLE, METADATA} & about["files"].keys():
        raise DamagedCheckpointError(f"{file} must hold the sizes of 'files' with state.pt, got {about['files']}")
    if not isinstance(about.get("checksums", {}), dict):
        raise DamagedCheckpointError(f"{file} must hold 'checksums' by file, got {about['checksums']!r}")
    saved = about["configuration"]
    for name in ("data", "eval_data", "vae", "init_from"):
        if isinstance(saved.get(name), str):  # of version 0.1.0 the whole path
            saved[name] = public_place(saved[name])
    return about


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU, once sizes and checksums are found to be those of the manifest.

    Tensors are mapped from the file: only what is used is kept in memory. Older checkpoints have no checksums.

    Args:
        path: Folder of the checkpoint.

    Raises:
        DamagedCheckpointError: If a file is missing, is not as it was written, or cannot be read.

    Example:
        >>> from pathlib import Path
        >>> path = write_checkpoint(Path("checkpoints"), 10, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)
        >>> read_state(path)["weight"]
        tensor([1., 1.])
    """
    about = read_manifest(path)
    for name, size in about["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise DamagedCheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpointError(f"{file} must have {size} bytes, got {file.stat().st_size}")
        expected = about.get("checksums", {}).get(name)
        if expected is not None and (found := checksum_of(file)) != expected:
            raise DamagedCheckpointError(f"{file} must have the checksum {expected}, got {found}")
    try:
        state = map_state(path)
    except Exception as error:  # what a damaged file makes of the reader is not to be foreseen
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise DamagedCheckpointError(f"{path / 'state.pt'} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"{path / 'state.pt'} must hold a state, got {type(state).__name__}")
    return state


def _is_complete(path: Path) -> bool:
    try:
        sizes = read_manifest(path)["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, DamagedCheckpointError):
        return False


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Moves a written checkpoint to its name; one of that name stands aside until it is there."""
    aside = final.with_name(f"{_REPLACED}{final.name}")
    if final.is_symlink() or final.exists():
        os.replace(final, aside)
    os.replace(unfinished, final)
    flush_folder(final.parent)
    with suppress(OSError):  # nothing stood aside, or a later start removes it
        remove(aside)


__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "all_checkpoints",
    "complete_checkpoints",
    "differences",
    "latest_checkpoint",
    "prepare_checkpoint",
    "read_checkpoint",
    "read_manifest",
    "read_state",
    "remove_checkpoints_after",
    "step_of",
    "write_checkpoint",
]

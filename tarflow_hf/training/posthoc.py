"""Averages of the weights that are made after the training: what a run stores for them, and how they are put together.

A run with `posthoc_ema: [0.05, 0.10]` keeps two averages by a power of time. They are part of every checkpoint, and at
regular steps they are stored in `averages/`, from which [`posthoc_average`] makes the average of any length.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tarflow_hf.training.power_average import Average, combination

FOLDER = "averages"
Place: TypeAlias = tuple[Average, Path | None, str]
"""An average, the file that it is stored in (None: the checkpoint), and its name there."""
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class PosthocAverage:
    """An average made of stored ones.

    Args:
        tensors: The averaged state by name, in the dtypes of the stored ones.
        error: How far its weights are from those of an average kept during training, see [`combination`].
        stored: How many averages it was made of.

    Example:
        >>> PosthocAverage({}, error=0.001, stored=16).stored
        16
    """

    tensors: dict[str, torch.Tensor]
    error: float
    stored: int


def store_averages(folder: Path, step: int, averages: Mapping[str, Any]) -> Path:
    """Stores the averages of a step in one move. To be called by one process.

    Args:
        folder: `averages` in the folder of the run.
        step: Optimizer steps taken.
        averages: By relative length the state of a [`PowerAverage`], whole tensors.

    Returns:
        The file.

    Example:
        >>> from pathlib import Path
        >>> averages = {"0.1": {"num_updates": 10, "origin": 0, "average": {"weight": torch.ones(2)}}}
        >>> store_averages(Path("averages"), 10, averages).name
        'step-00000010.safetensors'
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    unfinished = folder / f".{path.name}"
    tensors = {f"{length}/{name}": t for length, kept in averages.items() for name, t in kept["average"].items()}
    about = {length: [kept["origin"], kept["num_updates"]] for length, kept in averages.items()}
    save_file(tensors, unfinished, metadata={"step": str(step), "averages": json.dumps(about)})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return path


def stored_averages(folder: Path) -> dict[int, Path]:
    """The files of stored averages by step.

    Example:
        >>> from pathlib import Path
        >>> stored_averages(Path("averages"))
        {}
    """
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def remove_averages_after(folder: Path, step: int) -> None:
    """Removes what was stored after a step that a run goes on from: it will be stored anew.

    Example:
        >>> from pathlib import Path
        >>> remove_averages_after(Path("averages"), 10)
    """
    for stored, path in stored_averages(folder).items():
        if stored > step:
            path.unlink()


def posthoc_average(folder: Path, step: int, own: Mapping[str, Any], length: float) -> PosthocAverage:
    """The average of a relative length at a checkpoint, made of those stored up to it and its own, in float64.

    Args:
        folder: `averages` in the folder of the run.
        step: Step of the checkpoint.
        own: The averages of the checkpoint's state, as [`store_averages`] takes them.
        length: Relative length, in (0, 12^-1/2].

    Raises:
        ValueError: If the checkpoint has no averages, or `length` is out of range.

    Reference: arXiv 2312.02696, section 3.2.

    Example:
        >>> from pathlib import Path
        >>> own = {"0.1": {"num_updates": 10, "origin": 0, "average": {"weight": torch.ones(2)}}}
        >>> posthoc_average(Path("averages"), 10, own, 0.1).tensors["weight"]
        tensor([1., 1.])
    """
    if not own:
        raise ValueError("the run kept no averages to make one of: its recipe has no posthoc_ema")
    origin = min(kept["origin"] for kept in own.values())
    own = {name: kept for name, kept in own.items() if kept["origin"] == origin}
    wanted = Average(next(iter(own.values()))["num_updates"], length)
    places: list[Place] = [(Average(kept["num_updates"], float(name)), None, name) for name, kept in own.items()]
    for stored, path in stored_averages(folder).items():
        if stored < step:
            places += _averages_in(path, origin)
    factors, error = combination([average for average, _, _ in places], wanted)
    sums: dict[str, torch.Tensor] = {}
    dtypes = {name: tensor.dtype for name, tensor in next(iter(own.values()))["average"].items()}
    for factor, (_, file, kept) in zip(factors.tolist(), places, strict=True):
        for name, tensor in own[kept]["average"].items() if file is None else _tensors(file, kept):
            part = tensor.double() * factor
            sums[name] = part if name not in sums else sums[name].add_(part)
    tensors = {name: total.to(dtypes[name]) for name, total in sums.items()}
    return PosthocAverage(tensors, error, len(places))


def _averages_in(path: Path, origin: int) -> list[Place]:
    """The averages of a file that began at a step; those of another beginning are of other values."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["averages"])
    return [
        (Average(updates, float(name)), path, name)
        for name, (began, updates) in about.items()
        if began == origin and updates > 0
    ]


def _tensors(path: Path, length: str) -> Iterable[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for key in file.keys():
            if key.startswith(f"{length}/"):
                yield key.removeprefix(f"{length}/"), file.get_tensor(key)


__all__ = [
    "FOLDER",
    "PosthocAverage",
    "posthoc_average",
    "remove_averages_after",
    "store_averages",
    "stored_averages",
]

"""Which checkpoint a run goes on from, and what may differ from the run that wrote it."""

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tarflow_hf.images.sources import ImageData
from tarflow_hf.training.alternatives import alternative
from tarflow_hf.training.arguments import ModelArguments, TrainingArguments, known_options
from tarflow_hf.training.checkpoints import (
    CheckpointError,
    DamagedCheckpointError,
    all_checkpoints,
    differences,
    read_manifest,
    read_state,
    step_of,
)

logger = logging.getLogger(__name__)

FIXED = {item.name for item in fields(ModelArguments)} | {
    "seed",
    "class_names",
    "condition",
    "arrays",
    "lora",
    "freeze",
}
"""What the weights and the random numbers of a run depend on by nature."""
PLACES = {"data", "data_config", "eval_data", "train_split", "image_column", "label_column"}
"""Where the images are; free while the images are the same."""
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Resumable:
    """A checkpoint to go on from.

    Args:
        path: Its folder.
        state: What it holds, checked.
        changes: Options that were changed since, what they were and what they are.

    Example:
        >>> from pathlib import Path
        >>> Resumable(Path("step-00000010"), {}, {"max_steps": [10, 20]}).changes
        {'max_steps': [10, 20]}
    """

    path: Path
    state: dict[str, Any]
    changes: dict[str, list[Any]]


def newest_sound(
    folder: Path,
    arguments: TrainingArguments,
    configuration: dict[str, Any],
    *,
    content: str | None,
    check: Callable[[dict[str, Any], int], None],
    last_step: int | None = None,
) -> Resumable | None:
    """The newest checkpoint that is as it was written, and a state of this model. A damaged one is named in a warning.

    Args:
        folder: Folder of the run's checkpoints.
        arguments: The options of this start, which say what may have changed.
        configuration: The options that decide the result, as checkpoints have them.
        content: Fingerprint of the training data.
        check: Called with a state and its step; raises ValueError if the state is none of this model.
        last_step: Later checkpoints are left out.

    Returns:
        The checkpoint; None if there are none, sound or not.

    Raises:
        CheckpointError: If there are checkpoints and none is sound, or the run is another one.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000})
        >>> newest_sound(Path("new"), arguments, arguments.fixed(), content=None, check=print) is None
        True
    """
    damaged = []
    for path in reversed(all_checkpoints(folder)):
        if last_step is not None and step_of(path) > last_step:
            continue
        try:
            about = read_manifest(path)
            changes = _permitted(path, about, arguments, configuration, content)
            state = read_state(path)
            try:
                check(state, about["step"])
            except ValueError as error:
                raise DamagedCheckpointError(f"{path / 'state.pt'} is no state of this run: {error}") from error
        except DamagedCheckpointError as error:
            damaged.append(path)
            logger.warning("passing over a damaged checkpoint: %s", error)
            continue
        if damaged:
            logger.warning("going on from the older checkpoint %s", path.name)
        return Resumable(path, state, changes)
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be used ({', '.join(path.name for path in damaged)}; the "
            "warnings above say why). Put an undamaged copy of one in its place and start the same command again, "
            f"choose another output_dir, or remove {folder} to start anew at step 0"
        )
    return None


def _permitted(
    path: Path,
    about: dict[str, Any],
    arguments: TrainingArguments,
    configuration: dict[str, Any],
    content: str | None,
) -> dict[str, list[Any]]:
    """The options that differ, if all of them may; otherwise an error that says how to go on."""
    defaults = {name: option.default for name, option in known_options().items() if not option.may_change}
    saved = defaults | about["configuration"]  # options that are younger than the checkpoint had their defaults
    changed = differences(saved, json.loads(json.dumps(configuration)))
    same_images = "num_images" not in changed and (content is None or about.get("content") in (None, content))
    if not same_images and "num_images" not in changed:
        changed["data"] = "data had other images"
    given = {text.partition("=")[0] for text in arguments.output.override}
    given |= {other for name in given if (other := alternative(name)) is not None}
    free = given | (PLACES if same_images else set()) | ({"num_images"} if "data" in given else set())
    refused = {name: text for name, text in changed.items() if name not in free or name in FIXED}
    fixed = [name for name in refused if name in FIXED]
    if fixed or (refused and not arguments.output.allow_changes):
        options = [name for name in refused if name in known_options() and configuration[name] is not None]
        wanted = [f"--override {name}={_written(configuration[name])}" for name in options]
        raise CheckpointError(
            f"{path} is a checkpoint of another run: {'; '.join(refused.values())}. "
            + (
                f"{', '.join(fixed)} cannot change within a run. "
                if fixed
                else f"If that is meant: {' '.join(wanted) or '--override NAME=VALUE'} (or --allow_changes true). "
            )
            + "Choose another output_dir, or remove the old run to start anew"
        )
    return {name: [saved.get(name), configuration.get(name)] for name in changed}


def _written(value: object) -> str:
    """A value as a command line gives it."""
    text = json.dumps(value) if isinstance(value, list | tuple | dict | bool) else str(value)
    return shlex.quote(text)


def content_fingerprint(data: ImageData) -> str | None:
    """A checksum over the images and labels of some rows, wherever they lie; None for a stream.

    Args:
        data: The training data.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> from tarflow_hf.images.sources import load_image_data
        >>> data, _ = load_image_data(DataArguments(data="./examples/data/digits"), class_conditional=True)
        >>> len(content_fingerprint(data))
        32
    """
    if not hasattr(data.rows, "__len__"):
        return None
    checksum = xxhash.xxh3_128()
    for index in np.unique(np.linspace(0, len(data.rows) - 1, _SAMPLED_ROWS).astype(int)).tolist():
        row = data.rows[index]
        checksum.update(data.content_of(row))
        checksum.update(str(row[data.label_column] if data.label_column else "").encode())
    return checksum.hexdigest()


__all__ = ["FIXED", "PLACES", "Resumable", "content_fingerprint", "newest_sound"]

"""`model_index.json` of a pipeline looked through before anything is built."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from tarflow_hf.configuration_tarflow import did_you_mean, read_json
from tarflow_hf.hub.checkpoint_files import INDEX, MODEL_CLASS, PIPELINE_CLASS

# What diffusers writes beside the pipeline's own settings.
_OF_DIFFUSERS = frozenset({"_class_name", "_diffusers_version", "_ignore_files", "_module", "_name_or_path"})


def check_index(folder: Path, owner: str) -> dict[str, Any]:
    """Raises OSError unless the folder's `model_index.json` is a TarFlow pipeline's; `owner` is for the message.

    Returns:
        Its content.
    """
    if not (folder / INDEX).is_file():
        alone = (
            "; it is a model alone: TarFlowModel.from_pretrained loads it"
            if (folder / "config.json").is_file()
            else ""
        )
        raise OSError(f"{owner} is not a TarFlow pipeline: it has no {INDEX}{alone}")
    content = read_json(folder / INDEX, f"{owner}: {INDEX}")
    class_name = content.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) and class_name else class_name
    if class_name != PIPELINE_CLASS:
        raise OSError(f"{owner} is not a TarFlow pipeline: its {INDEX} names {class_name}, not {PIPELINE_CLASS}")
    return content


def check_settings(content: Mapping[str, Any], known: Mapping[str, Any], name: str) -> None:
    """Raises OSError unless every key of an index is known and every value has its type.

    Args:
        content: The content of `model_index.json`.
        known: What a value must be, by key: a type for a setting, None for a part of the pipeline.
        name: What the message calls the file.
    """
    if "transformer" not in content:
        raise OSError(f"{name} is incomplete: it lacks transformer")
    for key, value in content.items():
        if key in _OF_DIFFUSERS:
            continue
        if key not in known:
            raise OSError(f"{name} is damaged: unknown key {key!r}{did_you_mean(key, known)}")
        if known[key] is None:
            is_class = isinstance(value, list) and len(value) == 2
            if not (is_class and all(item is None or isinstance(item, str) for item in value)):
                raise OSError(f"{name} is damaged: {key} must be a module and a class, got {value!r:.60}")
            if key == "vae" and value[0] not in (None, "diffusers"):
                raise OSError(f"{name} is damaged: {key} must be a class of diffusers, got {value!r:.60}")
            if key == "transformer" and value[1] != MODEL_CLASS:
                raise OSError(f"{name} is damaged: {key} must be a {MODEL_CLASS}, got {value!r:.60}")
        elif not fits(value, known[key]):
            raise OSError(f"{name} is damaged: {key} must be {type_text(known[key])}, got {value!r:.60}")


def fits(value: object, annotation: object) -> bool:
    """Whether a value has a type, or one of a union; a whole number is a float too, a truth value no number.

    Example:
        >>> fits(2, float | None), fits("2", float | None)
        (True, False)
    """
    if get_origin(annotation) in (Union, types.UnionType):
        return any(fits(value, member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation if isinstance(annotation, type) else True


def type_text(annotation: object) -> str:
    """A type as messages show it.

    Example:
        >>> type_text(float | None)
        'float or null'
    """
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(type_text, get_args(annotation)))
    if annotation is types.NoneType:
        return "null"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


__all__ = ["check_index", "check_settings", "fits", "type_text"]

"""The data sets of published checkpoints: names of their classes, and what a page says about them."""

import json
from os import PathLike
from pathlib import Path

from .model_card import TrainingData

_CLASS_NAMES = Path(__file__).with_name("class_names")

KNOWN_DATA = {
    "afhq": TrainingData(
        "AFHQ",
        description=(
            "Animal Faces HQ: about 15,000 photographs of the faces of cats, dogs and wild animals; CC BY-NC 4.0."
        ),
        biases="AFHQ has well-lit close-ups only; big cats, foxes and wolves stand for all wild animals.",
    ),
    "imagenet-1k": TrainingData(
        "ImageNet",
        hub_id="ILSVRC/imagenet-1k",
        description=(
            "ILSVRC 2012: 1.28 million photographs from the web in 1,000 classes, for non-commercial research."
        ),
        biases=(
            "ImageNet was collected on the web before 2012, most of it in North America and Europe; more than a tenth "
            "of its classes are breeds of dogs; people are in many pictures without being labelled."
        ),
    ),
}


def class_names(data: str) -> list[str]:
    """The class names of a known data set, in the order of the ids.

    Args:
        data: A key of `KNOWN_DATA`.
    """
    return read_class_names(_CLASS_NAMES / f"{data}.txt")


def read_class_names(path: str | PathLike[str]) -> list[str]:
    """Class names from a file: one a line (lines with # are left out), a JSON list, or JSON from id to name.

    Args:
        path: The file.

    Returns:
        The names in the order of the ids.

    Raises:
        ValueError: If the ids are not 0, 1, ..., or what is read are not names.
    """
    text = Path(path).read_text(encoding="utf-8")
    if not text.lstrip().startswith(("{", "[")):
        return [line for line in text.splitlines() if line and not line.startswith("#")]
    names = json.loads(text)
    if isinstance(names, dict):
        expected = [str(index) for index in range(len(names))]
        if sorted(names) != sorted(expected):
            raise ValueError(f"{path} must name the ids 0 ... {len(names) - 1}, got {', '.join(list(names)[:10])}")
        names = [names[index] for index in expected]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold names, got {names[:3]}")
    return names


__all__ = ["KNOWN_DATA", "class_names", "read_class_names"]

"""What a model calls its classes."""

import warnings
from collections.abc import Mapping

from tarflow_hf.configuration_tarflow import TarFlowConfig, did_you_mean


def class_names(config: TarFlowConfig) -> list[str]:
    """The names of the classes in the order of their ids; none for a model without classes.

    Args:
        config: The model's configuration.

    Example:
        >>> class_names(TarFlowConfig(image_size=8, hidden_size=64, num_classes=2, id2label={1: "dog", 0: "cat"}))
        ['cat', 'dog']
    """
    return [str(name) for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))]


def named(label: str, names: list[str]) -> list[int]:
    """The ids of the classes that a name fits: by the whole name, or by a part of it if no whole one fits.

    Parts are synonyms between commas (`tabby, tabby cat`), and what stands behind the group of a class
    (`Food & Drink: pizza`).

    Args:
        label: The name.
        names: Of the classes, in the order of their ids.

    Example:
        >>> names = ["tabby, tabby cat", "Food & Drink: pizza", "pizza oven"]
        >>> named("tabby cat", names), named("pizza", names), named("oven", names)
        ([0], [1], [])
    """
    found = [index for index, name in enumerate(names) if name == label]
    found = found or [index for index, name in enumerate(names) if label in name.split(", ")]
    return found or [index for index, name in enumerate(names) if name.partition(": ")[2] == label]


def nearest_name(label: str, names: list[str]) -> str:
    """The end of a message on an unknown name: the nearest name or part of one, or nothing where none is near.

    Args:
        label: The unknown name.
        names: Of the classes.

    Example:
        >>> nearest_name("pizzza", ["Food & Drink: pizza", "pie"]), nearest_name("dog", ["Food & Drink: pizza", "pie"])
        (", did you mean 'pizza'?", '')
    """
    parts = (part for name in names for part in (name, *name.split(", "), name.partition(": ")[2]) if part)
    return did_you_mean(label, parts)


def confusing_ids(names: Mapping[int, str] | Mapping[str, str], most: int = 12) -> str:
    """The ids of classes whose names are numbers, but not their ids; nothing where no name is such a number.

    Example:
        >>> confusing_ids({0: "1", 1: "2"}), confusing_ids({0: "0", 1: "1"}), confusing_ids({0: "cat"})
        ("'1' has the id 0, '2' has the id 1", '', '')
    """
    named = sorted((int(index), str(name)) for index, name in names.items())
    wrong = [f"{name!r} has the id {index}" for index, name in named if name.isdecimal() and name != str(index)]
    return ", ".join(wrong[:most] + (["and so on"] if len(wrong) > most else []))


def warn_of_namesake(label: int, names: dict[int, str]) -> None:
    """Warns if an id is the name of another class.

    Args:
        label: The id.
        names: Of the classes, by their ids.

    Example:
        >>> warn_of_namesake(1, {0: "cat", 1: "dog"})
    """
    namesake = [int(index) for index, name in names.items() if str(name) == str(label) and int(index) != label]
    if namesake:
        own = next((name for index, name in names.items() if int(index) == label), "no name")
        warnings.warn(
            f"class_labels: the number {label} is the id of the class named {own!r}; the class named '{label}' has "
            f"the id {namesake[0]}: give the string '{label}' for it",
            stacklevel=5,
        )


__all__ = ["class_names", "confusing_ids", "named", "nearest_name", "warn_of_namesake"]

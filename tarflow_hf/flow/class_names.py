"""What a model calls its classes."""

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


__all__ = ["class_names", "named", "nearest_name"]

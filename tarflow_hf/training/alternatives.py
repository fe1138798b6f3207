"""Options of which one takes the place of another."""

from collections.abc import Collection
from typing import Any

# Two ways to say one thing: naming one of a pair on the command line replaces the other one of the recipe.
_ALTERNATIVES = {"epochs": "max_steps", "warmup_epochs": "warmup_steps"}


def alternative(name: str) -> str | None:
    """The option that one takes the place of, such as `epochs` of `max_steps`; None for the others.

    Args:
        name: Of the option.

    Example:
        >>> alternative("max_steps"), alternative("seed")
        ('epochs', None)
    """
    return (_ALTERNATIVES | {b: a for a, b in _ALTERNATIVES.items()}).get(name)


def without_alternatives(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Options of a recipe without those that others, given on the command line, take the place of.

    Args:
        values: Of the recipe.
        given: Names on the command line.

    Example:
        >>> without_alternatives({"epochs": 3, "seed": 1}, ["max_steps"])
        {'seed': 1}
    """
    return {name: value for name, value in values.items() if name in given or alternative(name) not in given}


__all__ = ["alternative", "without_alternatives"]

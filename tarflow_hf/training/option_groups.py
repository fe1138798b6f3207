"""Options of a command beside `examples/train.py`: groups of its own, from a YAML recipe and the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import yaml

from tarflow_hf.training.recipes import convert, read_recipe


def parse_groups(
    argv: Sequence[str], groups: Sequence[type[Any]], *, description: str, default_recipe: str | None = None
) -> list[Any]:
    """The options of a recipe and the command line, which overrides single values of it, as one object a group.

    Args:
        argv: The arguments after the program's name: a recipe, then `--name value`.
        groups: Frozen dataclasses of `option` fields.
        description: What the command does, for `--help`.
        default_recipe: The recipe where the command line names none; None: it has to.

    Raises:
        SystemExit: If the command line is not understood.
        ValueError: If an option is unknown, or a value does not fit.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> command_line = ["examples/recipes/digits.yaml", "--horizontal_flip", "false"]
        >>> parse_groups(command_line, [DataArguments], description="Reads images.")
        Traceback (most recent call last):
            ...
        ValueError: unknown option 'image_size', 'num_channels', ...
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if default_recipe is None:
        parser.add_argument("recipe", help="YAML file of options")
    else:
        parser.add_argument("recipe", nargs="?", default=default_recipe, help="YAML file of options")
    known: dict[str, Any] = {}
    for group in groups:
        for item in fields(group):
            known[item.name] = get_type_hints(group)[item.name]
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if known[item.name] is bool else {}
            text = f"{item.metadata['help']} [{item.default}]".replace("%", "%%")
            parser.add_argument(f"--{item.name}", metavar="VALUE", help=text, **switch)
    given = vars(parser.parse_args(argv))
    values = read_recipe(given.pop("recipe")) | {name: yaml.safe_load(text) for name, text in given.items()}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(known)}")
    for name, value in values.items():
        if dict[str, Any] not in get_args(known[name]):
            values[name] = convert(name, value, known[name])
        elif not isinstance(value, dict | None):
            raise ValueError(f"{name} must be a mapping, got {value!r}")
    return [
        group(**{item.name: values[item.name] for item in fields(group) if item.name in values}) for group in groups
    ]


__all__ = ["parse_groups"]

"""Options of a command beside `examples/train.py`: groups of its own, from a YAML recipe and the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from tarflow_hf.images.arguments import require
from tarflow_hf.training.alternatives import without_alternatives
from tarflow_hf.training.recipes import (
    OptionParser,
    convert,
    load_recipe,
    nearest,
    read_value,
)


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
        ValueError: If an option is unknown, or a value does not fit; the message names the recipe and the line.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> command_line = ["examples/recipes/digits.yaml", "--horizontal_flip", "false"]
        >>> parse_groups(command_line, [DataArguments], description="Reads images.")
        Traceback (most recent call last):
            ...
        ValueError: examples/recipes/digits.yaml, line 9: unknown option 'image_size'...
    """
    known = {item.name: get_type_hints(group)[item.name] for group in groups for item in fields(group)}
    parser = OptionParser(known, usage="%(prog)s recipe.yaml [--option value ...]", description=description)
    if default_recipe is None:
        parser.add_argument("recipe", help="YAML file of options")
    else:
        parser.add_argument("recipe", nargs="?", default=default_recipe, help="YAML file of options")
    for item in (item for group in groups for item in fields(group)):
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if known[item.name] is bool else {}
        text = f"{item.metadata['help']} [{item.default}]".replace("%", "%%")
        parser.add_argument(f"--{item.name}", metavar="VALUE", help=text, **switch)
    given = vars(parser.parse_args(argv))
    recipe = load_recipe(given.pop("recipe"))
    written = {name: read_value(name, text, known[name]) for name, text in given.items()}
    try:
        return _made(without_alternatives(recipe.values, given) | written, groups, known)
    except ValueError as error:
        raise ValueError(recipe.explain(str(error), list(given))) from error


def refuse_unused(unused: Mapping[str, str], *groups: Any) -> None:  # noqa: ANN401
    """Raises ValueError if an option is given that a command has no use for.

    Args:
        unused: Why not, by the option's name.
        *groups: The options, one of which has the name.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> refuse_unused({"vae": "it is what is trained"}, DataArguments(data="huggan/AFHQ", vae="./vae"))
        Traceback (most recent call last):
            ...
        ValueError: vae must be left out: it is what is trained, got './vae'
    """
    for name, reason in unused.items():
        value = next(getattr(group, name) for group in groups if hasattr(group, name))
        require(not value, f"{name} must be left out: {reason}, got {value!r:.80}")


def _made(values: dict[str, Any], groups: Sequence[type[Any]], known: Mapping[str, Any]) -> list[Any]:
    """The groups with these options, each converted to its type."""
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown option {name!r:.60}{nearest(name, known)}")
        if dict[str, Any] not in get_args(known[name]):
            values[name] = convert(name, value, known[name])
        elif not (value is None or (isinstance(value, dict) and all(isinstance(key, str) for key in value))):
            raise ValueError(f"{name} must be a mapping of names, got {value!r:.60}")
    return [
        group(**{item.name: values[item.name] for item in fields(group) if item.name in values}) for group in groups
    ]


__all__ = ["parse_groups", "refuse_unused"]

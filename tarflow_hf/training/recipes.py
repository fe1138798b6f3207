"""Options of a training run from a YAML recipe and the command line, which overrides single values of it."""

import argparse
import math
import re
import reprlib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from tarflow_hf.images.arguments import without_credentials
from tarflow_hf.training.alternatives import alternative, without_alternatives
from tarflow_hf.training.arguments import OPTION_GROUPS, Option, TrainingArguments, known_options

_MOST_BYTES = 2**20  # of a recipe


class _Loader(yaml.SafeLoader):
    """Reads plain data, and refuses the numbers to base 8 and 60 that YAML makes of 010 and 1:30."""

    def decimal(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value or re.match(r"[-+]?0\d", node.value):
            reason = f"{node.value!r} would be a number to base 8 or 60: write it to base 10, or in quotes"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.decimal)


@dataclass(frozen=True)
class Recipe:
    """The options of a YAML file and where they stand in it.

    Args:
        path: The file, for messages.
        values: The options.
        lines: The line of each option, from 1.

    Example:
        >>> recipe = Recipe("mine.yaml", {"batch_size": 0}, {"batch_size": 3})
        >>> recipe.explain("batch_size must be at least 1, got 0")
        'mine.yaml, line 3: batch_size must be at least 1, got 0'
    """

    path: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def explain(self, message: str, given: Sequence[str] = ()) -> str:
        """A message with the lines of the options that it names, but for those `given` on the command line."""
        known = known_options().keys() | self.lines.keys() | set(given)
        named = [name for name in known if re.search(rf"\b{name}\b", message)]
        lines = sorted(self.lines[name] for name in named if name in self.lines and name not in given)
        if lines:
            return f"{self.path}, line {' and '.join(map(str, lines))}: {message}"
        return message if any(name in given for name in named) else f"{self.path}: {message}"


def make_arguments(values: dict[str, Any]) -> TrainingArguments:
    """Options from a flat mapping, each converted to its type.

    Raises:
        ValueError: If a name is unknown, a value has the wrong type or range, or options contradict each other.

    Example:
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, "learning_rate": "3e-4"})
        >>> arguments.optimization.learning_rate
        0.0003
        >>> make_arguments({"data": "huggan/AFHQ", "max_steps": 1000, "batch_size": "many"})
        Traceback (most recent call last):
            ...
        ValueError: batch_size must be int, got 'many'
    """
    options = known_options()
    values = _overridden(values)
    for name in values:
        if name not in options:
            raise ValueError(f"unknown option {name!r:.60}{nearest(str(name), options)}")
    groups: dict[str, dict[str, Any]] = {group: {} for group in OPTION_GROUPS}
    for name, value in values.items():
        groups[options[name].group][name] = convert(name, value, options[name].annotation)
    arguments = TrainingArguments(**{group: cls(**groups[group]) for group, cls in OPTION_GROUPS.items()})
    if arguments.data.vae is None:
        _check_shape(arguments)
    return arguments


def _check_shape(arguments: TrainingArguments) -> None:
    """Raises ValueError unless a model can have this shape, before any data are read."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        arguments.model.to_config([])
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def convert(name: str, value: object, annotation: object) -> object:
    """A value of YAML as the type of an option: int, float, bool, str, None, Literal, list or a union of them.

    Numbers are finite, and whole ones have 64 bits. YAML reads 1e-4 as text, so text that spells a number is taken
    where a number is expected.

    Args:
        name: The option, for the message.
        value: What YAML read.
        annotation: The type of the option.

    Raises:
        ValueError: If the value does not fit; it names the option, what was expected and what came.

    Example:
        >>> convert("learning_rate", "1e-4", float)
        0.0001
        >>> convert("layers_per_block", [2, 2, 6], int | list[int])
        [2, 2, 6]
        >>> convert("batch_size", 2.5, int)
        Traceback (most recent call last):
            ...
        ValueError: batch_size must be int, got 2.5
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        if isinstance(value, str) and not value.strip() and set(get_args(annotation)) == {str, types.NoneType}:
            raise ValueError(f"{name} must name something, or be null, got {value!r}")
        if isinstance(value, dict):
            annotation = next((member for member in get_args(annotation) if is_dataclass(member)), annotation)
            return convert(name, value, annotation) if is_dataclass(annotation) else _refuse(name, value, annotation)
        for member in get_args(annotation):
            try:
                return convert(name, value, member)
            except ValueError:
                continue
    elif origin is Literal:
        if value in get_args(annotation):
            return value
    elif origin in (list, tuple):
        items = [part.strip() for part in value.split(",")] if origin is tuple and isinstance(value, str) else value
        if isinstance(items, list | tuple) and len(items) <= 10_000:
            return origin(convert(name, item, get_args(annotation)[0]) for item in items)
    elif isinstance(annotation, type) and is_dataclass(annotation) and isinstance(value, dict):
        return _convert_group(name, value, annotation)
    elif annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if math.isfinite(number := float(value)):
                return number
        except (ValueError, OverflowError):
            pass
    elif annotation is int and isinstance(value, int | float | str) and not isinstance(value, bool):
        whole = _whole_number(value)
        if whole is not None and -(2**63) <= whole < 2**63:
            return whole
    elif type(value) is annotation or (annotation is types.NoneType and value is None):
        return value
    return _refuse(name, value, annotation)


def _refuse(name: str, value: object, annotation: object) -> NoReturn:
    shown = without_credentials(reprlib.repr(value))
    expected = "finite" if _spells_no_number(value) else _type_name(annotation)
    raise ValueError(f"{name} must be {expected}, got {shown}")


def _spells_no_number(value: object) -> bool:
    """Whether a value is NaN or infinite, as a number or as text."""
    try:
        return isinstance(value, float | str) and not math.isfinite(float(value))
    except ValueError:
        return False


def _convert_group(name: str, values: dict[str, Any], group: type[Any]) -> object:
    """A mapping as the group of options that an option is."""
    hints = get_type_hints(group)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ValueError(f"{name} has no {', '.join(map(repr, unknown))}; it has {', '.join(hints)}")
    return group(**{key: convert(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def _whole_number(value: float | str) -> int | None:
    """The whole number that a value is, also one like 1e5, or None."""
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and abs(number) <= 2**53 else None


def _type_name(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in get_args(annotation))
    if annotation is types.NoneType:
        return "null"
    if isinstance(annotation, type) and is_dataclass(annotation):
        return f"a mapping of {', '.join(item.name for item in fields(annotation))}"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options of a YAML recipe, as they are written there but for paths of data.

    Of a place (`data`, `flow`, `init_from` and the like) ./ and ../ are the recipe's folder and the one above it.

    Args:
        path: The file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a mapping of options, each given once; the message names the file and the line.

    Example:
        >>> recipe = read_recipe("examples/recipes/digits.yaml")
        >>> recipe["image_size"], recipe["noise_std"]
        (8, 0.1)
    """
    return load_recipe(path).values


def load_recipe(path: str | Path) -> Recipe:
    """A YAML recipe with the lines of its options; see [`read_recipe`].

    Args:
        path: The file.

    Example:
        >>> load_recipe("examples/recipes/digits.yaml").lines["image_size"] > 0
        True
    """
    path = Path(path)
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path} must be at most {_MOST_BYTES} bytes, got {size}")
    try:
        loader = _Loader(path.read_bytes())
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{line}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"{path}, line {line}: an option must be a name, got {key.value!r:.60}")
        if key.value in lines:
            raise ValueError(f"{path}, line {line}: {key.value} is given already in line {lines[key.value]}")
        lines[key.value] = line
    for name in ("data", "eval_data", "vae", "init_from", "flow", "perceptual"):
        value = values.get(name)
        if isinstance(value, str) and value.startswith(("./", "../")):
            values[name] = str((path.parent / value).resolve())
    return Recipe(str(path), values, lines)


def parse_arguments(argv: Sequence[str], *, default_recipe: str | Path) -> TrainingArguments:
    """Options from a command line `[recipe.yaml] [--name value ...]`, which overrides single values of the recipe.

    Args:
        argv: The arguments after the program's name.
        default_recipe: The recipe that is read where the command line names none.

    Returns:
        The options, checked.

    Raises:
        SystemExit: If the command line is not understood; the reason is printed.
        ValueError: If an option is unknown in the recipe, or a value does not fit; the message names the recipe
            and the line of an option that stands there.

    Example:
        >>> command_line = ["--batch_size", "32", "--max_steps", "100"]
        >>> arguments = parse_arguments(command_line, default_recipe="examples/recipes/digits.yaml")
        >>> arguments.optimization.batch_size, arguments.optimization.epochs  # max_steps takes the place of epochs
        (32, None)
    """
    options = known_options()
    given = vars(_make_parser(options, default_recipe).parse_args(argv))
    recipe = load_recipe(given.pop("recipe"))
    values = without_alternatives(recipe.values, given)
    for name, text in given.items():
        repeated = isinstance(text, list)
        values[name] = text if repeated else read_value(name, text, options[name].annotation)
    try:
        return make_arguments(values)
    except ValueError as error:
        raise ValueError(recipe.explain(str(error), list(given))) from error


def _overridden(values: dict[str, Any]) -> dict[str, Any]:
    """Options with those of `override` in their place."""
    texts, values = values.get("override") or (), dict(values)
    if not isinstance(texts, str | list | tuple):
        raise ValueError(f"override must be NAME=VALUE, or a list of such, got {texts!r:.60}")
    for text in [texts] if isinstance(texts, str) else texts:
        name, equals, value = str(text).partition("=")
        annotation = known_options()[name].annotation if name in known_options() else None
        if not equals or name == "override":
            raise ValueError(f"override must be NAME=VALUE, got {text!r:.60}")
        values.pop(alternative(name) or name, None)
        values[name] = read_value(name, value, annotation)
    return values


class OptionParser(argparse.ArgumentParser):
    """Answers an unknown option with the nearest known one, and leaves the list of all `options` to --help."""

    def __init__(self, options: Iterable[str], **kwargs: Any) -> None:  # noqa: ANN401  # argparse's own
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)
        self.known = [f"--{name}" for name in options]

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: .*?(--[^\s=]+)", message)
        if unknown is not None:
            message = f"unrecognized arguments: {unknown[1]}{nearest(unknown[1], self.known)}"
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name."""
    from tarflow_hf.configuration_tarflow import did_you_mean  # here, as only an error has the time for it

    return did_you_mean(name, known)


def read_value(name: str, text: str, annotation: object) -> object:
    """A value of the command line, written as in a recipe."""
    if text in _text_choices(annotation):
        return text
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--{name} must be written as in a recipe, got {reprlib.repr(text)}") from error


def _make_parser(options: dict[str, Option], default_recipe: str | Path) -> argparse.ArgumentParser:
    """A parser that reads every value as text and tells what the command line names from what it does not."""
    parser = OptionParser(
        options,
        usage="%(prog)s [recipe.yaml] [--option value ...]",
        description="Trains a TarFlow model. Values are written as in a recipe; defaults are in brackets.",
    )
    parser.add_argument("recipe", nargs="?", default=str(default_recipe), help="YAML file of options")
    groups = {name: parser.add_argument_group(name) for name in OPTION_GROUPS}
    for name, option in options.items():
        default = yaml.safe_dump(option.default, default_flow_style=True).removesuffix("...\n").strip()
        text = f"{option.text} [{default}]".replace("%", "%%")
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if option.annotation is bool else {}
        if name == "override":
            groups[option.group].add_argument("--override", action="append", metavar="NAME=VALUE", help=text)
            continue
        groups[option.group].add_argument(f"--{name}", metavar=_as_written(option.annotation), help=text, **switch)
    return parser


def _as_written(annotation: object, *, several: bool = False) -> str:
    """A type as a person writes its values, for instance "int or list of ints"; `several` asks for the plural."""
    members = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return "|".join(members)
        case origin if origin in (Union, types.UnionType):
            return " or ".join(map(_as_written, members))
        case origin if origin in (list, tuple):
            return f"list of {_as_written(members[0], several=True)}"
    if is_dataclass(annotation):
        return "{" + ", ".join(item.name for item in fields(annotation)) + "}"
    names: dict[object, str] = {bool: "true|false", int: "int", float: "number", str: "text", types.NoneType: "null"}
    return names[annotation] + ("s" if several else "")


def _text_choices(annotation: object) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


__all__ = ["Recipe", "convert", "load_recipe", "make_arguments", "parse_arguments", "read_recipe"]

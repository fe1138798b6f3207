"""Arguments that several callables take: written and documented in one place, seen by `help` at each."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def takes_arguments_of(source: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function that passes all its arguments on the signature of the one that it passes them to.

    Args:
        source: The function with the arguments.

    Returns:
        The decorator.

    Example:
        >>> import inspect
        >>> def power(base: float, exponent: float = 2.0) -> float:
        ...     return base**exponent
        >>> @takes_arguments_of(power)
        ... def negative(*args, **kwargs):
        ...     return -power(*args, **kwargs)
        >>> inspect.signature(negative)
        <Signature (base: float, exponent: float = 2.0)>
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        returned = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(source).replace(  # type: ignore[attr-defined]
            return_annotation=returned
        )
        return function

    return decorate


def arguments_of(documented: type) -> str:
    """What a class documents of its arguments, from the margin.

    Args:
        documented: The class; it has the section `Args:`.

    Example:
        >>> class Size:
        ...     \"\"\"A size.
        ...
        ...     Args:
        ...         width: In pixels.
        ...     \"\"\"
        >>> arguments_of(Size)
        'width: In pixels.'
    """
    section = inspect.cleandoc(documented.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    return textwrap.dedent(section)


def documents_arguments(arguments: str) -> Callable[[F], F]:
    """Puts what documents the arguments into a docstring, in place of its line `<arguments>`.

    Args:
        arguments: Their documentation, from the margin.

    Returns:
        The decorator.

    Raises:
        ValueError: If the docstring has no such line.

    Example:
        >>> @documents_arguments("width: In pixels.")
        ... def crop(width):
        ...     \"\"\"Crops.
        ...
        ...     Args:
        ...         <arguments>
        ...     \"\"\"
        >>> print(crop.__doc__)
        Crops.
        <BLANKLINE>
        Args:
            width: In pixels.
    """

    def decorate(function: F) -> F:
        text = inspect.cleandoc(function.__doc__ or "")
        if "    <arguments>" not in text:
            raise ValueError(f"the docstring of {function.__name__} must have the line '<arguments>'")
        function.__doc__ = text.replace("    <arguments>", textwrap.indent(arguments.strip(), "    "))
        return function

    return decorate


__all__ = ["arguments_of", "documents_arguments", "takes_arguments_of"]

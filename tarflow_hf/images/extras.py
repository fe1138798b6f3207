"""Says which extra of this package installs a library that is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Extra = Literal["train", "eval", "demo", "lora", "quant"]


@contextmanager
def installed_by(*extras: Extra) -> Iterator[None]:
    """Around an import: if the library is missing, the error names the extras of this package that bring it.

    Args:
        extras: Any one of them suffices.

    Raises:
        ModuleNotFoundError: If the library is not installed.

    Example:
        >>> with installed_by("train", "eval"):
        ...     import no_such_library
        Traceback (most recent call last):
        ModuleNotFoundError: No module named 'no_such_library': pip install 'tarflow_hf[train]' or 'tarflow_hf[eval]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        packages = " or ".join(f"'tarflow_hf[{extra}]'" for extra in extras)
        raise ModuleNotFoundError(f"{error}: pip install {packages}", name=error.name) from None


__all__ = ["Extra", "installed_by"]

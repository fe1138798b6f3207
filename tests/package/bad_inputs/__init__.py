"""One table of what must be refused: a module a door, a row a case. `test_bad_input.py` tries them all.

A module of this folder has `ROWS`, a list of [`Bad`]; a new door is a new module, and nothing else has to be told.
"""

import importlib
import pkgutil
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import tiny_model

from tarflow_hf import TarFlowPipeline


@dataclass(frozen=True)
class Bad:
    """A row.

    Args:
        name: What is wrong, for the test's name.
        call: What a user does, in an empty folder that it is given and that is the current one too.
        error: The type of the error, exactly.
        message: Regular expression that is found in its message: the argument or file, what was expected, what came.
    """

    name: str
    call: Callable[[Path], object]
    error: type[Exception]
    message: str


def rows() -> dict[str, Bad]:
    """Every row by "door: name"."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for row in importlib.import_module(f"{__name__}.{module.name}").ROWS:
            name = f"{module.name}: {row.name}"
            assert name not in found, f"two rows are called {name!r}"
            found[name] = row
    return found


@cache
def _saved() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    TarFlowPipeline(transformer=tiny_model(dtype=torch.float32)).save_pretrained(folder.name)
    return folder


def saved_pipeline(parent: Path) -> Path:
    """A sound pipeline in a folder of its own, to be damaged: `parent/pipe`."""
    return shutil.copytree(_saved().name, parent / "pipe")

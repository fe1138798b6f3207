"""Docstrings: every module says what lives there, every public name has an example, and every example runs."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import tarflow_hf

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULES = [module.name for module in pkgutil.walk_packages(tarflow_hf.__path__, "tarflow_hf.")]

# What the package builds on and no user imports: its names need no example.
PLUMBING = {
    "conversion.__main__",
    "conversion.command",
    "conversion.sizes",
    "conversion.tensors",
    "flow.blocks",
    "flow.choices",
    "flow.inputs",
    "flow.inverse.network",
    "flow.kv_cache",
    "flow.pretrained",
    "flow.sampling.branches",
    "flow.sampling.guided_encoding",
    "flow.sampling.memory",
    "flow.sampling.windows",
    "hub.auto_classes",
    "hub.checkpoint_files",
    "hub.model_files",
    "hub.pipeline_index",
    "hub.safetensors_files",
    "metrics.atomic",
    "metrics.command_line",
    "metrics.resumable",
    "metrics.streamed",
    "training.inspection",
    "training.json_lines",
    "training.sharding",
    "training.shards",
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_lives_there_and_their_examples_run(name, tmp_path, monkeypatch):
    """Each in a folder of its own; at hand are the names of the package and of the module, torch, and `examples`."""
    module = importlib.import_module(name)
    assert module.__doc__
    names = {public: getattr(tarflow_hf, public) for public in tarflow_hf.__all__} | {"torch": torch}
    names |= {public: getattr(module, public) for public in getattr(module, "__all__", [])}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for index, test in enumerate(doctest.DocTestFinder(exclude_empty=True).find(module, globs=names)):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "examples").symlink_to(EXAMPLES)
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("module_name", [name for name in MODULES if name.removeprefix("tarflow_hf.") not in PLUMBING])
def test_public_classes_and_functions_have_an_example(module_name):
    """Of errors the name says enough."""
    module = importlib.import_module(module_name)
    public = {name: getattr(module, name) for name in getattr(module, "__all__", [])}
    errors = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Exception)}
    objects = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert [name for name in objects.keys() - errors if not has_example(objects[name])] == []


def has_example(value):
    """Whether a docstring has an example of which at least one line runs."""
    examples = doctest.DocTestParser().get_examples(value.__doc__ or "")
    return any(not example.options.get(doctest.SKIP) for example in examples)


def test_plumbing_names_modules_that_exist():
    assert {f"tarflow_hf.{name}" for name in PLUMBING} <= set(MODULES)

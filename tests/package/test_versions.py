"""What pyproject.toml says of dependencies: the versions are the tested ones, and each extra brings what it is for."""

import ast
import importlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tarflow_hf

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements():
    """Every direct dependency, of the package and of its extras."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]


def pins(name):
    """The versions that a constraints file pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(library): Version(version) for library, version in pairs}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_the_pinned_versions_are_allowed(name):
    pinned = pins(name)
    wrong = [
        str(needed) for needed in requirements() if pinned[canonicalize_name(needed.name)] not in needed.specifier
    ]
    assert wrong == []


def test_the_oldest_allowed_versions_are_the_ones_tested():
    oldest = pins("constraints-oldest.txt")
    for needed in requirements():
        lower_bounds = [Version(clause.version) for clause in needed.specifier if clause.operator == ">="]
        stubs = needed.name.startswith("types-")  # any version will do
        assert lower_bounds == ([] if stubs else [oldest[canonicalize_name(needed.name)]]), needed


def test_a_library_has_one_range_wherever_it_is_named():
    ranges = {}
    for needed in requirements():
        assert ranges.setdefault(needed.name, needed.specifier) == needed.specifier, needed.name


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == tarflow_hf.__version__


def imports_of(path):
    """The modules that a file imports as soon as it is imported itself."""
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    nodes += [inner for node in nodes if isinstance(node, ast.With) for inner in node.body]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def libraries_of(paths):
    """The libraries that files import, themselves or through the package."""
    seen, waiting, libraries = set(), [ROOT / path for path in paths], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for module in imports_of(path):
            place = ROOT / f"{module.replace('.', '/')}.py"
            if place.exists() and place not in seen:
                waiting.append(place)
            elif not module.startswith("tarflow_hf"):
                libraries.add(module.partition(".")[0])
    return libraries - sys.stdlib_module_names


SCRIPTS = {
    None: ["tarflow_hf/conversion/__main__.py", "tarflow_hf/flow/sampling/guidance.py", "examples/benchmark.py"],
    "train": ["examples/train.py", "examples/sample.py"],
    "eval": ["examples/evaluate.py", "examples/latents.py", "examples/sweep.py", "examples/sample.py"]
    + ["tarflow_hf/metrics/bits_per_dim.py", "tarflow_hf/metrics/frechet_distance.py"],
    "demo": ["examples/app.py"],
}


@pytest.mark.parametrize("extra", SCRIPTS)
def test_an_extra_alone_brings_what_its_scripts_import(extra):
    lines = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    brought = {canonicalize_name(Requirement(line).name) for line in lines}
    brought |= {"pyarrow"} if "datasets" in brought else set()  # which reads and writes its files with it
    brought |= {"fsspec", "pyyaml", "tqdm"}  # of huggingface_hub
    found = packages_distributions()
    missing = {
        name
        for name in libraries_of(SCRIPTS[extra])
        if not brought & {canonicalize_name(dist) for dist in found[name]}
    }
    assert missing == set()


@pytest.mark.parametrize(
    ("module", "library", "extras"),
    [
        ("images.sources", "datasets", "'tarflow_hf[train]' or 'tarflow_hf[eval]'"),
        ("images.batches", "datasets.distributed", "'tarflow_hf[train]' or 'tarflow_hf[eval]'"),
        ("images.plotting", "matplotlib.figure", "'tarflow_hf[train]' or 'tarflow_hf[eval]'"),
        ("metrics.distances", "scipy", "'tarflow_hf[eval]'"),
        ("metrics.streamed", "evaluate", "'tarflow_hf[eval]'"),
    ],
)
def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch, module, library, extras):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"tarflow_hf.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(f"tarflow_hf.{module}")
    assert str(raised.value).endswith(f": pip install {extras}")

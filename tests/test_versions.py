"""The versions that pyproject.toml allows are the versions that are tested: those of the two constraints files."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tarflow_hf

ROOT = Path(__file__).parent.parent
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

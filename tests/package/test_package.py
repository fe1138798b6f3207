"""The package as a whole: what importing it costs, the Auto classes, and its public names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import tarflow_hf


def run(code):
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_loads_neither_diffusers_nor_the_slow_parts_of_transformers():
    code = """
import sys, torch, transformers
before = set(sys.modules)
import tarflow_hf
print(len(set(sys.modules) - before), [name for name in sys.modules if name.startswith(("diffusers", "datasets"))])
"""
    new_modules, heavy = run(code).split(" ", 1)
    assert int(new_modules) < 10
    assert heavy == "[]"


def test_the_pipeline_loads_nothing_of_the_extras():
    code = """
import sys
from tarflow_hf import TarFlowPipeline
print({name.partition(".")[0] for name in sys.modules} & {"datasets", "evaluate", "gradio", "matplotlib", "sklearn"})
"""
    assert run(code) == "set()"


@pytest.mark.parametrize(
    ("first", "package_first"),
    [
        ("import transformers.modeling_layers", True),
        ("from transformers import AutoModel, AutoConfig", False),
        ("from diffusers import DiffusionPipeline", True),
        ("import tarflow_hf.flow.blocks", True),
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(tmp_path, first, package_first):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    imports = ["import tarflow_hf", first]
    code = "\n".join(imports if package_first else imports[::-1])
    code += f"""
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained({str(tmp_path)!r})
model = AutoModel.from_pretrained({str(tmp_path)!r})
print(type(config) is tarflow_hf.TarFlowConfig, type(model) is tarflow_hf.TarFlowModel)
"""
    assert run(code) == "True True"


def test_public_names_can_be_had_and_others_not():
    assert set(tarflow_hf.__all__) <= set(dir(tarflow_hf))
    for name in tarflow_hf.__all__:
        assert getattr(tarflow_hf, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'TarFlow'"):
        tarflow_hf.TarFlow  # noqa: B018


ROOT = Path(tarflow_hf.__file__).parents[1]


def lint_imports(folder):
    """What import-linter says of the package in a folder, by the contracts of pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_imports_point_one_way():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "wrong", "sentence"),
    [
        (
            "flow/likelihood.py",
            "from tarflow_hf.training.ema import ExponentialMovingAverage",
            "tarflow_hf.flow is not allowed to import tarflow_hf.training",
        ),
        (
            "flow/noise.py",
            "def late():\n    from tarflow_hf.flow.sampling.guidance import Guidance",
            "tarflow_hf.flow.noise is not allowed to import tarflow_hf.flow.sampling",
        ),
        (
            "metrics/distances.py",
            "import tarflow_hf.training.log",
            "tarflow_hf.metrics is not allowed to import tarflow_hf.training",
        ),
    ],
)
def test_an_import_back_up_names_both_rooms(tmp_path, file, wrong, sentence):
    shutil.copytree(ROOT / "tarflow_hf", tmp_path / "tarflow_hf", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "tarflow_hf" / file).open("a") as module:
        module.write(f"\n{wrong}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert sentence in done.stdout

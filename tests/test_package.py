"""The package as a whole: what importing it costs, the Auto classes, and its public names."""

import subprocess
import sys

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


@pytest.mark.parametrize(
    ("first", "package_first"),
    [
        ("import transformers.modeling_layers", True),
        ("from transformers import AutoModel, AutoConfig", False),
        ("from diffusers import DiffusionPipeline", True),
        ("import tarflow_hf.blocks", True),
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

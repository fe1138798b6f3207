"""The package as a whole: what importing it costs, the Auto classes, and its public names."""

import ast
import graphlib
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


ROOT = Path(tarflow_hf.__file__).parent


def imports_of(path):
    """The package's modules that a file imports when it is imported itself."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
    absolute = {node.module.removeprefix("tarflow_hf.") for node in nodes if node.module.startswith("tarflow_hf.")}
    return absolute | {node.module for node in nodes if node.level == 1}


def test_imports_point_one_way():
    paths = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")}
    graph = {name: imports_of(path) for name, path in paths.items() if path.name != "__init__.py"}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    needed = {"pipeline_tarflow"}
    for name in reversed(order):
        if name in needed:
            needed |= graph[name]
    on_top = {"conversion", "training", "training_arguments", "data", "batches", "plotting", "posterior", "recipes"}
    assert needed.isdisjoint(on_top)
    assert not [name for name in needed if name.startswith("metrics")]
    leaves = ("decoding", "denoising", "guidance", "image_processing", "likelihood", "noise", "windows", "kv_cache")
    assert {name: graph[name] for name in leaves if graph[name] - {"windows"}} == {}
    assert not [name for name in graph if not name.startswith("metrics") and any("metrics" in n for n in graph[name])]

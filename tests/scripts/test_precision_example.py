"""examples/precision.py: what narrower numbers cost. Its quantised rows are measured where their libraries are."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from examples import precision
from tarflow_hf import TarFlowPipeline

DIGITS = Path(__file__).parents[2] / "examples" / "data" / "digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision") / "model"
    wide = {"hidden_size": 64, "num_classes": 10}  # the kernels of bitsandbytes take 32 rows at a time
    TarFlowPipeline(tiny_model(dtype=torch.float32, **wide)).save_pretrained(folder)
    return folder


def rows(folder, *numbers):
    images = ["--num_images", "6", "--num_samples", "4", "--num_workers", "0"]
    precision.main([str(folder), "--data", str(DIGITS), *images, "--numbers", *numbers])
    return json.loads((folder / "evaluation" / "precision.json").read_text())


def test_narrower_numbers_are_measured_beside_float32(folder, capsys):
    found = rows(folder, "float32", "autocast", "bfloat16")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| float32", "| autocast", "| bfloat16"]
    exact, autocast, narrow = (found[name] for name in ("float32", "autocast", "bfloat16"))
    assert (exact["mean_change"], exact["largest_change"], exact["levels_changed"]) == (0, 0, 0)
    assert exact["round_trip"] < 1e-5
    assert 0 < autocast["largest_change"] < 0.05
    assert 0 < narrow["samples_rms"] < 0.1
    assert narrow["megabytes"] < 0.7 * exact["megabytes"]
    assert narrow["bits_per_dim"] == pytest.approx(exact["bits_per_dim"] + narrow["mean_change"], abs=1e-5)


@pytest.mark.parametrize(("name", "library", "most"), [("int8", "torchao", 0.5), ("nf4", "bitsandbytes", 1.5)])
def test_quantised_models_are_saved_loaded_and_measured_or_their_library_is_named(name, library, most, folder):
    if importlib.util.find_spec(library) is None:
        with pytest.raises(ModuleNotFoundError, match=rf"{library}.*pip install 'tarflow_hf\[quant\]'"):
            rows(folder, name)
        return
    row = rows(folder, name)[name]
    assert 0 < row["largest_change"] < most
    assert row["round_trip"] < 1e-4

"""Conditions of images: strips are made with theirs, samples are measured, and a posterior is drawn."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from examples import posterior
from examples.data import photo_strips
from tarflow_hf import TarFlowModel, TarFlowPipeline
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data

DIGITS = Path(photo_strips.__file__).parent / "digits"


@pytest.fixture
def strips(tmp_path):
    """Four strips of each of five photographs and split, with a rest on the right and below."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "photographs" / split).mkdir(parents=True)
        for number in range(5):
            levels = random.integers(0, 256, (40, 70, 3), dtype=np.uint8) // (number + 1)
            Image.fromarray(levels).save(tmp_path / "photographs" / split / f"{number}.png")
    photo_strips.main(["make", str(tmp_path / "photographs"), str(tmp_path / "strips")])
    return tmp_path / "strips"


def strips_model(folder, strips):
    """A tiny pipeline, untrained, for the strips and their condition."""
    where = DataArguments(data=str(strips), condition_columns=photo_strips.COLUMNS)
    data, _ = load_image_data(where, class_conditional=False)
    shape = {"image_size": (16, 32), "num_channels": 3, "patch_size": 8, "num_classes": 0}
    torch.manual_seed(0)
    model = TarFlowModel(tiny_config(**shape, **data.condition))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    TarFlowPipeline(model).save_pretrained(folder)
    return str(folder)


def test_strips_are_parts_of_their_photographs_with_what_they_measure(strips):
    rows = datasets.load_dataset("parquet", data_files=str(strips / "test.parquet"))["train"]
    assert len(rows) == 5 * 4
    with Image.open(strips.parent / "photographs" / "test" / "0.png") as photograph:
        strip = np.asarray(photograph)[16:32, 32:64]
    assert np.array_equal(np.asarray(rows[3]["image"]), strip)
    assert rows[3]["brightness"] == pytest.approx(strip.mean() / 255, abs=1e-6)
    assert rows[3]["contrast"] == pytest.approx(strip.std() / 255, abs=1e-6)


def test_photographs_smaller_than_a_strip_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no image of .*digits, split train, has the 16 x 32 pixels"):
        photo_strips.main(["make", str(DIGITS), str(tmp_path)])


def test_samples_are_measured_against_what_was_asked_for(strips, tmp_path, capsys):
    model = strips_model(tmp_path / "model", strips)
    options = ["--data", str(strips), "--num_samples", "6", "--guidance_scale", "1", "3"]
    photo_strips.main(["measure", model, *options, "--picture", str(tmp_path / "grid.png")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("guidance")] == [
        f"guidance {scale}, {column}" for scale in (1, 3) for column in photo_strips.COLUMNS
    ]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 5 * 32


def test_a_posterior_is_drawn_and_its_intervals_are_counted(strips, tmp_path, capsys):
    model = strips_model(tmp_path / "model", strips)
    options = ["--data", str(strips), "--num_images", "6", "--grid", "9"]
    posterior.main([model, *options, "--vary", "contrast", "--output", str(tmp_path / "p.png")])
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("temperature")]
    assert "of 6 true values are in the 90% interval" in first
    assert "of 3 true values" in second
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"
    with pytest.raises(ValueError, match="vary must be one of .*, brightness, contrast, got 'slant'"):
        posterior.main([model, *options, "--vary", "slant"])

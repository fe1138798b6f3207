"""examples/train.py on data of other kinds than the embedded digits."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from png_files import BOMB
from safetensors.torch import load_file
from training_runs import Run

from tarflow_hf import TarFlowPipeline

WEIGHTS = "transformer/model.safetensors"
COLOUR = {"num_channels": 3, "max_steps": 3, "warmup_epochs": "null", "eval_split": "null", "eval_every": "null"}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def photographs(count):
    shape = (count, 12, 10, 3)
    return [Image.fromarray(levels) for levels in np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)]


@pytest.fixture
def damaged(tmp_path):
    """Ten rows: the fourth is a decompression bomb, the seventh no image."""
    cells = photographs(10)
    cells[3], cells[6] = {"bytes": BOMB, "path": None}, {"bytes": b"nothing", "path": None}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "damaged.parquet")
    return tmp_path / "damaged.parquet"


def test_a_stream_trains_too(tmp_path):
    options = {"streaming": True, "max_steps": 3, "warmup_epochs": "null", "class_conditional": False}
    options |= {"checkpoint_every": 1, "num_workers": 2}
    run = Run(tmp_path / "run", **options).finish()
    assert "a stream of images, 0 classes" in run.log.read_text()
    assert len(metrics(run.folder)) == 4
    shutil.rmtree(run.folder / "checkpoints" / "step-00000003")  # as if it had been killed after step 2
    before = {name: tensor.clone() for name, tensor in load_file(run.folder / WEIGHTS).items()}
    again = load_file(Run(run.folder, **options).finish().folder / WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_a_folder_of_colour_photographs_gives_a_pipeline_with_its_classes(tmp_path):
    for index, image in enumerate(photographs(16)):
        path = tmp_path / "photographs" / ["lynx", "tabby"][index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    run = Run(tmp_path / "run", data=tmp_path / "photographs", num_workers=2, **COLOUR).finish()
    pipe = TarFlowPipeline.from_pretrained(run.folder)
    assert pipe.transformer.config.id2label == {0: "lynx", 1: "tabby"}
    assert pipe.config.guidance_scale == 2.0
    assert all("validation_bits_per_dim" not in row for row in metrics(run.folder))


def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, damaged):
    run = Run(tmp_path / "run", data=damaged, class_conditional=False, num_workers=2, **COLOUR)
    assert run.join() == [1]
    assert re.search(f"cannot read the image in row [36] of data set '{damaged}'", run.log.read_text())


def test_an_unreadable_image_may_be_replaced_and_is_counted(tmp_path, damaged):
    options = {"skip_bad_images": True, "class_conditional": False, "max_steps": 4, "num_workers": 2}
    run = Run(tmp_path / "run", data=damaged, **(COLOUR | options)).finish()
    counts = [row["skipped_images"] for row in metrics(run.folder)]
    assert counts == sorted(counts)
    assert 1 <= counts[-1] <= 8  # a batch of 8 leaves 2 of the 10 rows out of each epoch of a step
    rows = re.findall(r"unreadable images in rows \[(.*)\] of", run.log.read_text())
    assert {"3", "6"} == {row for found in rows for row in found.split(", ")}
    assert f"{counts[-1]} images replaced" in run.log.read_text()


def test_a_contradiction_or_unknown_option_ends_the_run_before_it_begins(tmp_path):
    for options, message in (
        ({"image_size": 9}, "image_size=9 must be a multiple of patch_size=2"),
        ({"image_sise": 9}, "unrecognized arguments: --image_sise"),
        ({"batch_size": 2000}, "batch_size=2000 must not be larger than the data set of 1500 images"),
        ({"label_column": "digit"}, "no column 'digit', found columns ['image', 'label']"),
    ):
        run = Run(tmp_path / "run", **options)
        assert run.join() != [0]
        assert message in run.log.read_text()
    assert not (tmp_path / "run").exists()

"""The benchmark runs from end to end, and what it counts as peak memory is what splitting a batch bounds."""

import json
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import random_latents, tiny_model
from PIL import Image

from examples import benchmark_table
from examples.benchmark import main
from tarflow_hf import Guidance
from tarflow_hf.images import batches
from tarflow_hf.training.input_speed import input_speed
from tarflow_hf.training.peak_memory import PeakMemory
from tarflow_hf.training.recipes import parse_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = EXAMPLES / "recipes" / "digits.yaml"
DIGITS = EXAMPLES / "data" / "digits"


@pytest.mark.parametrize("mode", ["sampling", "training"])
def test_the_benchmark_writes_a_table_and_a_report(tmp_path, capsys, mode):
    main([mode, "--size", "digits", "--batch_size", "2", "--rounds", "2", "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    names = [row["name"] for row in report["results"]]
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    assert names == (["sequential", "windowed"] if mode == "sampling" else ["tarflow_hf"])
    for row in report["results"]:
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["peak_bytes"] > 0
        assert 0 < row["share_of_matrix_rate"] < 1
    if mode == "sampling":
        sequential, windowed = report["results"]
        assert sequential["sweeps_per_block"] == [15] * 4
        assert max(windowed["sweeps_per_block"]) <= 15
        assert sequential["max_error"] == 0
        assert windowed["max_level_difference"] <= 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler, when first imported
def test_a_table_has_a_row_for_each_batch_and_contender(tmp_path):
    options = ["--size", "digits", "--batch_sizes", "1", "--sides", "4", "--rounds", "1"]
    benchmark_table.main([*options, "--output", str(tmp_path / "table.md"), "--plot", str(tmp_path / "lengths.png")])
    with Image.open(tmp_path / "lengths.png") as plot:
        assert plot.size == (800, 500)
    machine, batches, lengths = (tmp_path / "table.md").read_text().strip().split("\n\n")
    assert torch.__version__ in machine
    head, _, *rows = batches.splitlines()
    assert "| windowed compiled |" in head
    assert [row.split(" | ")[0] for row in rows] == ["| 1"]
    assert all(row.count("x (") == 3 for row in rows)
    assert [row.split(" | ")[0] for row in lengths.splitlines()[2:]] == [
        "| sequential",
        "| windowed",
        "| sequential compiled",
        "| windowed compiled",
    ]


def test_the_exponent_is_that_of_a_power():
    assert benchmark_table.exponent([16, 64, 256], [0.5 * 16**1.5, 0.5 * 64**1.5, 0.5 * 256**1.5]) == "1.50"
    assert benchmark_table.exponent([16], [1.0]) == "-"


def test_a_wrong_reference_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no transformer_flow.py there"):
        main(["sampling", "--reference", str(tmp_path)])


def test_peak_memory_counts_what_lives_at_one_time():
    with PeakMemory() as memory:
        for _ in range(3):
            block = torch.zeros(1000, 256)
            del block
        kept = [torch.zeros(1000, 256), torch.zeros(1000, 256)]
    assert len(kept) * 1_024_000 <= memory.peak < 2.1 * 1_024_000


def test_splitting_the_batch_bounds_the_memory_of_decoding():
    model = tiny_model(dtype=torch.float32, num_blocks=2, layers_per_block=1, hidden_size=64)
    latents = random_latents(model, 32)

    def peak(latents, **arguments):
        with PeakMemory() as memory:
            model.decode(latents, guidance=Guidance(2.0, "linear", 0.5), window=8, tolerance=1.0, **arguments)
        return memory.peak

    a_part, its_latents = peak(latents[:4]), 6 * latents.nbytes
    assert peak(latents, max_batch=4) < a_part + its_latents
    assert peak(latents) > 3 * (a_part + its_latents)


def row_of(images_per_second):
    return json.dumps({"step": 1, "images_per_second": images_per_second}) + "\n"


def digits_as_files(folder):
    """The first 40 digits as pictures of 64 x 64 pixels, so that reading them takes some time."""
    rows = datasets.load_dataset("parquet", data_files=str(DIGITS / "train.parquet"))["train"]
    for index, row in enumerate(rows.select(range(40))):
        row["image"].resize((64, 64)).save(folder / f"{index}.png")


def test_the_input_alone_is_timed_through_the_loader_of_the_trainer(tmp_path, monkeypatch, capsys):
    """A slower decoder is a slower input, and a run that trains as fast as its input comes waits for it."""
    digits_as_files(tmp_path)
    options = [
        "--data",
        str(tmp_path),
        "--class_conditional",
        "false",
        "--cache_images",
        "false",
        "--eval_split",
        "null",
    ]
    options += ["--rounds", "3", "--steps", "4", "--batch_size", "8"]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    (tmp_path / "timing.jsonl").write_text(row_of(0.01) + row_of(0.02))
    main(["input", *options, "--metrics", str(metrics)])
    text = capsys.readouterr().out
    assert "in 3 rounds" in text
    assert "training: 0.015 images/s (0.01 to 0.02 in 2 lines)" in text
    assert "does not wait for it" in text
    (tmp_path / "timing.jsonl").write_text(row_of(1e9))
    main(["input", *options, "--metrics", str(metrics)])
    assert "which waits for it: try more num_workers" in capsys.readouterr().out
    arguments = parse_arguments(options[: options.index("--rounds")] + ["--batch_size", "8"], default_recipe=RECIPE)
    slow = batches.preprocess_image
    monkeypatch.setattr(batches, "preprocess_image", lambda *image: time.sleep(0.01) or slow(*image))
    assert max(input_speed(arguments, rounds=2, steps=2).rates) <= 100  # 8 images of a step rest 0.08 s

"""The tools around evaluation: the sweep of sampling settings, the progress of a training run, the latents."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_model
from PIL import Image
from test_evaluate import DISTANCE

from examples import evaluate, latents, progress, sweep, train
from examples.data.digits_classifier import DIGITS, load_digits_split
from tarflow_hf import TarFlowPipeline
from tarflow_hf.training.checkpoints import complete_checkpoints

EXTRACTOR = DISTANCE[2:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training run on the digits with three checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    recipe = {
        "data": str(DIGITS),
        "eval_split": "test",
        "horizontal_flip": False,
        "cache_images": True,
        "num_workers": 0,
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "hidden_size": 64,
        "head_dim": 32,
        "num_blocks": 3,
        "layers_per_block": 1,
        "noise_std": 0.1,
        "batch_size": 64,
        "max_steps": 300,
        "learning_rate": 3e-3,
        "checkpoint_every": 20,
        "keep_checkpoints": 20,
        "sample_columns": 1,
        "output_dir": str(folder),
    }
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train.main([str(path)])
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        if checkpoint.name not in ("step-00000020", "step-00000060", "step-00000300"):
            shutil.rmtree(checkpoint)
    return folder


def size_of(path):
    with Image.open(path) as image:
        return image.size


def levels_of(path):
    with Image.open(path) as image:
        return np.array(image.convert("L"))


def read_csv(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_distance_and_bits_fall_over_a_training_run(run, tmp_path):
    options = [*EXTRACTOR, "--num_samples", "200", "--num_images", "200", "--statistics_cache", str(tmp_path)]
    progress.main([str(run), *options])
    rows = read_csv(run / "evaluation" / "progress.csv")
    assert [row["step"] for row in rows] == [20, 60, 300]
    for name in ("frechet_distance", "bits_per_dim"):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=True), name
    for name in ("distance", "bits_per_dim"):
        assert size_of(run / "evaluation" / f"progress_{name}.png") == (800, 500)


def test_a_trained_model_classifies_and_labels_help(run, tmp_path):
    options = ["--classify", "--output_dir", str(tmp_path)]
    evaluate.main([str(run), "--data", str(DIGITS), *options])
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert measured["bits_per_dim_with_labels"]["value"] < measured["bits_per_dim"]["value"] < 8
    assert measured["accuracy"]["value"] > 0.2  # 300 steps: well above chance
    assert size_of(tmp_path / "calibration.png") == (500, 500)


def test_a_sweep_writes_table_plot_and_the_best_as_defaults(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "evaluation"))
    values = ["--guidance_scale", "1", "2", "--denoising_strength", "0", "--temperature", "0.8", "1"]
    options = ["--num_samples", "40", "--num_images", "60", "--output_dir", str(tmp_path), "--write_defaults"]
    cache = ["--statistics_cache", str(tmp_path / "cache")]
    sweep.main([str(folder), "--data", str(DIGITS), *EXTRACTOR, *values, *options, *cache])
    rows = read_csv(tmp_path / "sweep.csv")
    assert sorted((row["guidance_scale"], row["temperature"]) for row in rows) == [
        (1, 0.8),
        (1, 1),
        (2, 0.8),
        (2, 1),
    ]
    distances = [row["frechet_distance"] for row in rows]
    assert distances == sorted(distances)
    assert len(set(distances)) == 4
    assert size_of(tmp_path / "sweep.png") == (800, 500)
    config = TarFlowPipeline.from_pretrained(folder).config
    assert {name: config[name] for name in sweep.SETTINGS} == {name: rows[0][name] for name in sweep.SETTINGS}


def test_samples_take_the_classes_of_the_data_as_often_as_it_has_them(run, tmp_path):
    levels, labels = load_digits_split("test")
    for digit, count in ((3, 24), (7, 8)):
        for index, image in enumerate(levels[labels == digit][:count]):
            folder = tmp_path / "data" / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    options = [*EXTRACTOR, "--num_samples", "80", "--statistics_cache", str(tmp_path / "cache"), "--split", "train"]
    options += ["--output_dir", str(tmp_path), "--metrics", "frechet_distance", "--save_samples", "npz"]
    evaluate.main([str(run), "--data", str(tmp_path / "data"), *options, "--sample_labels", "data"])
    drawn = np.bincount(np.load(tmp_path / "samples.npz")["arr_1"], minlength=10)
    assert set(np.flatnonzero(drawn)) == {3, 7}
    assert 48 <= drawn[3] <= 70  # of 80 with probability 3/4: within three deviations


def test_a_setting_without_finite_samples_loses_nothing_else(tmp_path, capsys):
    model = tiny_model(dtype=torch.float32, num_classes=10)
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.bias.add_(60.0)  # guidance leaves it alone; sampling overflows
    TarFlowPipeline(transformer=model, denoising_strength=0.0).save_pretrained(tmp_path / "model")
    options = ["--num_samples", "40", "--num_images", "60", "--output_dir", str(tmp_path), "--guidance_scale", "1"]
    arguments = [str(tmp_path / "model"), "--data", str(DIGITS), *EXTRACTOR, *options]
    with pytest.raises(ValueError, match="the defaults stay as they are"):
        sweep.main([*arguments, "--write_defaults", "--statistics_cache", str(tmp_path / "cache")])
    assert np.isnan(read_csv(tmp_path / "sweep.csv")[0]["frechet_distance"])
    assert "of 40 samples are not finite" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight digits as PNG files, and a picture that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, levels in enumerate(load_digits_split("test")[0][:8]):
        Image.fromarray(levels[0].numpy()).save(folder / f"digit{index}.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    return folder


def test_inverted_images_decode_to_themselves(run):
    pipe = TarFlowPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    levels, labels = (values[:32] for values in load_digits_split("test"))
    images = levels.float() / 127.5 - 1
    for given in (None, labels):
        latents = pipe.invert(images, given)
        call = {"latents": latents, "guidance_scale": 1.0, "denoising_strength": 0.0, "output_type": "latent"}
        decoded = pipe(given, **call).images
        assert (decoded - images).square().mean().sqrt() < 1e-4


def test_the_strip_runs_from_one_image_to_the_other(run, pictures, tmp_path):
    ends = [pictures / "digit0.png", pictures / "digit1.png"]
    strip = tmp_path / "strip.png"
    latents.main(
        ["interpolate", str(run), *map(str, ends), "--steps", "5", "--output", str(strip), "--class_label", "3"]
    )
    sheet = levels_of(strip)
    side, gap = 64, 2
    cells = [sheet[4:side:8, start + 4 : start + side : 8] for start in range(0, 5 * (side + gap), side + gap)]
    for cell, path in zip((cells[0], cells[-1]), ends, strict=True):
        assert np.abs(cell.astype(int) - levels_of(path)).max() <= 1
    assert np.abs(cells[2].astype(int) - cells[0]).max() > 30


def test_slerp_stays_on_the_circle():
    first, second = torch.randn(2, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    second = second * first.norm() / second.norm()
    points = latents.slerp(first, second, 7)
    torch.testing.assert_close(points.flatten(1).norm(dim=1), first.norm().expand(7))
    torch.testing.assert_close(points[[0, -1]], torch.stack([first, second]))
    steps = points.diff(dim=0).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(6))
    torch.testing.assert_close(latents.slerp(first, 3 * first, 3)[1], 2 * first)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        latents.slerp(first, second, 1)


def test_ranking_finds_the_picture_that_is_no_digit(run, pictures, tmp_path):
    options = ["--data", str(pictures), "--split", "train", "--ignore_labels", "--output_dir", str(tmp_path)]
    latents.main(["rank", str(run), *options, "--columns", "4"])
    with (tmp_path / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert rows[-1]["image"].endswith("noise.png")
    bits = [float(row["bits_per_dim"]) for row in rows]
    assert bits == sorted(bits)
    width, height = size_of(tmp_path / "ranking.png")
    assert (width > 4 * 66, height) == (True, 2 * 66)  # two rows of four, and their names

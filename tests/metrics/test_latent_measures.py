"""Pipelines with an autoencoder in the measuring examples: images in the autoencoder's size, densities of latents."""

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import tiny_model
from images.test_latents import tiny_vae
from PIL import Image
from test_evaluate import DISTANCE, measure

from examples import app, benchmark, latents, progress, sample
from examples.data.digits_classifier import DIGITS, load_digits_split
from examples.train import main as train
from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.images.latents import encode_moments
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.metrics.likelihood import density_summary, flow_draws, item_generator, unit_of
from tarflow_hf.metrics.measure import Workplace, start_processes
from tarflow_hf.metrics.samples import SampleSettings, draw_samples
from tarflow_hf.metrics.statistics import Moments


@pytest.fixture(scope="module")
def pipe():
    """Digits of 8x8 pixels by 4x4 latents of 2 channels, with random weights."""
    names = {index: str(index) for index in range(10)}
    model = tiny_model(
        dtype=torch.float32, image_size=4, num_channels=2, num_classes=10, id2label=names, noise_std=0.3
    )
    pipe = TarFlowPipeline(model, vae=tiny_vae("tiny", scaling_factor=0.7), denoising_strength=0.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "latent-digits"
    pipe.save_pretrained(folder)
    return folder


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def test_a_pipeline_of_latents_is_evaluated_from_end_to_end(pipe, folder, tmp_path):
    """Likelihood, classes and distances; the density against the sum over a normal noise written out here."""
    cache = ["--statistics_cache", tmp_path / "cache"]
    metrics = ["--metrics", "bits_per_dim", *DISTANCE[1:], "--classify", "--save_samples", "npz"]
    measured = measure(folder, tmp_path, *metrics, "--num_noise_draws", 2, "--seed", 5, *cache)
    assert not any("bits" in name for name in measured)
    assert {"latent_nats_per_dim", "latent_nats_per_dim_with_labels", "accuracy", "FD-digits_classifier"} <= set(
        measured
    )

    levels, labels = (values[:70] for values in load_digits_split("test"))
    means, _ = encode_moments(pipe.vae, to_pixel_values(levels))
    noise = []
    for index in range(70):
        generator = item_generator(5, index)
        noise.append(torch.stack([torch.randn(2, 4, 4, generator=generator) for _ in range(2)]))
    noisy = means[:, None] + 0.3 * torch.stack(noise)
    log_prob = torch.stack([pipe.transformer.log_prob(noisy[:, draw], labels) for draw in range(2)]).mean(0)
    table = pyarrow.parquet.read_table(tmp_path / "per_image.parquet").to_pydict()
    found = table["latent_nats_per_dim_with_labels"]
    np.testing.assert_allclose(found, -log_prob / 32, rtol=1e-4)
    entry = measured["latent_nats_per_dim_with_labels"]
    assert entry["value"] == pytest.approx(np.mean(found), rel=1e-9)
    assert entry["standard_error"] == pytest.approx(np.std(found, ddof=1) / 70**0.5, rel=1e-9)

    with np.load(tmp_path / "samples.npz") as file:
        images, asked = file["arr_0"], file["arr_1"]
    assert images.shape == (50, 8, 8, 3)
    generators = [item_generator(5, index) for index in range(3)]
    expected = pipe(asked[:3].tolist(), generator=generators).images
    assert all(abs(np.array(e, int) - image[..., 0]).max() <= 1 for e, image in zip(expected, images[:3], strict=True))


def test_samples_that_are_not_finite_are_told_apart_behind_an_autoencoder(pipe):
    latents = torch.zeros(2, 2, 4, 4)
    latents[1] = torch.nan

    class Broken(TarFlowPipeline):
        def __call__(self, *arguments, **options):
            return (latents,)

    found = draw_samples(Broken(pipe.transformer, vae=pipe.vae), range(2), SampleSettings())
    assert found["finite"].tolist() == [True, False]
    assert found["images"].shape == (2, 8, 8, 1)


def test_work_of_another_autoencoder_is_not_taken_up(pipe, tmp_path):
    other = tiny_vae("tiny", scaling_factor=0.6)
    pipes = [
        pipe,
        TarFlowPipeline(pipe.transformer, vae=other),
        TarFlowPipeline(pipe.transformer, vae=other, image_size=7),
    ]
    state = start_processes()
    folders = {Workplace(each, state, tmp_path, 8).open("samples", 8, {}).folder for each in pipes}
    assert len(folders) == 3 or len({tuple(sorted(folder.iterdir())) for folder in folders}) == 3


def test_the_unit_says_what_it_is_of(pipe):
    unit, log_prob = unit_of(pipe), np.array([[-32.0], [-64.0]])
    found = density_summary(Moments.of(log_prob), unit)
    assert found == {"latent_nats_per_dim": 1.5, "num_samples": 2, "standard_error": 0.5}
    assert density_summary(Moments.of(log_prob[:1]), DensityUnit(32)).keys() == {"bits_per_dim", "num_samples"}
    assert "bit" not in unit.text + unit.name


def test_images_are_ranked_by_the_density_of_their_latents(folder, tmp_path):
    latents.main(["rank", str(folder), "--data", str(DIGITS), "--num_images", "9", "--output_dir", str(tmp_path)])
    rows = read_csv(tmp_path / "ranking.csv")
    assert list(rows[0]) == ["rank", "row", "image", "latent_nats_per_dim"]
    values = [float(row["latent_nats_per_dim"]) for row in rows]
    assert values == sorted(values)
    assert len(values) == 9


def test_a_trace_and_a_benchmark_show_what_the_autoencoder_makes_of_latents(folder, tmp_path, capsys):
    options = ["--num_images_per_label", "1", "--class_labels", "3", "8", "--output", str(tmp_path / "samples.png")]
    sample.main([str(folder), *options, "--trace", str(tmp_path / "trace.png")])
    with Image.open(tmp_path / "trace.png") as sheet:
        assert sheet.width > sheet.height
    benchmark.main(["sampling", "--model", str(folder), "--rounds", "1", "--batch_size", "2"])
    assert "sequential" in capsys.readouterr().out
    contender = benchmark.Contender("same", lambda number: torch.zeros(0))
    arguments = benchmark.parse_arguments(["sampling", "--rounds", "1", "--batch_size", "2", "--device", "cpu"])
    pipe = TarFlowPipeline.from_pretrained(folder)
    numbers = benchmark.round_latents(0, arguments, pipe.transformer.config)
    contender.results = [
        pipe.transformer.decode(numbers, torch.tensor([0, 1]), guidance=benchmark.Guidance(2.0), window=1)
    ]
    benchmark.compare_images([contender], arguments, pipe)
    assert contender.notes["identical_levels"] == 1.0
    contender.results = [contender.results[0] + 0.1]  # in latents: decoded it is another number
    benchmark.compare_images([contender], arguments, pipe)
    assert contender.notes["rms_error"] != pytest.approx(0.1, rel=1e-3)


def test_the_progress_of_a_run_on_latents(pipe, tmp_path):
    pipe.vae.save_pretrained(tmp_path / "vae")
    recipe = {
        "data": DIGITS,
        "eval_split": "test",
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "noise_std": 0.3,
    }
    recipe |= {"vae": tmp_path / "vae", "hidden_size": 64, "num_blocks": 2, "layers_per_block": 1, "max_steps": 2}
    recipe |= {
        "batch_size": 8,
        "checkpoint_every": 2,
        "eval_images": 8,
        "output_dir": tmp_path / "run",
        "num_workers": 0,
    }
    train([text for name, value in recipe.items() for text in (f"--{name}", str(value))])
    options = [*DISTANCE[2:], "--num_samples", "40", "--num_images", "40", "--statistics_cache", str(tmp_path)]
    progress.main([str(tmp_path / "run"), *options])
    (row,) = read_csv(tmp_path / "run/evaluation/progress.csv")
    assert list(row) == ["step", "latent_nats_per_dim", "frechet_distance"]
    assert (tmp_path / "run/evaluation/progress_latent_nats_per_dim.png").is_file()


def test_the_demo_draws_and_measures_images_of_latents(pipe, folder):
    names = app.controls(str(folder))
    assert names[1]["value"].startswith("8x8 grey images, 10 classes, 3 blocks")
    assert "on the latents of an autoencoder" in names[1]["value"]
    states = list(app.stream(app.load(str(folder)), [3, 8], range(2), 1.5, 0.0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = pipe([3, 8], generator=generators, guidance_scale=1.5, denoising_strength=0.0).images
    assert [image.size for _, images in states for image in images] == [(8, 8)] * 2 * len(states)
    assert all(np.array_equal(found, image) for found, image in zip(states[-1][1], expected, strict=True))
    log_prob, values = app.measure(pipe, expected, [3, 8])
    levels = torch.stack([torch.from_numpy(np.array(image))[None] for image in expected])
    draws = flow_draws(pipe, levels, [0, 0], app.NOISE_DRAWS, seed=0)
    with torch.no_grad():
        right = torch.stack([pipe.transformer.log_prob(draw, torch.tensor([3, 8])) for draw in draws]).mean(0)
    torch.testing.assert_close(log_prob, right.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values, -log_prob / 32)
    last = list(app.generate(str(folder), str(folder), 3, 1.0, 0.0, 1, 0))[-1]
    assert "nats/dim" in last
    assert "bits/dim" not in last


def test_the_demo_finds_the_models_of_the_showcase(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "SHOWCASE", tmp_path)
    assert app.showcase() == {}
    for name in ("shoes", "hats"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({}))
    (tmp_path / "empty").mkdir()
    assert app.showcase() == {"hats": str(tmp_path / "hats"), "shoes": str(tmp_path / "shoes")}


@torch.no_grad()
def test_latents_of_a_flow_that_knows_noise_levels_have_a_density(pipe):
    flow = tiny_model(
        dtype=torch.float32,
        image_size=4,
        num_channels=2,
        num_classes=10,
        noise_conditioning=True,
        noise_range=(0.1, 0.3),
    )
    own = TarFlowPipeline(flow, vae=pipe.vae, denoising_strength=0.0)
    images = load_digits_split("test")[0][:3] / 127.5 - 1
    levels = torch.full((3,), 0.1)
    expected = flow.log_prob(own._flow_input(images), torch.tensor([1, 2, 3]), levels)
    torch.testing.assert_close(own.latent_log_prob(images, [1, 2, 3]), expected)

"""Runs on arrays, from a file to samples in the units of the data, and what is said of their density."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import Run, kill_and_restart, outcome, weights

from examples import evaluate, latents, sample
from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.flow.noise import augment
from tarflow_hf.images.arrays import to_model_units
from tarflow_hf.metrics.likelihood import item_generator

SHAPE = {
    "array_layout": "chw",
    "horizontal_flip": False,
    "image_size": "[6, 8]",
    "num_channels": 2,
    "noise_std": 0.2,
    "class_conditional": False,
    "eval_split": "train",
    "max_steps": 12,
    "eval_every": 6,
    "sample_every": 50,
}


def waves(seed, number=40):
    """(number, 2, 6, 8): waves of random phases, and their slopes."""
    chance = np.random.default_rng(seed)
    phases = chance.uniform(0, 2 * np.pi, (number, 1, 1))
    rows, columns = np.mgrid[:6, :8]
    angle = rows / 2 + columns / 3 + phases
    return np.stack([np.sin(angle), np.cos(angle) * 0.3], axis=1) + chance.normal(0, 0.05, (number, 2, 6, 8))


def data(folder, factor=1.0, offset=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in (("train", 0), ("held_out", 1)):
        np.save(folder / f"{name}.npy", waves(seed) * factor + offset)
    return {"data": folder / "train.npy", "eval_data": folder / "held_out.npy"}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    Run(folder / "run", **data(folder / "data"), **SHAPE).finish()
    return folder / "run"


def test_a_run_tells_nats_in_the_units_of_the_data(run, tmp_path):
    """The same data in other units give the same model, and a density that differs by the logarithm of the factor."""
    Run(tmp_path / "run", **data(tmp_path / "data", factor=50.0, offset=-300.0), **SHAPE).finish()
    ours, theirs = metrics(run), metrics(tmp_path / "run")
    assert not any("bits" in name for row in ours for name in row)
    for name in ("nats_per_dim", "validation_nats_per_dim"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in a]
        assert len(pairs) >= 2
        for first, second in pairs:
            assert second - first == pytest.approx(math.log(50), abs=1e-3)


def test_the_pipeline_and_its_page_know_the_units(run):
    pipe = TarFlowPipeline.from_pretrained(run)
    config, values = pipe.transformer.config, waves(0)
    np.testing.assert_allclose(config.value_mean, values.mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(config.value_scale, values.std((0, 2, 3)), rtol=1e-12)
    samples = pipe(num_images_per_label=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert samples.shape == (5, 6, 8, 2)
    page = (run / "README.md").read_text()
    assert "the values of 6x8 (height x width) 2-channel arrays" in page
    assert "nats per dimension of noisy arrays, in the units of the data" in page
    assert "Bits" not in page
    assert 'save("sample.png")' not in page
    assert (run / "samples.png").exists()
    assert (run / "curve.png").exists()


def test_the_measured_density_is_that_of_the_data_by_hand(run, tmp_path):
    """-log p(v) / num_dims from log_prob, with the noise and the change of units written out."""
    line = [str(run), "--data", str(run.parent / "data/held_out.npy"), "--split", "train", "--array_layout", "chw"]
    evaluate.main([*line, "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "metrics.json").read_text())["nats_per_dim"]
    model = TarFlowPipeline.from_pretrained(run).transformer
    config = model.config
    inputs = to_model_units(torch.from_numpy(waves(1)), config).float()
    noisy = [augment(image, "gaussian", 0.2, generator=item_generator(0, row)) for row, image in enumerate(inputs)]
    log_prob = model.log_prob(torch.stack(noisy)).double() - 48 * sum(map(math.log, config.value_scale))
    assert found["value"] == pytest.approx(-log_prob.mean().item() / 96, abs=1e-5)
    assert found["standard_error"] == pytest.approx(log_prob.std().item() / 40**0.5 / 96, rel=1e-3)
    assert DensityUnit.of(config).per_dim(model.log_prob(torch.stack(noisy))).mean().item() == pytest.approx(
        found["value"], abs=1e-5
    )


@pytest.mark.parametrize("change", [{"allow_changes": True}, {"override": "value_scale=[2.0,3.0]"}])
def test_a_run_keeps_its_scaling(change, tmp_path):
    """Its weights were learned in the units of the first one."""
    scaling = {"value_mean": "[0.0, 0.0]", "value_scale": "[1.0, 1.0]"}
    Run(tmp_path / "run", **data(tmp_path / "data"), **SHAPE, **scaling).finish()
    with pytest.raises(AssertionError, match="CheckpointError: .* arrays cannot change within a run"):
        Run(
            tmp_path / "run", **data(tmp_path / "data"), **SHAPE | scaling | {"value_scale": "[2.0, 3.0]"} | change
        ).finish()


def test_sample_writes_a_picture_and_the_numbers(run, tmp_path, capsys):
    path = tmp_path / "some" / "waves.png"
    sample.main([str(run), "--output", str(path), "--num_images_per_label", "2", "--trace", str(tmp_path / "t.png")])
    values = np.load(path.with_suffix(".npy"))
    assert values.shape == (40, 2, 6, 8)
    assert values.std((0, 2, 3)) == pytest.approx(waves(0).std((0, 2, 3)), rel=0.9)
    assert path.exists()
    assert "the arrays in the units of the data" in capsys.readouterr().out


def test_arrays_are_ranked_and_seen(run, tmp_path):
    line = [str(run), "--data", str(run.parent / "data/held_out.npy"), "--split", "train", "--array_layout", "chw"]
    latents.main(["rank", *line, "--output_dir", str(tmp_path), "--columns", "4"])
    rows = (tmp_path / "ranking.csv").read_text().splitlines()
    assert rows[0] == "rank,row,image,nats_per_dim"
    assert len(rows) == 41
    sheet = np.asarray(Image.open(tmp_path / "ranking.png").convert("L"))
    assert len(np.unique(sheet)) > 50  # waves in grey


def test_a_killed_run_on_arrays_ends_as_if_it_had_not_been(run, tmp_path):
    kill_and_restart(tmp_path / "run", 1, seed=3, **(SHAPE | data(tmp_path / "data")))
    assert outcome(tmp_path / "run")["metrics.jsonl"] == outcome(run)["metrics.jsonl"]
    ours, theirs = weights(run), weights(tmp_path / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

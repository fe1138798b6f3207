"""Averages of any length made afterwards: against averages kept during training, in float64."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from training_runs import Run, weights

from tarflow_hf import TarFlowPipeline
from tarflow_hf.training.ema import PowerAverage
from tarflow_hf.training.export import export, load_pipeline
from tarflow_hf.training.posthoc import posthoc_average, store_averages
from tarflow_hf.training.power_average import Average, combination, decay_at, power_exponent, relative_length


def kept(values, exponent):
    """The average as the definition has it: update by update, in float64."""
    average = np.zeros_like(values[0])
    for update, value in enumerate(values, 1):
        decay = decay_at(update, exponent)
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_length_and_exponent_are_each_others_inverse(length):
    assert math.isclose(relative_length(power_exponent(length)), length, rel_tol=1e-9)


def test_the_papers_exponents():
    """arXiv 2312.02696, table 6: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert [round(power_exponent(length), 2) for length in (0.05, 0.10)] == [16.97, 6.94]


def test_the_length_is_the_spread_of_the_weights():
    steps = np.arange(1, 20_001) / 20_000
    spread = np.diff(np.concatenate([[0], steps]) ** (power_exponent(0.1) + 1))
    mean = (spread * steps).sum()
    assert math.isclose(math.sqrt((spread * (steps - mean) ** 2).sum()), 0.1, rel_tol=1e-4)


def test_stored_averages_make_one_that_was_not_kept_within_the_stated_error():
    """A random walk with drift, the hardest path: every value counts, in 50 dimensions."""
    values = 3 + np.cumsum(np.random.default_rng(0).normal(size=(960, 50)), axis=0)
    stored = [Average(30 * k, length) for k in range(1, 33) for length in (0.05, 0.10)]
    averages = [kept(values[: average.updates], average.exponent) for average in stored]
    for length, bound in ((0.03, 0.02), (0.07, 2e-3), (0.15, 5e-3), (0.2, 0.01)):
        factors, error = combination(stored, Average(960, length))
        expected = kept(values, power_exponent(length))
        made = sum(factor * average for factor, average in zip(factors, averages, strict=True))
        assert math.isclose(factors.sum(), 1, rel_tol=1e-9)
        assert error < bound
        # |sum_s d_s theta_s| <= |d| |theta - c| for any constant c, as the differences d sum to 0
        weight = Average(960, length).exponent + 1
        norm = np.linalg.norm(np.diff((np.arange(961) / 960) ** weight))
        assert np.all(np.abs(made - expected) <= error * norm * np.linalg.norm(values - values.mean(0), axis=0) + 1e-9)


def test_a_constant_stays_and_a_kept_average_is_given_back():
    stored = [Average(10 * k, length) for k in range(1, 4) for length in (0.05, 0.10)]
    factors, error = combination(stored, Average(30, 0.10))
    assert np.allclose(factors, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert error < 1e-9
    assert math.isclose(combination(stored[:2], Average(30, 0.02))[0].sum(), 1, rel_tol=1e-12)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=r"must be in \(0, 0.2887\], got 0.3"):
        power_exponent(0.3)
    with pytest.raises(ValueError, match="got one after 20"):
        combination([Average(20, 0.1)], Average(10, 0.1))
    with pytest.raises(ValueError, match="no averages are stored"):
        combination([], Average(10, 0.1))


def test_files_of_another_beginning_or_a_later_step_are_left_out(tmp_path):
    def state(origin, updates, value):
        return {
            length: {"origin": origin, "num_updates": updates, "average": {"w": torch.full((2,), value)}}
            for length in ("0.05", "0.1")
        }

    store_averages(tmp_path, 10, state(0, 10, 5.0))
    store_averages(tmp_path, 20, state(12, 8, 1.0))
    store_averages(tmp_path, 40, state(12, 28, 9.0))
    made = posthoc_average(tmp_path, 30, state(12, 18, 1.0), 0.07)
    assert made.stored == 4
    assert torch.allclose(made.tensors["w"], torch.ones(2), atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {"posthoc_ema": "[0.05,0.1]", "posthoc_every": 2, "max_steps": 18}
    return Run(tmp_path_factory.mktemp("posthoc") / "run", **options).finish().folder


def test_a_run_stores_averages_and_exports_any_length(run, tmp_path):
    """The oracle: an average of 0.15 that another run of the same bits kept by itself."""
    oracle = Run(tmp_path / "oracle", posthoc_ema="[0.15,0.2]", posthoc_every=1000).finish().folder
    assert "average of relative length 0.15" in export(run, tmp_path / "out", weights="posthoc", ema_length=0.15)
    made = TarFlowPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    state = torch.load(max(oracle.glob("checkpoints/step-*")) / "state.pt", weights_only=True)
    wanted, raw = state["posthoc"]["0.15"]["average"], state["model"]
    for name, tensor in wanted.items():
        assert (made[name] - tensor).norm() <= 0.02 * (raw[name] - tensor).norm() + 1e-6, name
    page = (tmp_path / "out" / "README.md").read_text()
    assert "relative length 0.15, made of 18 stored ones" in page
    assert (tmp_path / "out" / "recipe.yaml").is_file()


def stored(path):
    """The tensors of a file of averages and what it says of them; safetensors orders the latter by chance."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_an_interrupted_run_stores_the_same_averages(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000018")  # as if it had been killed after step 16
    (folder / "averages" / "step-00000018.safetensors").write_bytes(b"half")
    Run(folder, posthoc_ema="[0.05,0.1]", posthoc_every=2).finish()
    names = sorted(path.name for path in (run / "averages").iterdir())
    assert len(names) == 9
    for name in names:
        (found, about), (wanted, expected) = stored(folder / "averages" / name), stored(run / "averages" / name)
        assert about == expected
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    found, wanted = weights(folder), weights(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_averages_asked_for_on_the_way_begin_there(tmp_path):
    folder = Run(tmp_path / "run", max_steps=18).finish().folder
    shutil.rmtree(folder / "checkpoints" / "step-00000018")
    Run(folder, posthoc_ema="[0.05,0.1]", posthoc_every=1).finish()
    with safe_open(folder / "averages" / "step-00000018.safetensors", "pt") as file:
        assert json.loads(file.metadata()["averages"]) == {"0.05": [16, 2], "0.1": [16, 2]}


def test_a_checkpoint_gives_a_pipeline_with_each_of_its_weights(run):
    checkpoint = max(run.glob("checkpoints/step-*"))
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    for place, options, wanted in (
        (checkpoint, {}, state["ema"]["average"]),
        (checkpoint, {"weights": "raw"}, state["model"]),
        (checkpoint, {"weights": "posthoc", "ema_length": 0.1}, state["posthoc"]["0.1"]["average"]),
    ):
        pipe = load_pipeline(place, **options)
        found = pipe.transformer.state_dict()
        assert all(torch.allclose(found[name], tensor, atol=1e-7) for name, tensor in wanted.items())
        assert pipe.config.guidance_scale == 2.0  # the recipe's
        assert pipe.transformer.config.id2label[7] == "7"


def test_the_average_of_the_state_is_the_definition():
    model = torch.nn.Linear(3, 2).double()
    averages = [PowerAverage(model, length) for length in (0.05, 0.2)]
    values = np.random.default_rng(1).normal(size=(40, 6))
    for value, average in itertools.product(values, averages):
        model.weight.data = torch.from_numpy(value).view(2, 3)
        average.update(model)
    for average in averages:
        assert np.allclose(average.average["weight"].flatten().numpy(), kept(values, average.exponent), rtol=1e-12)

"""The `evaluate` modules: loaded by path and as classes, batch by batch, over processes, without growing."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from training_runs import start_processes

from tarflow_hf.metrics.bits_per_dim import BitsPerDim
from tarflow_hf.metrics.frechet_distance import FrechetDistance

METRICS = Path(__file__).parents[2] / "tarflow_hf" / "metrics"


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(90, 6))


def test_a_uniform_model_costs_8_bits(tmp_path):
    metric = evaluate.load(str(METRICS / "bits_per_dim.py"), cache_dir=str(tmp_path))
    metric.add_batch(predictions=np.full(5, -192 * math.log(2)))
    metric.add(prediction=-192 * math.log(2))
    expected = {"bits_per_dim": 8, "standard_error": 0, "num_samples": 6}
    assert metric.compute(num_dims=192) == pytest.approx(expected, abs=1e-12)


def test_bits_per_dim_and_its_standard_error(tmp_path):
    log_prob = np.random.default_rng(0).normal(size=41) * 30 - 100
    bits = (-log_prob / 12 + math.log(128)) / math.log(2)
    results = BitsPerDim(cache_dir=str(tmp_path)).compute(predictions=log_prob, num_dims=12)
    assert results["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-12)
    assert results["standard_error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(41), rel=1e-12)


def test_batches_equal_one_call_and_a_metric_can_be_used_again(tmp_path, features):
    metric = evaluate.load(str(METRICS / "frechet_distance.py"), cache_dir=str(tmp_path))
    whole = metric.compute(predictions=features, reference=features * 2)
    for start in range(0, 90, 13):
        metric.add_batch(predictions=features[start : start + 13])
    assert metric.compute(reference=features * 2) == pytest.approx(whole, rel=1e-10)


def test_the_cache_holds_one_row_however_many_examples_there_are(tmp_path):
    metric = BitsPerDim(cache_dir=str(tmp_path))
    for _ in range(50):
        metric.add_batch(predictions=np.zeros(1000))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10_000
    assert metric.compute(num_dims=3)["num_samples"] == 50_000


def second_process(folder):
    """What process 1 of 2 does: it adds its share, and is told nothing."""
    metric = FrechetDistance(num_process=2, process_id=1, experiment_id="two", cache_dir=folder)
    metric.add_batch(predictions=np.load(f"{folder}/features.npy")[60:])
    assert metric.compute(reference="only process 0 reads this") is None


def test_two_processes_equal_one(tmp_path, features):
    np.save(tmp_path / "features.npy", features)
    (second,) = start_processes(second_process, (str(tmp_path),), [{}])
    metric = FrechetDistance(num_process=2, process_id=0, experiment_id="two", cache_dir=str(tmp_path))
    for part in (features[:20], features[20:60]):
        metric.add_batch(predictions=part)
    merged = metric.compute(reference=features * 2)
    second.join(60)
    assert second.exitcode == 0
    whole = FrechetDistance(cache_dir=str(tmp_path / "one")).compute(predictions=features, reference=features * 2)
    assert merged["num_samples"] == 90
    assert merged == pytest.approx(whole, rel=1e-10)


def test_a_reference_file_and_the_warning_about_few_samples(tmp_path, features):
    np.savez(tmp_path / "reference.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    metric = FrechetDistance(cache_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="5 generated samples for 6 features"):
        results = metric.compute(predictions=features[:5], reference=tmp_path / "reference.npz")
    assert results["num_samples"] == 5
    assert "kernel_distance" not in results


def test_bad_input_is_named(tmp_path, features):
    with pytest.raises(ValueError, match=r"predictions must have the shape \(batch,\), got \(90, 6\)"):
        BitsPerDim(cache_dir=str(tmp_path)).add_batch(predictions=features)
    with pytest.raises(ValueError, match="at least one example, got none"):
        BitsPerDim(cache_dir=str(tmp_path)).compute(num_dims=3)

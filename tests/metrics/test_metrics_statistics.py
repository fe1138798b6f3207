"""Streamed moments and samples: equal to one pass over everything, however the data was split."""

import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tarflow_hf.metrics.statistics import FeatureStatistics, FeatureSummary, Moments, UniformSample, rank_correlation


def shards_of(features, cuts, capacity=20):
    edges = [0, *sorted(cuts), len(features)]
    pairs = [(start, stop) for start, stop in zip(edges, edges[1:], strict=False) if start < stop]
    return [FeatureStatistics.of(features[start:stop], start, capacity) for start, stop in pairs]


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=6), seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1e4]))
def test_merged_shards_equal_one_pass_in_any_order(cuts, seed, offset):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(60, 5)) + offset
    shards = shards_of(features, cuts)
    rng.shuffle(shards)
    merged = reduce(FeatureStatistics.merge, shards)
    assert merged.moments.count == 60
    np.testing.assert_allclose(merged.moments.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.moments.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-10)
    whole = UniformSample.of(features, 0, capacity=20)
    np.testing.assert_array_equal(merged.sample.features, whole.features)


def test_the_sample_is_uniform_over_the_indices():
    kept = np.zeros(100)
    for start in range(0, 200_000, 100):
        kept[UniformSample.of(np.arange(100.0)[:, None], start, capacity=10).features[:, 0].astype(int)] += 1
    expected, deviation = 2000 * 0.1, np.sqrt(2000 * 0.1 * 0.9)
    assert np.abs(kept - expected).max() < 4.5 * deviation


def test_statistics_survive_bytes_and_files(tmp_path):
    statistics = FeatureStatistics.of(torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), 7, capacity=8)
    again = FeatureStatistics.from_bytes(statistics.to_bytes())
    np.testing.assert_array_equal(again.moments.scatter, statistics.moments.scatter)
    summary = statistics.summary("toy")
    summary.save(tmp_path / "stats.npz")
    loaded = FeatureSummary.load(tmp_path / "stats.npz")
    assert (loaded.extractor, loaded.num_samples) == ("toy", 30)
    np.testing.assert_array_equal(loaded.covariance, summary.covariance)
    np.testing.assert_array_equal(loaded.features, summary.features)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


def test_a_reference_batch_in_the_common_form_loads(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
    summary = FeatureSummary.load(tmp_path / "adm.npz")
    assert summary.mean.dtype == np.float64
    assert summary.extractor is summary.num_samples is summary.features is None


def test_the_standard_error_is_that_of_the_mean():
    features = np.random.default_rng(0).normal(size=(50, 2)) * [1.0, 3.0]
    expected = features.std(axis=0, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(Moments.of(features).standard_error, expected, rtol=1e-12)


def test_bad_features_are_named():
    features = np.zeros((4, 3))
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 of 4 is not"):
        Moments.of(features)
    with pytest.raises(ValueError, match=r"shape \(batch, num_features\), got \(3,\)"):
        Moments.of(np.zeros(3))
    with pytest.raises(ValueError, match="at least one vector, got 0"):
        Moments.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="moments of 3 and of 4 features"):
        Moments.of(np.zeros((2, 3))).merge(Moments.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        _ = Moments.of(np.zeros((1, 3))).covariance


def test_a_file_that_is_not_statistics_is_refused(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must hold 'mu' and 'sigma', it holds \['arr_0'\]"):
        FeatureSummary.load(tmp_path / "images.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2, 2\)"):
        FeatureSummary.load(tmp_path / "shape.npz")


def test_rank_correlation_is_spearman_s():
    random = np.random.default_rng(0)
    for numbers, others in [
        (random.normal(size=50), random.normal(size=50)),
        (random.integers(4, size=50), random.integers(3, size=50)),
    ]:
        assert rank_correlation(numbers, others) == pytest.approx(spearmanr(numbers, others).statistic, abs=1e-12)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


@pytest.mark.parametrize(("numbers", "others"), [([1], [1]), ([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]])])
def test_ranks_of_other_shapes_are_refused(numbers, others):
    with pytest.raises(ValueError, match="two lists of one length, at least 2"):
        rank_correlation(numbers, others)
    with pytest.raises(ValueError, match="finite"):
        rank_correlation([1, math.nan], [1, 2])

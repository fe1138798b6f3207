"""Distances between sets of features: closed forms, independent implementations, and what they must order."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from tarflow_hf.metrics.distances import feature_distances, gaussian_frechet_distance, kernel_distance, overlap
from tarflow_hf.metrics.statistics import FeatureStatistics, FeatureSummary


def two_sets(num_a=300, num_b=250, num_features=16, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features)) / 4
    return rng.normal(size=(num_a, num_features)), rng.normal(size=(num_b, num_features)) @ mixing + 0.3


def summary_of(features, name="toy"):
    return FeatureStatistics.of(features, first_index=0).summary(name)


def frechet(a, b):
    a, b = summary_of(a), summary_of(b)
    return gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_frechet_distance_of_axis_aligned_gaussians_in_closed_form():
    means, scales = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]]), np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 1.5]])
    expected = ((means[0] - means[1]) ** 2).sum() + ((scales[0] - scales[1]) ** 2).sum()
    rotation = scipy.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    covariances = [rotation @ np.diag(scale**2) @ rotation.T for scale in scales]
    actual = gaussian_frechet_distance(rotation @ means[0], covariances[0], rotation @ means[1], covariances[1])
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_samples", [400, 9])
def test_frechet_distance_to_itself_is_zero_also_for_few_samples(num_samples):
    features = 10 * two_sets(num_a=num_samples, num_features=32)[0]
    assert frechet(features, features[::-1]) < 1e-9


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy():
    a, b = (summary_of(features) for features in two_sets())
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(*two_sets()) == pytest.approx(expected, rel=1e-10)


class FlattenedPixels(torch.nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1).float()


def test_agrees_with_torchmetrics_on_the_same_features():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (80, 3, 2, 2), dtype=torch.uint8, generator=generator)
    fake = torch.randint(40, 256, (70, 3, 2, 2), dtype=torch.uint8, generator=generator)
    fid = FrechetInceptionDistance(feature=FlattenedPixels()).set_dtype(torch.float64)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    assert frechet(fake.flatten(1).numpy(), real.flatten(1).numpy()) == pytest.approx(float(fid.compute()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")  # on its own memory
def test_kernel_distance_agrees_with_torchmetrics_on_all_pairs():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 2, (60, 3, 2, 2), dtype=torch.uint8, generator=generator)
    fake = torch.randint(0, 3, (60, 3, 2, 2), dtype=torch.uint8, generator=generator)
    kid = KernelInceptionDistance(feature=FlattenedPixels(), subsets=1, subset_size=60)
    kid.update(real, real=True)
    kid.update(fake, real=False)
    ours, _ = kernel_distance(fake.flatten(1).double().numpy(), real.flatten(1).double().numpy())
    assert ours == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_kernel_distance_is_unbiased_and_its_standard_error_is_right():
    rng = np.random.default_rng(0)
    estimates = np.array(
        [kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(40, 4)) + 1.0) for _ in range(300)]
    )
    far, _ = kernel_distance(rng.normal(size=(4000, 4)), rng.normal(size=(4000, 4)) + 1.0)
    spread = estimates[:, 0].std(ddof=1)
    assert abs(estimates[:, 0].mean() - far) < 4 * spread / np.sqrt(300) + 0.02 * far
    assert estimates[:, 1].mean() == pytest.approx(spread, rel=0.15)
    equal = np.array([kernel_distance(rng.normal(size=(30, 4)), rng.normal(size=(30, 4)))[0] for _ in range(300)])
    assert abs(equal.mean()) < 4 * equal.std(ddof=1) / np.sqrt(300)


def test_overlap_against_the_definition():
    generated, real = two_sets(num_a=40, num_b=50, num_features=3)
    generated = generated * 0.5

    def distances(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=-1)

    def radius(x, k):
        return np.sort(distances(x, x), axis=1)[:, k]  # entry 0 is the sample itself

    across = distances(generated, real)
    found = overlap(generated, real)
    assert found.precision == pytest.approx((across <= radius(real, 3)).any(axis=1).mean())
    assert found.recall == pytest.approx((across.T <= radius(generated, 3)).any(axis=1).mean())
    assert found.density == pytest.approx((across <= radius(real, 5)).sum() / (5 * 40))
    assert found.coverage == pytest.approx((across <= radius(real, 5)).any(axis=0).mean())


def test_overlap_tells_missing_variety_from_missing_quality():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(2000, 2))
    narrow, wide = overlap(rng.normal(size=(2000, 2)) * 0.1, real), overlap(rng.normal(size=(2000, 2)) * 5, real)
    assert narrow.precision > 0.8
    assert narrow.recall < 0.2
    assert narrow.coverage < 0.2
    assert wide.precision < 0.5
    assert wide.recall > 0.95


def test_large_sets_are_compared_block_by_block():
    generated, real = two_sets(num_a=1500, num_b=1300, num_features=3)
    full, _ = kernel_distance(generated, real)
    kernels = [(x @ y.T / 3 + 1) ** 3 for x, y in ((generated, generated), (real, real), (generated, real))]
    within = [(kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    assert full == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-10)
    assert overlap(real, real).precision == 1.0


def test_fewer_samples_than_features_is_said():
    generated, real = two_sets(num_a=300, num_b=10)
    results = feature_distances(summary_of(generated), summary_of(real))
    assert results["note"].startswith("10 reference samples for 16 features")
    assert "note" not in feature_distances(summary_of(generated), summary_of(generated))


def test_what_a_bare_reference_file_cannot_give_is_left_out():
    generated, real = (summary_of(features) for features in two_sets())
    results = feature_distances(generated, FeatureSummary(real.mean, real.covariance))
    assert set(results) == {"frechet_distance", "num_features", "num_samples"}


def test_bad_input_is_named():
    a, b = two_sets()
    with pytest.raises(ValueError, match="as many features, got 16 and 8"):
        gaussian_frechet_distance(np.zeros(16), np.eye(16), np.zeros(8), np.eye(8))
    with pytest.raises(ValueError, match="positive semi-definite, got the eigenvalue -1"):
        gaussian_frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="at least 6 samples, got 5 and 250"):
        overlap(a[:5], b)
    with pytest.raises(ValueError, match=r"got \(300, 16\) and \(250, 8\)"):
        kernel_distance(a, b[:, :8])
    with pytest.raises(ValueError, match="got 'toy' and 'other'"):
        feature_distances(summary_of(a), summary_of(b, "other"))


def test_distances_of_what_was_kept_say_how_many_that_were():
    features = np.random.default_rng(0).normal(size=(300, 4))
    few = [FeatureStatistics.of(part, first_index=0, capacity=50).summary("mine") for part in (features, features + 1)]
    found = feature_distances(*few)
    assert (found["num_samples"], found["num_compared"], found["num_compared_reference"]) == (300, 50, 50)

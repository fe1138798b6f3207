"""Distances between two sets of feature vectors, as pure functions in float64.

Fréchet distance of the fitted Gaussians, kernel distance (KID), precision and recall, density and coverage.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tarflow_hf.images.extras import installed_by
from tarflow_hf.metrics.statistics import Array, FeatureSummary

with installed_by("eval"):
    import scipy.linalg

_ROWS_AT_A_TIME = 1024
MIN_SAMPLES = 6  # that all distances need: a fifth nearest neighbour of each


def gaussian_frechet_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).

    The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2), which stays accurate where the
    covariances are singular, as those of fewer samples than features are.

    Args:
        mean_a: (num_features,) mean of the first Gaussian.
        covariance_a: (num_features, num_features) its covariance, symmetric and positive semi-definite.
        mean_b: (num_features,) mean of the second.
        covariance_b: (num_features, num_features) its covariance.

    Returns:
        The squared distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If the numbers of features differ, or a covariance is not positive semi-definite.

    Reference: Dowson and Landau (1982); Heusel et al., arXiv 1706.08500, equation 6.

    Example:
        >>> import numpy as np
        >>> gaussian_frechet_distance(np.zeros(1), np.eye(1), np.full(1, 3.0), 4 * np.eye(1))  # 3^2 + (1 - 2)^2
        10.0
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"both sets must have as many features, got {mean_a.size} and {mean_b.size}")
    product = _square_root(covariance_a) @ _square_root(covariance_b)
    cross = float(scipy.linalg.svdvals(product).sum())
    difference = mean_a - mean_b
    distance = float(difference @ difference) + float(np.trace(covariance_a) + np.trace(covariance_b)) - 2 * cross
    return max(distance, 0.0)  # rounding alone can make it negative


def _square_root(covariance: Array) -> Array:
    eigenvalues, eigenvectors = scipy.linalg.eigh(covariance)
    if eigenvalues[0] < -1e-5 * max(eigenvalues[-1], 0.0):
        raise ValueError(f"a covariance must be positive semi-definite, got the eigenvalue {eigenvalues[0]:.3g}")
    return (eigenvectors * np.sqrt(np.maximum(eigenvalues, 0.0))) @ eigenvectors.T


def kernel_distance(features_a: Array, features_b: Array) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3, the KID.

    MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j), over all pairs.

    Args:
        features_a: (num_a, num_features) features of the first set, at least 2.
        features_b: (num_b, num_features) features of the second set, at least 2.

    Returns:
        The estimate, which may be negative, and its standard error (first-order, from the mean over the other
        vectors that each vector contributes).

    Reference: Bińkowski et al., arXiv 1801.01401, section 4; Gretton et al. (2012), equation 3.

    Example:
        >>> import numpy as np
        >>> features = np.random.default_rng(0).normal(size=(400, 4))
        >>> distance, standard_error = kernel_distance(features[:200], features[200:])
        >>> abs(distance) < 3 * standard_error  # two halves of one set
        True
    """
    _check_sets(features_a, features_b, at_least=2)
    within_a = _mean_kernel(features_a, features_a, same=True)
    within_b = _mean_kernel(features_b, features_b, same=True)
    across_a = _mean_kernel(features_a, features_b, same=False)
    across_b = _mean_kernel(features_b, features_a, same=False)
    distance = within_a.mean() + within_b.mean() - across_a.mean() - across_b.mean()
    variance = 4 * (
        (within_a - across_a).var(ddof=1) / len(features_a) + (within_b - across_b).var(ddof=1) / len(features_b)
    )
    return float(distance), float(np.sqrt(variance))


def _mean_kernel(rows: Array, columns: Array, *, same: bool) -> Array:
    """(num_rows,) mean of k over the columns for each row, the row itself left out where `same`."""
    sums = np.empty(len(rows))
    for block in _blocks(len(rows)):
        kernel = (rows[block] @ columns.T / rows.shape[1] + 1) ** 3
        if same:
            kernel[np.arange(len(kernel)), np.arange(block.start, block.start + len(kernel))] = 0
        sums[block] = kernel.sum(axis=1)
    return sums / (len(columns) - 1 if same else len(columns))


@dataclass(frozen=True)
class Overlap:
    """How two sets of samples cover each other: quality (precision, density) and variety (recall, coverage).

    All are shares of 1, but density may exceed it.

    Example:
        >>> Overlap(precision=0.9, recall=0.6, density=1.1, coverage=0.8).recall
        0.6
    """

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(generated: Array, real: Array, *, ball_neighbours: int = 3, density_neighbours: int = 5) -> Overlap:
    """Precision, recall, density and coverage from the balls that reach to each sample's k-th nearest neighbour.

    precision: share of generated samples inside any real ball; recall: share of real samples inside any generated
    ball; density: balls of real samples around a generated one, divided by k; coverage: share of real balls with a
    generated sample inside.

    Args:
        generated: (num_generated, num_features) features.
        real: (num_real, num_features) features; all four depend on the sizes, so compare equal sizes only.
        ball_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Returns:
        The four shares.

    Raises:
        ValueError: If a set has no k-th neighbour.

    Reference: Kynkäänniemi et al., arXiv 1904.06991 (k = 3); Naeem et al., arXiv 2002.09797 (k = 5).

    Example:
        >>> import numpy as np
        >>> real = np.random.default_rng(0).normal(size=(300, 2))
        >>> found = overlap(real[:100] * 0.1, real[100:200])  # samples that huddle in the middle of the real ones
        >>> found.precision > 0.9, found.recall < 0.1, found.coverage < 0.5
        (True, True, True)
    """
    _check_sets(generated, real, at_least=max(ball_neighbours, density_neighbours) + 1)
    real_radii = _neighbour_distances(real, (ball_neighbours, density_neighbours))
    generated_radii = _neighbour_distances(generated, (ball_neighbours,))[0]
    in_real_ball = np.zeros(len(generated), dtype=bool)
    in_generated_ball = np.zeros(len(real), dtype=bool)
    covered = np.zeros(len(real), dtype=bool)
    balls = 0
    for block in _blocks(len(generated)):
        distances = _squared_distances(generated[block], real)
        in_real_ball[block] = (distances <= real_radii[0]).any(axis=1)
        in_generated_ball |= (distances <= generated_radii[block, None]).any(axis=0)
        in_density_ball = distances <= real_radii[1]
        covered |= in_density_ball.any(axis=0)
        balls += int(in_density_ball.sum())
    return Overlap(
        precision=float(in_real_ball.mean()),
        recall=float(in_generated_ball.mean()),
        density=balls / (density_neighbours * len(generated)),
        coverage=float(covered.mean()),
    )


def _neighbour_distances(rows: Array, neighbours: tuple[int, ...]) -> Array:
    """(len(neighbours), num_rows) squared distance of each row to its k-th nearest other row."""
    found = np.empty((len(neighbours), len(rows)))
    for block in _blocks(len(rows)):
        distances = _squared_distances(rows[block], rows)
        distances[np.arange(len(distances)), np.arange(block.start, block.start + len(distances))] = np.inf
        found[:, block] = np.sort(np.partition(distances, max(neighbours) - 1)[:, : max(neighbours)])[
            :, np.subtract(neighbours, 1)
        ].T
    return found


def _squared_distances(rows: Array, columns: Array) -> Array:
    squares = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)
    return np.maximum(squares - 2 * (rows @ columns.T), 0.0)


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS_AT_A_TIME, size)) for start in range(0, size, _ROWS_AT_A_TIME))


def _check_sets(features_a: NDArray[np.float64], features_b: NDArray[np.float64], *, at_least: int) -> None:
    for features in (features_a, features_b):
        if not (isinstance(features, np.ndarray) and np.issubdtype(features.dtype, np.floating)):
            got = features.dtype if isinstance(features, np.ndarray) else type(features).__name__
            raise ValueError(f"features must be NumPy arrays of floating point numbers, got {got}")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite, and some are not")
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"both sets must have the shape (samples, num_features) with as many features, "
            f"got {features_a.shape} and {features_b.shape}"
        )
    if min(len(features_a), len(features_b)) < at_least:
        raise ValueError(
            f"both sets must have at least {at_least} samples, got {len(features_a)} and {len(features_b)}"
        )


def feature_distances(generated: FeatureSummary, reference: FeatureSummary) -> dict[str, float | int | str]:
    """All distances that two summaries allow: the Fréchet distance, and the others where both hold features.

    Args:
        generated: Statistics of the model's samples.
        reference: Statistics of real images, by the same feature extractor.

    Returns:
        `frechet_distance`; `kernel_distance` and `kernel_distance_standard_error`, `precision`, `recall`, `density`,
        `coverage` where both summaries hold features, and of how many, as a summary keeps some (`num_compared`,
        `num_compared_reference`); `num_samples`, `num_features`; and a `note` where a set has
        fewer samples than features: the distance is then biased upwards and only good for comparing equal sizes.

    Raises:
        ValueError: If the two were made by different extractors.

    Example:
        >>> import numpy as np
        >>> from tarflow_hf.metrics.statistics import FeatureStatistics
        >>> features = np.random.default_rng(0).normal(size=(200, 4))
        >>> real = FeatureStatistics.of(features, first_index=0).summary("mine")
        >>> moved = FeatureStatistics.of(features + 1, first_index=0).summary("mine")
        >>> distances = feature_distances(moved, real)
        >>> round(distances["frechet_distance"], 6), distances["num_samples"], sorted(distances)[:2]
        (4.0, 200, ['coverage', 'density'])
    """
    if None not in (generated.extractor, reference.extractor) and generated.extractor != reference.extractor:
        raise ValueError(
            f"both sets must have been seen by the same feature extractor, "
            f"got {generated.extractor!r} and {reference.extractor!r}"
        )
    results: dict[str, float | int | str] = {
        "frechet_distance": gaussian_frechet_distance(
            generated.mean, generated.covariance, reference.mean, reference.covariance
        )
    }
    if generated.features is not None and reference.features is not None:
        kernel, error = kernel_distance(generated.features, reference.features)
        results |= {"kernel_distance": kernel, "kernel_distance_standard_error": error}
        results |= vars(overlap(generated.features, reference.features))
        results |= {"num_compared": len(generated.features), "num_compared_reference": len(reference.features)}
    results |= {"num_features": generated.mean.size}
    sizes = {"num_samples": generated.num_samples, "num_reference_samples": reference.num_samples}
    results |= {name: size for name, size in sizes.items() if size is not None}
    note = rank_note(generated, reference)
    return results | ({"note": note} if note else {})


def rank_note(generated: FeatureSummary, reference: FeatureSummary) -> str | None:
    """A sentence on which of the two sets has fewer samples than features, or None.

    Args:
        generated: Statistics of samples.
        reference: Statistics of real images.

    Example:
        >>> import numpy as np
        >>> from tarflow_hf.metrics.statistics import FeatureStatistics
        >>> few = FeatureStatistics.of(np.random.default_rng(0).normal(size=(3, 8)), first_index=0).summary()
        >>> rank_note(few, few).split(":")[0]
        '3 generated samples and 3 reference samples for 8 features'
    """
    sets = {"generated": generated.num_samples, "reference": reference.num_samples}
    num_features = generated.mean.size
    small = [f"{count} {name} samples" for name, count in sets.items() if count is not None and count <= num_features]
    if not small:
        return None
    return (
        f"{' and '.join(small)} for {num_features} features: the covariance is singular and the Fréchet distance "
        f"biased upwards; compare it with equal sizes only, or read the kernel distance"
    )


__all__ = [
    "MIN_SAMPLES",
    "Overlap",
    "feature_distances",
    "gaussian_frechet_distance",
    "kernel_distance",
    "overlap",
    "rank_note",
]

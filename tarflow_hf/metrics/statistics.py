"""Streamed statistics of feature vectors: moments in float64 and a uniform sample of bounded size, both mergeable.

Shards of a data set can be summarised apart, in any order and by any number of processes, and merged at the end.
"""

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tarflow_hf.metrics.atomic import replacing

Array = NDArray[np.float64]
DEFAULT_CAPACITY = 10_000


def as_float64(values: ArrayLike | torch.Tensor) -> Array:
    """Numbers in any container and on any device as a float64 array on the CPU.

    Example:
        >>> as_float64(torch.tensor([0.5, 1.0], dtype=torch.bfloat16))
        array([0.5, 1. ])
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def as_rows(features: ArrayLike | torch.Tensor) -> Array:
    """Feature vectors as a float64 matrix.

    Args:
        features: (batch, num_features) finite numbers, on any device.

    Returns:
        (batch, num_features) float64 on the CPU.

    Raises:
        ValueError: If the features are not a matrix, or not finite.

    Example:
        >>> as_rows(torch.ones(2, 3)).dtype
        dtype('float64')
        >>> as_rows([[0.0, float("nan")]])
        Traceback (most recent call last):
            ...
        ValueError: features must be finite, row 0 of 1 is not
    """
    rows = as_float64(features)
    if rows.ndim != 2:
        raise ValueError(f"features must have the shape (batch, num_features), got {rows.shape}")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"features must be finite, row {int(np.argmin(finite))} of {len(rows)} is not")
    return rows


@dataclass(frozen=True)
class Moments:
    """Count, mean m = 1/n sum x and scatter S = sum (x - m)(x - m)^T of vectors seen so far.

    Two of them merge exactly: n = n1 + n2, m = m1 + d n2/n, S = S1 + S2 + d d^T n1 n2/n with d = m2 - m1.

    Reference: Chan, Golub and LeVeque (1979), Updating formulae and a pairwise algorithm for sample variances.

    Example:
        >>> import numpy as np
        >>> rows = np.array([[0.0], [1.0], [5.0]])
        >>> merged = Moments.of(rows[:2]).merge(Moments.of(rows[2:]))
        >>> merged.count, merged.mean, merged.covariance
        (3, array([2.]), array([[7.]]))
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: ArrayLike | torch.Tensor) -> Self:
        """Moments of one (batch, num_features) batch of at least one vector.

        Raises:
            ValueError: If there is no vector, or one is not finite.
        """
        rows = as_rows(features)
        if len(rows) == 0:
            raise ValueError("features must hold at least one vector, got 0")
        mean = rows.mean(axis=0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    def merge(self, other: Self) -> Self:
        """Moments of both sets of vectors together.

        Raises:
            ValueError: If the numbers of features differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge moments of {len(self.mean)} and of {len(other.mean)} features")
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return type(self)(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Array:
        """(num_features, num_features) unbiased covariance S / (n - 1).

        Raises:
            ValueError: If there are fewer than 2 vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def standard_error(self) -> Array:
        """(num_features,) standard error of the mean, sqrt(variance / n)."""
        return np.sqrt(np.diagonal(self.covariance) / self.count)


@dataclass(frozen=True)
class UniformSample:
    """At most `capacity` of the vectors seen so far, drawn uniformly and independently of how they were split.

    Each vector has a pseudo-random priority that depends on its index alone; the vectors of lowest priority stay.

    Reference: Efraimidis and Spirakis (2006), Weighted random sampling with a reservoir.

    Example:
        >>> import numpy as np
        >>> rows = np.arange(100.0)[:, None]
        >>> whole = UniformSample.of(rows, first_index=0, capacity=5)
        >>> halves = UniformSample.of(rows[:50], 0, capacity=5).merge(UniformSample.of(rows[50:], 50, capacity=5))
        >>> np.array_equal(whole.features, halves.features)
        True
    """

    capacity: int
    priorities: NDArray[np.uint64]
    features: Array

    @classmethod
    def of(cls, features: ArrayLike | torch.Tensor, first_index: int, capacity: int = DEFAULT_CAPACITY) -> Self:
        """Sample of the (batch, num_features) vectors `first_index`, `first_index + 1`, ... of the whole set.

        Args:
            features: (batch, num_features) vectors.
            first_index: Index of the first of them in the whole set.
            capacity: Most vectors kept.
        """
        rows = as_rows(features)
        priorities = _mix(np.arange(first_index, first_index + len(rows), dtype=np.uint64))
        return cls(capacity, priorities, rows)._lowest()

    def merge(self, other: Self) -> Self:
        """Sample of both sets of vectors together; no index may be in both.

        Raises:
            ValueError: If the capacities differ.
        """
        if self.capacity != other.capacity:
            raise ValueError(f"cannot merge samples of capacity {self.capacity} and {other.capacity}")
        priorities = np.concatenate([self.priorities, other.priorities])
        features = np.concatenate([self.features, other.features])
        return type(self)(self.capacity, priorities, features)._lowest()

    def _lowest(self) -> Self:
        kept = np.argsort(self.priorities)[: self.capacity]
        return type(self)(self.capacity, self.priorities[kept], self.features[kept])


def _mix(indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser: a bijection of 64-bit numbers that looks random (Steele et al., 2014)."""
    mixed = (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of all feature vectors and a uniform sample of them: what the distances of a set of images need.

    Memory is num_features^2 + capacity * num_features numbers, however many images there are.

    Example:
        >>> import numpy as np
        >>> features = np.random.default_rng(0).normal(size=(100, 4))
        >>> first = FeatureStatistics.of(features[:30], first_index=0)
        >>> second = FeatureStatistics.of(features[30:], first_index=30)
        >>> first.merge(second).summary().num_samples
        100
    """

    moments: Moments
    sample: UniformSample

    @classmethod
    def of(cls, features: ArrayLike | torch.Tensor, first_index: int, capacity: int = DEFAULT_CAPACITY) -> Self:
        """Statistics of one batch.

        Args:
            features: (batch, num_features) features of at least one image.
            first_index: Index of the first of these images in the whole set; the others follow it.
            capacity: Vectors kept for the distances that moments cannot give; the same in all batches.
        """
        return cls(Moments.of(features), UniformSample.of(features, first_index, capacity))

    def merge(self, other: Self) -> Self:
        """Statistics of both sets of images together; no index may be in both."""
        return type(self)(self.moments.merge(other.moments), self.sample.merge(other.sample))

    def to_bytes(self) -> bytes:
        """The statistics as the bytes of an `.npz` file, to pass them between processes."""
        moments, sample, buffer = self.moments, self.sample, BytesIO()
        np.savez(
            buffer,
            count=moments.count,
            mean=moments.mean,
            scatter=moments.scatter,
            capacity=sample.capacity,
            priorities=sample.priorities,
            features=sample.features,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The statistics that [`to_bytes`] wrote."""
        with np.load(BytesIO(data), allow_pickle=False) as file:
            return cls(
                Moments(int(file["count"]), file["mean"], file["scatter"]),
                UniformSample(int(file["capacity"]), file["priorities"], file["features"]),
            )

    def summary(self, extractor: str | None = None) -> "FeatureSummary":
        """The finished statistics of features made by the network named `extractor`."""
        moments = self.moments
        return FeatureSummary(moments.mean, moments.covariance, extractor, moments.count, self.sample.features)


@dataclass(frozen=True)
class FeatureSummary:
    """Finished statistics of the features of a set of images.

    `mean` (num_features,), `covariance` (num_features, num_features); `extractor` names the network, `num_samples` is
    the number of images, `features` (kept, num_features) a uniform sample. The last three are None where a file
    made elsewhere does not tell them.

    Example:
        >>> import numpy as np
        >>> summary = FeatureSummary(np.zeros(2), np.eye(2), extractor="mine", num_samples=100)
        >>> summary.save("reference.npz")
        >>> FeatureSummary.load("reference.npz").num_samples
        100
    """

    mean: Array
    covariance: Array
    extractor: str | None = None
    num_samples: int | None = None
    features: Array | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (self.mean.size, self.mean.size):
            raise ValueError(
                f"mu and sigma must have the shapes (d,) and (d, d), got {self.mean.shape} and {self.covariance.shape}"
            )
        if not np.isfinite(self.mean).all() or not np.isfinite(self.covariance).all():
            raise ValueError("mu and sigma must be finite")
        uneven = np.abs(self.covariance - self.covariance.T)
        if uneven.size and uneven.max() > 1e-4 * np.abs(self.covariance).max():
            row, column = np.unravel_index(int(uneven.argmax()), uneven.shape)
            raise ValueError(f"sigma must be symmetric, it differs by {uneven.max():.3g} at {int(row)}, {int(column)}")
        if self.covariance.size and self.covariance.diagonal().min() < -1e-5 * np.abs(self.covariance).max():
            raise ValueError(f"sigma must have no variance below 0, got {self.covariance.diagonal().min():.3g}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an `.npz` with `mu` and `sigma`, as other tools read them, and what else is known."""
        arrays: dict[str, Any] = {
            "mu": self.mean,
            "sigma": self.covariance,
            "extractor": self.extractor,
            "num_samples": self.num_samples,
            "features": self.features,
        }
        with replacing(path) as partial:
            np.savez(partial, **{key: value for key, value in arrays.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads an `.npz` with `mu` and `sigma`: one of [`save`], or one of the reference batches of ADM.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no `.npz` file, lacks `mu` or `sigma`, or these do not fit or are not finite.
        """
        if not os.path.isfile(path):
            found = "a folder" if os.path.isdir(path) else "nothing there"
            raise FileNotFoundError(f"{path} must be an .npz file with 'mu' and 'sigma', it is {found}")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} must be an .npz file with 'mu' and 'sigma', its bytes are no such file")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged .npz file: {error}") from error
        if not {"mu", "sigma"} <= set(arrays):
            raise ValueError(f"{path} must hold 'mu' and 'sigma', it holds {sorted(arrays)}")
        features = arrays.get("features")
        try:
            return cls(
                arrays["mu"].astype(np.float64),
                arrays["sigma"].astype(np.float64),
                str(arrays["extractor"]) if "extractor" in arrays else None,
                int(arrays["num_samples"]) if "num_samples" in arrays else None,
                None if features is None else features.astype(np.float64),
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def rank_correlation(values: ArrayLike, others: ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, of which equal values share the mean; NaN for a constant.

    Args:
        values: (n,) finite numbers, n at least 2.
        others: (n,) numbers that belong to them.

    Raises:
        ValueError: If the shapes are others, or a number is not finite.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 30.0], [-3.0, -2.0, -1.0]), 9)
        1.0
    """
    pairs = [as_float64(values), as_float64(others)]
    if pairs[0].ndim != 1 or pairs[0].shape != pairs[1].shape or len(pairs[0]) < 2:
        raise ValueError(f"ranks need two lists of one length, at least 2, got {pairs[0].shape} and {pairs[1].shape}")
    if not all(np.isfinite(numbers).all() for numbers in pairs):
        raise ValueError("ranks need finite numbers, got some that are not")
    centred = []
    for numbers in pairs:
        _, position, count = np.unique(numbers, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(count) - (count - 1) / 2)[position]  # from 1, the mean of those of equal numbers
        centred.append(ranks - ranks.mean())
    lengths = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / lengths) if lengths else math.nan


__all__ = [
    "DEFAULT_CAPACITY",
    "FeatureStatistics",
    "FeatureSummary",
    "Moments",
    "UniformSample",
    "as_float64",
    "as_rows",
    "rank_correlation",
]

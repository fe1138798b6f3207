"""`evaluate` module: Fréchet distance of generated features to a reference, with KID and overlap beside it."""

import os
import warnings

import evaluate
from numpy.typing import ArrayLike

from tarflow_hf.metrics.distances import feature_distances
from tarflow_hf.metrics.statistics import FeatureStatistics, FeatureSummary, as_rows
from tarflow_hf.metrics.streamed import StreamedMetric, shown_as

_DESCRIPTION = """
Squared Fréchet distance of the Gaussians fitted to generated and to reference features,
|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). With the Inception network of 2015 it is the FID.
Where reference features are at hand: the unbiased kernel distance (KID), precision and recall, density and coverage.
"""
_INPUTS = """
Args:
    predictions: (batch, num_features) features of generated images.
    reference: the real side, given to `compute`: the path of an `.npz` with `mu` and `sigma`, a `FeatureSummary`, or
        a (num_samples, num_features) array of features.
    extractor: name of the feature extractor, compared with the one the reference names.

Returns:
    frechet_distance, in squared units of the features; num_samples, num_reference_samples, num_features; and where the
    reference holds features: kernel_distance, kernel_distance_standard_error, precision, recall, density, coverage.
    A note, also given as a warning, says where there are fewer samples than features.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("tarflow_hf/metrics/frechet_distance.py")  # or: FrechetDistance()
    >>> features = np.random.default_rng(0).normal(size=(100, 4))
    >>> metric.add_batch(predictions=features[:50])
    >>> metric.add_batch(predictions=features[50:])
    >>> round(metric.compute(reference=features + 1.0)["frechet_distance"], 6)  # four means moved by one
    4.0
"""
_CITATION = """
@inproceedings{heusel2017gans,
  title={{GANs} trained by a two time-scale update rule converge to a local {Nash} equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}
"""


class FrechetDistance(StreamedMetric):
    """Fréchet and kernel distance and overlap with a reference, fed with features of generated images.

    Example:
        >>> import numpy as np
        >>> features = np.random.default_rng(0).normal(size=(100, 4))
        >>> metric = FrechetDistance()
        >>> metric.add_batch(predictions=features)
        >>> round(metric.compute(reference=features + 1.0)["frechet_distance"], 6)  # four means moved by one
        4.0
    """

    def _info(self) -> evaluate.MetricInfo:
        urls = ["https://arxiv.org/abs/1706.08500", "https://arxiv.org/abs/1801.01401"]
        return shown_as(_DESCRIPTION, _INPUTS, _CITATION, urls)

    def _compute(
        self,
        predictions: list[bytes],
        reference: FeatureSummary | str | os.PathLike[str] | ArrayLike,
        extractor: str | None = None,
    ) -> dict[str, float | int | str]:
        if isinstance(reference, (str, os.PathLike)):
            reference = FeatureSummary.load(reference)
        elif not isinstance(reference, FeatureSummary):
            reference = FeatureStatistics.of(as_rows(reference), first_index=0).summary(extractor)
        results = feature_distances(self.merged(predictions).summary(extractor), reference)
        if "note" in results:
            warnings.warn(str(results["note"]), stacklevel=2)
        return results


__all__ = ["FrechetDistance"]

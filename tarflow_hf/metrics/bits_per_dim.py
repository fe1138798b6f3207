"""`evaluate` module: mean bits per dimension of images from their log-densities, with its standard error."""

import evaluate
import torch
from numpy.typing import ArrayLike

from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.metrics.likelihood import density_summary
from tarflow_hf.metrics.statistics import Array, as_float64
from tarflow_hf.metrics.streamed import StreamedMetric, shown_as

_DESCRIPTION = """
Bits per dimension of 8-bit images: bits = (-log p(x) / num_dims + log 128) / log 2, where p is the density of the
uniformly dequantised image in the [-1, 1] pixel space, averaged over the images.
"""
_INPUTS = """
Args:
    predictions: (batch,) log p(x) in nats, one number an image.
    num_dims: numbers in an image, channels * height * width (given to `compute`).

Returns:
    bits_per_dim: mean over the images, in bits.
    standard_error: of that mean over the images, in bits; left out for a single image.
    num_samples: number of images.

Example:
    >>> import evaluate
    >>> metric = evaluate.load("tarflow_hf/metrics/bits_per_dim.py")  # or: BitsPerDim()
    >>> metric.add_batch(predictions=[-192 * 0.6931471805599453, -192 * 0.6931471805599453])  # uniform on [-1, 1]
    >>> metric.compute(num_dims=192)["bits_per_dim"]
    8.0
"""
_CITATION = """
@inproceedings{theis2016note,
  title={A note on the evaluation of generative models},
  author={Theis, Lucas and van den Oord, A{\\"a}ron and Bethge, Matthias},
  booktitle={International Conference on Learning Representations},
  year={2016}
}
"""


class BitsPerDim(StreamedMetric):
    """Mean bits per dimension, fed with log-densities in nats.

    Example:
        >>> metric = BitsPerDim()
        >>> metric.add_batch(predictions=torch.tensor([-120.0, -140.0]))  # log-densities of two images in nats
        >>> round(metric.compute(num_dims=64)["bits_per_dim"], 3)
        9.93
    """

    capacity = 0

    def _info(self) -> evaluate.MetricInfo:
        return shown_as(_DESCRIPTION, _INPUTS, _CITATION, ["https://arxiv.org/abs/1511.01844"])

    def _rows(self, predictions: ArrayLike | torch.Tensor) -> Array:
        log_prob = as_float64(predictions)
        if log_prob.ndim != 1:
            raise ValueError(f"predictions must have the shape (batch,), got {log_prob.shape}")
        return log_prob[:, None]

    def _compute(self, predictions: list[bytes], num_dims: int) -> dict[str, float | int]:
        return density_summary(self.merged(predictions).moments, DensityUnit(num_dims))


__all__ = ["BitsPerDim"]

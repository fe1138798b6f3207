"""Exact log-densities of 8-bit images under a model: uniform dequantisation with seeded noise of each image's own."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from tarflow_hf.flow.likelihood import bits_per_dim
from tarflow_hf.flow.noise import dequantize
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.metrics.posterior import class_log_prob
from tarflow_hf.metrics.statistics import Moments
from tarflow_hf.modeling_tarflow import TarFlowModel


def item_generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for one item of a data set or of a set of samples, the same in every split of the work.

    CPU generators keep 32 bits of their seed: consecutive items get consecutive ones, seeds lie far apart.

    Args:
        seed: Seed of the whole set.
        index: Index of the item, from 0.

    Example:
        >>> first, again = (torch.rand(1, generator=item_generator(seed=0, index=7)) for _ in range(2))
        >>> first.equal(again)
        True
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**32)


def dequantized_images(levels: torch.Tensor, indices: Sequence[int], num_draws: int, seed: int) -> torch.Tensor:
    """Noise draws of 8-bit images, u ~ U[0, 1) of a level added to every number.

    Args:
        levels: (batch, channels, height, width) uint8 levels.
        indices: Index of each image in its data set, which decides its noise together with the seed.
        num_draws: Draws of each image; the first draws do not depend on how many there are.
        seed: Seed of the noise.

    Returns:
        (num_draws, batch, channels, height, width) float32 images in [-1, 1).

    Example:
        >>> levels = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        >>> draws = dequantized_images(levels, indices=[0, 1], num_draws=3, seed=0)
        >>> draws.shape, bool((draws >= 254 / 128 - 1).all())
        (torch.Size([3, 2, 1, 8, 8]), True)
    """
    generators = [item_generator(seed, index) for index in indices]
    images = to_pixel_values(levels)
    draws = [
        torch.stack(
            [dequantize(image, generator=generator) for image, generator in zip(images, generators, strict=True)]
        )
        for _ in range(num_draws)
    ]
    return torch.stack(draws)


@torch.no_grad()
def log_prob_draws(model: TarFlowModel, draws: torch.Tensor, class_labels: torch.Tensor | None) -> np.ndarray:
    """Log-densities of every noise draw, of a model with noise conditioning at the lowest of its levels.

    Args:
        model: The model.
        draws: (num_draws, batch, channels, height, width) images in [-1, 1).
        class_labels: (batch,) class ids, or None for no labels.

    Returns:
        (batch, num_draws) float64 nats.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> model = untrained_place().pipe.transformer
        >>> draws = dequantized_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], num_draws=3, seed=0)
        >>> log_prob_draws(model, draws, class_labels=None).shape
        (2, 3)
    """
    labels = None if class_labels is None else class_labels.to(model.device)
    found = []
    for images in draws.to(model.device):
        output = model(images, labels, model.lowest_noise_level(images), return_dict=True)
        found.append(model.log_prob_of(output).cpu().double())
    return torch.stack(found, dim=1).numpy()


def bits_per_dim_summary(log_prob: Moments, num_dims: int) -> dict[str, float | int]:
    """Mean bits per dimension over images and its standard error.

    Args:
        log_prob: Moments of one number an image, its log-density in nats.
        num_dims: Numbers in an image, channels * height * width.

    Returns:
        `bits_per_dim` and, for more than one image, `standard_error` in bits, and `num_samples`.

    Example:
        >>> import numpy as np
        >>> from tarflow_hf.metrics.statistics import Moments
        >>> log_prob = np.array([[-100.0], [-140.0]])  # nats of two images
        >>> found = bits_per_dim_summary(Moments.of(log_prob), num_dims=64)
        >>> {name: round(value, 3) for name, value in found.items()}
        {'bits_per_dim': 9.705, 'num_samples': 2, 'standard_error': 0.451}
    """
    mean = torch.tensor(log_prob.mean[0], dtype=torch.float64)
    results = {"bits_per_dim": float(bits_per_dim(mean, num_dims)), "num_samples": log_prob.count}
    if log_prob.count > 1:
        results["standard_error"] = float(log_prob.standard_error[0]) / (num_dims * math.log(2))
    return results


def class_log_prob_mean(model: TarFlowModel, draws: torch.Tensor, pairs_per_pass: int | None) -> np.ndarray:
    """Log-densities under every class, averaged over the noise draws: the same noise for all classes.

    Args:
        model: A class-conditional model.
        draws: (num_draws, batch, channels, height, width) images in [-1, 1).
        pairs_per_pass: Most pairs of image and class in a pass; None for all.

    Returns:
        (batch, num_classes) float64 nats.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> class_log_prob_mean(untrained_place().pipe.transformer, torch.zeros(3, 2, 1, 8, 8), pairs_per_pass=8).shape
        (2, 10)
    """
    found = [
        class_log_prob(model, images.to(model.device), pairs_per_pass=pairs_per_pass).cpu().double()
        for images in draws
    ]
    return torch.stack(found).mean(dim=0).numpy()


__all__ = ["bits_per_dim_summary", "class_log_prob_mean", "dequantized_images", "item_generator", "log_prob_draws"]

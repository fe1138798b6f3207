"""Exact log-densities under seeded noise: of 8-bit images, of the latents that a pipeline makes of them, of arrays."""

from collections.abc import Sequence

import numpy as np
import torch

from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.flow.noise import augment, dequantize
from tarflow_hf.images.latents import encode_moments
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.metrics.posterior import class_log_prob
from tarflow_hf.metrics.statistics import Moments
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline


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
def flow_draws(
    pipe: TarFlowPipeline, levels: torch.Tensor, indices: Sequence[int], num_draws: int, seed: int
) -> torch.Tensor:
    """Noise draws of images as a pipeline's flow sees them.

    A flow of pixels gets [`dequantized_images`]. One of latents gets the standardised means of the encoder, and one of
    arrays gets the arrays, with the Gaussian noise that it was trained with: its density is of noisy latents or
    arrays, as the validation of a run has it.

    Args:
        pipe: The pipeline.
        levels: (batch, image channels, height, width) uint8 levels, or float32 arrays in the model's units.
        indices: Index of each image in its data set, which decides its noise together with the seed.
        num_draws: Draws of each image.
        seed: Seed of the noise.

    Returns:
        (num_draws, batch, channels, rows, columns) float32, on the pipeline's device for latents and arrays.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> pipe, levels = untrained_place().pipe, torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        >>> flow_draws(pipe, levels, [0, 1], 3, seed=0).equal(dequantized_images(levels, [0, 1], 3, seed=0))
        True
    """
    model, vae = pipe.transformer, pipe.vae
    if vae is not None:
        means, _ = encode_moments(vae, to_pixel_values(levels.to(vae.device)), model.config.patch_size)
    elif levels.is_floating_point():
        means = levels.to(model.device)
    else:
        return dequantized_images(levels, indices, num_draws, seed)
    generators = [item_generator(seed, index) for index in indices]
    noise_levels = model.lowest_noise_level(means)
    stds = [float(model.config.noise_std)] * len(means) if noise_levels is None else noise_levels.tolist()
    draws = [
        torch.stack(
            [
                augment(mean.cpu(), model.config.noise_type, std, generator=generator)
                for mean, std, generator in zip(means, stds, generators, strict=True)
            ]
        )
        for _ in range(num_draws)
    ]
    return torch.stack(draws).to(means.device)


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


def unit_of(pipe: TarFlowPipeline) -> DensityUnit:
    """In what the density of a pipeline's flow is told.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> unit_of(untrained_place().pipe).name
        'bits_per_dim'
    """
    return DensityUnit.of(pipe.transformer.config, latent=pipe.vae is not None)


def density_summary(log_prob: Moments, unit: DensityUnit) -> dict[str, float | int]:
    """Mean over images under the name of its unit, `num_samples`, and `standard_error` for more than one.

    Args:
        log_prob: Moments of one number an image, its log-density in nats.
        unit: In what it is told.

    Example:
        >>> import numpy as np
        >>> from tarflow_hf.metrics.statistics import Moments
        >>> log_prob = np.array([[-100.0], [-140.0]])  # nats of two images
        >>> from tarflow_hf.flow.likelihood import DensityUnit
        >>> found = density_summary(Moments.of(log_prob), DensityUnit(num_dims=64))
        >>> {name: round(value, 3) for name, value in found.items()}
        {'bits_per_dim': 9.705, 'num_samples': 2, 'standard_error': 0.451}
    """
    mean = torch.tensor(log_prob.mean[0], dtype=torch.float64)
    results: dict[str, float | int] = {unit.name: float(unit.per_dim(mean)), "num_samples": log_prob.count}
    if log_prob.count > 1:
        results["standard_error"] = float(log_prob.standard_error[0]) / (unit.num_dims * unit.nats)
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


__all__ = [
    "class_log_prob_mean",
    "density_summary",
    "dequantized_images",
    "flow_draws",
    "item_generator",
    "log_prob_draws",
    "unit_of",
]

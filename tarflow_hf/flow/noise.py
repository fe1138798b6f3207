"""The noise of training: Gaussian augmentation and uniform dequantisation of images in [-1, 1].

Models that are told the noise level (iTARFlow) draw one for each image, and weight its loss by it.
"""

import math
from typing import get_args

import torch

from tarflow_hf.configuration_tarflow import NoiseType
from tarflow_hf.flow.choices import NoiseLevelSampling, NoiseLevelWeighting

NOISE_NAMES: dict[NoiseType, str] = {"gaussian": "Gaussian noise", "uniform": "uniform dequantisation"}
"""What pages call each type."""


def add_gaussian_noise(
    pixel_values: torch.Tensor, noise_std: float, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Adds Gaussian noise: x + noise_std * e with e ~ N(0, 1).

    Args:
        pixel_values: (batch, channels, height, width) images x in [-1, 1].
        noise_std: Standard deviation in units of the [-1, 1] range, at least 0.
        generator: Source of the noise, on the device of the images.

    Returns:
        Noisy images of the same shape; they may leave [-1, 1].

    Raises:
        ValueError: If `noise_std` is negative.

    Reference: arXiv 2412.06329 (noise augmentation).

    Example:
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> noisy = add_gaussian_noise(images, 0.1, generator=torch.Generator().manual_seed(0))
        >>> noisy.shape, round(noisy.std().item(), 1)
        (torch.Size([2, 1, 8, 8]), 0.1)
    """
    if noise_std < 0:
        raise ValueError(f"noise_std must be at least 0, got {noise_std}")
    noise = torch.empty_like(pixel_values).normal_(generator=generator)
    return pixel_values + noise_std * noise


def dequantize(pixel_values: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Uniform dequantisation of 8-bit images: 2 (k + u) / 256 - 1 with k = 127.5 (x + 1) and u ~ U[0, 1).

    Args:
        pixel_values: (batch, channels, height, width) images x in [-1, 1] on the 8-bit grid k / 127.5 - 1.
        generator: Source of the noise, on the device of the images.

    Returns:
        Images of the same shape in [-1, 1), each pixel uniform in the cell of its level.

    Reference: arXiv 2412.06329 (likelihood).

    Example:
        >>> black_and_white = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
        >>> noisy = dequantize(black_and_white, generator=torch.Generator().manual_seed(0))
        >>> ((noisy + 1) * 128).floor().flatten()  # the 8-bit levels are still there
        tensor([  0., 255.])
    """
    levels = ((pixel_values + 1) * 127.5).round()
    noise = torch.empty_like(pixel_values).uniform_(generator=generator)
    end = (levels + 1) / 128 - 1  # of the cell, which rounding alone could reach
    below = torch.minimum(torch.nextafter(end, torch.full_like(end, -2.0)), end - 2**-40)  # at 0 the next is too near
    return torch.minimum((levels + noise) / 128 - 1, below)


def augment(
    pixel_values: torch.Tensor,
    noise_type: NoiseType,
    noise_std: float,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Applies the noise a model is trained with.

    Args:
        pixel_values: (batch, channels, height, width) images in [-1, 1].
        noise_type: `"gaussian"` for [`add_gaussian_noise`] with `noise_std`, `"uniform"` for [`dequantize`].
        noise_std: Standard deviation of the Gaussian noise; not used for uniform noise.
        generator: Source of the noise, on the device of the images.

    Returns:
        Noisy images of the same shape.

    Raises:
        ValueError: If `noise_type` is unknown.

    Example:
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> augment(images, "gaussian", 0.0).equal(images)
        True
        >>> grey = augment(images, "uniform", 0.0)  # uniform in the cell of the level, 2/256 wide
        >>> bool((grey.max() - grey.min()) < 2 / 256)
        True
    """
    if noise_type == "gaussian":
        return add_gaussian_noise(pixel_values, noise_std, generator=generator)
    if noise_type == "uniform":
        return dequantize(pixel_values, generator=generator)
    raise ValueError(f"noise_type must be {' or '.join(map(repr, get_args(NoiseType)))}, got {noise_type!r}")


def noise_levels(
    fractions: torch.Tensor, sampling: NoiseLevelSampling, noise_range: tuple[float, float]
) -> torch.Tensor:
    """Noise levels t by the inverse of their distribution function, which maps fractions that are uniform in (0, 1).

    uniform: t0 + u (t1 - t0) · linear: sqrt(t0^2 + u (t1^2 - t0^2)) · edm: exp(-1.2 + Phi^-1(u)), whatever the range.

    Args:
        fractions: u, in (0, 1).
        sampling: `"uniform"`, `"linear"` or `"edm"`.
        noise_range: t0 and t1, the lowest and highest standard deviation.

    Returns:
        Standard deviations of the noise, of the same shape and dtype.

    Raises:
        ValueError: If `sampling` is not one of the three.

    Reference: arXiv 2604.20041; for `"edm"` Karras et al., arXiv 2206.00364, table 1.

    Example:
        >>> noise_levels(torch.tensor([0.1, 0.5, 0.9]), "uniform", (0.0, 1.0))
        tensor([0.1000, 0.5000, 0.9000])
        >>> noise_levels(torch.tensor([0.1, 0.5, 0.9]), "linear", (0.0, 1.0))  # higher levels are drawn more often
        tensor([0.3162, 0.7071, 0.9487])
    """
    low, high = noise_range
    if sampling == "uniform":
        return low + fractions * (high - low)
    if sampling == "linear":
        return (low**2 + fractions * (high**2 - low**2)).sqrt()
    if sampling == "edm":
        return (torch.special.ndtri(fractions) - 1.2).exp()
    raise ValueError(f"sampling must be one of {get_args(NoiseLevelSampling)}, got {sampling!r}")


def noise_level_weights(
    levels: torch.Tensor, weighting: NoiseLevelWeighting, noise_range: tuple[float, float]
) -> torch.Tensor:
    """Weights of the losses of images with these noise levels t.

    none: 1 · t: t · t_relative: t / (t0 + t1) · t2: t^2 · t2_relative: t^2 / (t0^2 + t1^2).

    Args:
        levels: Standard deviations t.
        weighting: One of the five; the authors' recipes take `"t"`.
        noise_range: t0 and t1, the lowest and highest standard deviation.

    Returns:
        Weights of the shape of the levels.

    Raises:
        ValueError: If `weighting` is not one of the five.

    Reference: arXiv 2604.20041.

    Example:
        >>> noise_level_weights(torch.tensor([0.1, 0.3]), "t", (0.1, 0.3))
        tensor([0.1000, 0.3000])
        >>> noise_level_weights(torch.tensor([0.1, 0.3]), "t_relative", (0.1, 0.3))
        tensor([0.2500, 0.7500])
    """
    if weighting not in get_args(NoiseLevelWeighting):
        raise ValueError(f"weighting must be one of {get_args(NoiseLevelWeighting)}, got {weighting!r}")
    if weighting == "none":
        return torch.ones_like(levels)
    power = 2 if weighting in ("t2", "t2_relative") else 1
    total = math.fsum(level**power for level in noise_range) if weighting.endswith("relative") else 1.0
    return levels**power / total


__all__ = [
    "NOISE_NAMES",
    "NoiseLevelSampling",
    "NoiseLevelWeighting",
    "add_gaussian_noise",
    "augment",
    "dequantize",
    "noise_level_weights",
    "noise_levels",
]

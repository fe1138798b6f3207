"""The noise of training: Gaussian augmentation and uniform dequantisation of images in [-1, 1]."""

from typing import Literal

import torch

NoiseType = Literal["gaussian", "uniform"]


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

    Reference: arXiv 2412.06329, section 3.3.
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

    Reference: arXiv 2412.06329, section 4.2.
    """
    levels = (pixel_values + 1) * 127.5
    noise = torch.empty_like(pixel_values).uniform_(generator=generator)
    return (levels + noise) / 128 - 1


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
        ValueError: If `noise_type` is not one of the two.
    """
    if noise_type == "gaussian":
        return add_gaussian_noise(pixel_values, noise_std, generator=generator)
    if noise_type == "uniform":
        return dequantize(pixel_values, generator=generator)
    raise ValueError(f"noise_type must be 'gaussian' or 'uniform', got {noise_type!r}")


__all__ = ["NoiseType", "add_gaussian_noise", "augment", "dequantize"]

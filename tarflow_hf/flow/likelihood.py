"""Log-densities in nats, and their conversion to bits per dimension."""

import math

import torch

from tarflow_hf.flow.precision import working_dtype


def normal_log_prob(latents: torch.Tensor, variance: torch.Tensor | None = None) -> torch.Tensor:
    """Log-density of latents under the prior N(0, variance).

    log p(z) = sum over all numbers of -1/2 (z^2 / v + log v + log 2 pi), with v = 1 where no variance is given.

    Args:
        latents: (batch, tokens, patch_dim) latents z.
        variance: (tokens, patch_dim) variances v of the prior, positive; None for the standard normal.

    Returns:
        (batch,) log-density in nats, in float32 or the wider dtype of the latents.

    Reference: arXiv 2412.06329.

    Example:
        >>> normal_log_prob(torch.zeros(2, 4, 3))  # twelve numbers at their most probable: -6 log 2 pi each image
        tensor([-11.0273, -11.0273])
        >>> normal_log_prob(torch.zeros(2, 4, 3), variance=torch.full((4, 3), 4.0))
        tensor([-19.3450, -19.3450])
    """
    latents = latents.to(working_dtype(latents.dtype))
    terms = latents.square() + math.log(2 * math.pi)
    if variance is not None:
        variance = variance.to(latents.dtype)
        terms = latents.square() / variance + variance.log() + math.log(2 * math.pi)
    return -0.5 * terms.flatten(1).sum(1)


def nats_per_dim(latents: torch.Tensor, log_det: torch.Tensor) -> torch.Tensor:
    """What training lowers: mean(1/2 z^2) - log_det / (T D), the negative log-likelihood without 1/2 log 2 pi.

    Args:
        latents: (batch, tokens, patch_dim) latents z.
        log_det: (batch,) log |det dz/dx| in nats, summed over dimensions.

    Returns:
        (batch,) nats per dimension.

    Reference: arXiv 2412.06329.

    Example:
        >>> nats_per_dim(torch.ones(2, 4, 3), log_det=torch.tensor([0.0, 6.0]))
        tensor([0.5000, 0.0000])
    """
    return 0.5 * latents.square().mean((1, 2)) - log_det / (latents.shape[1] * latents.shape[2])


def bits_per_dim(log_prob: torch.Tensor, num_dims: int) -> torch.Tensor:
    """Bits per dimension of 8-bit images from their log-density in the [-1, 1] pixel space.

    bits = (-log p(x) / num_dims + log 128) / log 2, since one 8-bit level is 2/256 wide in [-1, 1].
    It is a bound on the code length of the image if p is the density of the uniformly dequantised image.

    Args:
        log_prob: (batch,) log p(x) in nats of x in [-1, 1].
        num_dims: Numbers in an image, channels * height * width.

    Returns:
        (batch,) bits per dimension.

    Raises:
        ValueError: If `num_dims` is below 1.

    Reference: arXiv 2412.06329 (likelihood); Theis et al., arXiv 1511.01844.

    Example:
        >>> import math
        >>> bits_per_dim(torch.tensor([-12 * math.log(2)]), num_dims=12)  # uniform density 1/2 on [-1, 1]
        tensor([8.])
    """
    if num_dims < 1:
        raise ValueError(f"num_dims must be at least 1, got {num_dims}")
    return (-log_prob / num_dims + math.log(128)) / math.log(2)


__all__ = ["bits_per_dim", "nats_per_dim", "normal_log_prob"]

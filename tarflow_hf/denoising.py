"""Denoising by the score of a log-density that is passed in. No model, labels or pipeline here."""

import math
from collections.abc import Callable

import torch

LogProb = Callable[[torch.Tensor, slice], torch.Tensor]
"""`log_prob(pixel_values, rows)` returns (n,) nats of the n images it is given; `rows` says which of the batch they
are, so that labels can be picked to match."""


def denoise(
    log_prob: LogProb,
    pixel_values: torch.Tensor,
    noise_std: float,
    *,
    strength: float = 1.0,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """One step along the score: x + strength * noise_std^2 * grad_x log p(x).

    With strength 1 this is Tweedie's formula, the posterior mean of the clean image if p is the density of clean
    images plus Gaussian noise of `noise_std`.

    Args:
        log_prob: The log-density in nats, see [`LogProb`]. It is called under gradients, whatever the caller's mode.
        pixel_values: (batch, channels, height, width) noisy images. Not written to.
        noise_std: Standard deviation of the noise in units of the [-1, 1] pixel range, at least 0.
        strength: Multiplier of the step, at least 0; 0 returns the images as they are.
        chunk_size: Most images whose gradient is computed at once, which bounds memory; None for the whole batch.

    Returns:
        Denoised images of the same shape and dtype, detached.

    Raises:
        ValueError: If an argument is out of range.

    Reference: arXiv 2412.06329, section 3.4, equation 8.
    """
    if not (math.isfinite(noise_std) and noise_std >= 0):
        raise ValueError(f"noise_std must be finite and at least 0, got {noise_std}")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength must be finite and at least 0, got {strength}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size}")
    batch = pixel_values.shape[0]
    step = strength * noise_std**2
    denoised = pixel_values.detach().clone()
    if step == 0 or batch == 0:
        return denoised
    for start in range(0, batch, chunk_size or batch):
        rows = slice(start, min(start + (chunk_size or batch), batch))
        denoised[rows] += step * score(log_prob, pixel_values[rows], rows)
    return denoised


def score(log_prob: LogProb, pixel_values: torch.Tensor, rows: slice) -> torch.Tensor:
    """The gradient of log p(x) with respect to x, in the shape and dtype of x.

    Args:
        log_prob: The log-density in nats, see [`LogProb`].
        pixel_values: (n, channels, height, width) images.
        rows: Which images of the batch they are.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = pixel_values.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(inputs, rows).sum(), inputs)
    return gradient


__all__ = ["LogProb", "denoise", "score"]

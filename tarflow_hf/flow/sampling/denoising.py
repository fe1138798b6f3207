"""Denoising by the score of a log-density that is passed in, in one step or many. No model or labels here."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers.utils.torch_utils import randn_tensor

from tarflow_hf.flow.inputs import is_finite, is_number, is_whole

LogProb = Callable[[torch.Tensor, slice], torch.Tensor]
"""`log_prob(pixel_values, rows)` returns (n,) nats of the n images it is given; `rows` says which of the batch they
are, so that labels can be picked to match."""

_MOST_STEPS = 10_000


def denoise(
    log_prob: LogProb,
    pixel_values: torch.Tensor,
    noise_std: float,
    *,
    next_std: float = 0.0,
    strength: float = 1.0,
    fresh_noise: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """One step along the score, from images with noise of `noise_std` to images with noise of `next_std`.

    D = x + strength * noise_std^2 * grad_x log p(x) estimates the clean image; with strength 1 it is Tweedie's
    formula, the posterior mean if p is the density of clean images plus Gaussian noise of `noise_std`. With
    d = (x - D) / noise_std and r = next_std / noise_std, the step goes to

        D + next_std (sqrt(1 - f^2 (1 - r^2)) d + f sqrt(1 - r^2) e),

    where e ~ N(0, 1) and f = `fresh_noise`: 0 keeps the noise (probability flow ODE), 1 draws it anew (SDE).

    Args:
        log_prob: The log-density in nats of images with that noise, see [`LogProb`]; called under gradients.
        pixel_values: (batch, channels, height, width) noisy images x. Not written to.
        noise_std: Standard deviation of their noise in units of the [-1, 1] pixel range, at least 0.
        next_std: Standard deviation of the noise to keep, from 0 to `noise_std`.
        strength: Multiplier of the score, at least 0 (no step).
        fresh_noise: f, from 0 to 1.
        generator: Source of e, or one per image.
        chunk_size: Most images whose gradient is computed at once, which bounds memory; None for the whole batch.

    Returns:
        Images of the same shape and dtype, detached.

    Raises:
        ValueError: If an argument is out of range.

    Reference: arXiv 2412.06329 (score-based denoising); arXiv 2604.20041.

    Example:
        >>> def log_prob(images, rows):  # of clean images N(0, 1) with noise of 0.5 on them: N(0, 1.25)
        ...     return -0.5 * (images**2 / 1.25).sum((1, 2, 3))
        >>> noisy = torch.ones(2, 1, 1, 1)
        >>> denoise(log_prob, noisy, 0.5).flatten()  # Tweedie's formula gives the posterior mean, x / 1.25
        tensor([0.8000, 0.8000])
        >>> denoise(log_prob, noisy, 0.5, next_std=0.25).flatten()  # half of the way there
        tensor([0.9000, 0.9000])
    """
    _check_step(noise_std, next_std, strength, fresh_noise, chunk_size)
    batch, result = pixel_values.shape[0], pixel_values.detach().clone()
    if strength * noise_std == 0 or batch == 0:
        return result
    for start in range(0, batch, chunk_size or batch):
        rows = slice(start, min(start + (chunk_size or batch), batch))
        result[rows] += strength * noise_std**2 * score(log_prob, pixel_values[rows], rows)
    if next_std == 0:
        return result
    drawn = (fresh_noise**2) * (1 - (next_std / noise_std) ** 2)  # share of the variance that is drawn anew
    result += next_std * math.sqrt(1 - drawn) / noise_std * (pixel_values.detach() - result)
    return result if drawn == 0 else result + next_std * math.sqrt(drawn) * _noise_like(result, generator)


def _noise_like(images: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    return randn_tensor(images.shape, generator=generator, device=images.device, dtype=images.dtype)


def even_levels(noise_range: tuple[float, float], num_steps: int) -> list[float]:
    """The noise levels of refinement, evenly from the highest to the lowest: t1 + k (t0 - t1) / (N - 1).

    Args:
        noise_range: t0 and t1, the lowest and highest standard deviation that the model knows.
        num_steps: N, from 1 to 10,000; a single step is at the highest level.

    Returns:
        The `num_steps` levels.

    Raises:
        ValueError: If there is no step, or more than a call could take.

    Reference: arXiv 2604.20041.

    Example:
        >>> even_levels((0.25, 0.75), num_steps=3)
        [0.75, 0.5, 0.25]
    """
    if not (is_whole(num_steps) and num_steps >= 1):
        raise ValueError(f"num_steps (num_refinement_steps) must be at least 1, got {num_steps!r}")
    if num_steps > _MOST_STEPS:
        raise ValueError(f"num_steps (num_refinement_steps) must be at most {_MOST_STEPS}, got {num_steps}")
    low, high = noise_range
    shares = [step / max(num_steps - 1, 1) for step in range(num_steps)]
    return [(1 - share) * high + share * low for share in shares]


def check_levels(levels: Sequence[float], noise_range: tuple[float, float]) -> None:
    """Raises ValueError unless these noise levels fall and are within the range that the model knows.

    Example:
        >>> check_levels([0.5, 0.2, 0.1], noise_range=(0.1, 0.5))
        >>> check_levels([0.1, 0.5], noise_range=(0.1, 0.5))
        Traceback (most recent call last):
            ...
        ValueError: refinement_levels must fall and be within (0.1, 0.5), got [0.1, 0.5]
    """
    low, high = noise_range
    numbers = isinstance(levels, Sequence) and len(levels) > 0 and all(is_number(level) for level in levels)
    falling = numbers and all(level > following for level, following in pairwise(levels))
    if not falling or not low <= levels[-1] <= levels[0] <= high:
        raise ValueError(f"refinement_levels must fall and be within {noise_range}, got {levels!r}")


def score(log_prob: LogProb, pixel_values: torch.Tensor, rows: slice) -> torch.Tensor:
    """The gradient of log p(x) with respect to x, in the shape and dtype of x.

    Args:
        log_prob: The log-density in nats, see [`LogProb`].
        pixel_values: (n, channels, height, width) images.
        rows: Which images of the batch they are.

    Example:
        >>> score(lambda images, rows: -0.5 * (images**2).sum((1, 2, 3)), torch.full((1, 1, 1, 1), 3.0), slice(0, 1))
        tensor([[[[-3.]]]])
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = pixel_values.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(inputs, rows).sum(), inputs)
    return gradient


def _check_step(
    noise_std: float, next_std: float, strength: float, fresh_noise: float, chunk_size: int | None
) -> None:
    if not (is_finite(noise_std) and noise_std >= 0):
        raise ValueError(f"noise_std must be finite and at least 0, got {noise_std!r}")
    if not (is_number(next_std) and 0 <= next_std <= noise_std):
        raise ValueError(f"next_std must be from 0 to noise_std={noise_std}, got {next_std!r}")
    if not (is_finite(strength) and strength >= 0):
        raise ValueError(f"strength must be finite and at least 0, got {strength!r}")
    check_fresh_noise(fresh_noise)
    if chunk_size is not None and not (is_whole(chunk_size) and chunk_size >= 1):
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size!r}")


def check_fresh_noise(fresh_noise: float) -> None:
    """Raises ValueError unless this is a share from 0 to 1.

    Example:
        >>> check_fresh_noise(1.5)
        Traceback (most recent call last):
            ...
        ValueError: fresh_noise (refinement_noise) must be from 0 to 1, got 1.5
    """
    if not (is_number(fresh_noise) and 0 <= fresh_noise <= 1):
        raise ValueError(f"fresh_noise (refinement_noise) must be from 0 to 1, got {fresh_noise!r}")


__all__ = ["LogProb", "check_fresh_noise", "check_levels", "denoise", "even_levels", "score"]

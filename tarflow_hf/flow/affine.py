"""The affine step of a flow: each token is its latent, scaled and shifted by what the tokens before it predict."""

import torch


def affine_step(latents: torch.Tensor, shift: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """x = z exp(a) + b.

    Args:
        latents: z.
        shift: b.
        log_scale: a.

    Example:
        >>> affine_step(torch.ones(2), shift=torch.tensor([1.0, 2.0]), log_scale=torch.zeros(2))
        tensor([2., 3.])
    """
    return latents * log_scale.exp() + shift


def inverse_affine_step(tokens: torch.Tensor, shift: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """z = (x - b) exp(-a).

    Args:
        tokens: x.
        shift: b.
        log_scale: a.

    Example:
        >>> inverse_affine_step(torch.tensor([2.0, 3.0]), shift=torch.tensor([1.0, 2.0]), log_scale=torch.zeros(2))
        tensor([1., 1.])
    """
    return (tokens - shift) * (-log_scale).exp()


__all__ = ["affine_step", "inverse_affine_step"]

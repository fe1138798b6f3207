"""Log-densities in nats, and the units in which they are told: bits or nats per dimension."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
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


@dataclass(frozen=True)
class DensityUnit:
    """In what a flow's density is told: bits per dimension of pixels, nats of latents and arrays, by their own names.

    Only 8-bit images have bits. Latents are on no grid of levels, and an autoencoder loses something: theirs compares
    only flows on one autoencoder with noise of one strength. The density of arrays is that of the data in their own
    units, -log p(v) / num_dims = -log p(x) / num_dims + mean log `value_scale` with v = x value_scale + value_mean.

    Args:
        num_dims: Numbers in what the flow models.
        kind: What that is.
        log_scale: Mean over the channels of log `value_scale`, of arrays.

    Example:
        >>> DensityUnit(num_dims=64, kind="latents").per_dim(torch.tensor([-32.0]))
        tensor([0.5000])
        >>> config = TarFlowConfig(image_size=8, num_channels=1, value_mean=[280.0], value_scale=[10.0])
        >>> unit = DensityUnit.of(config)
        >>> unit.name, round(unit.log_scale, 4)
        ('nats_per_dim', 2.3026)
    """

    num_dims: int
    kind: Literal["pixels", "latents", "arrays"] = "pixels"
    log_scale: float = 0.0

    @classmethod
    def of(cls, config: TarFlowConfig, *, latent: bool = False) -> "DensityUnit":
        """The unit of a flow.

        Args:
            config: The flow's configuration.
            latent: Whether it models an autoencoder's latents.
        """
        if config.value_scale is not None:
            scales = [math.log(scale) for scale in config.value_scale]
            return cls(config.num_dims, "arrays", sum(scales) / len(scales))
        return cls(config.num_dims, "latents" if latent else "pixels")

    @property
    def name(self) -> str:
        """What a number in it is called."""
        return {"pixels": "bits_per_dim", "latents": "latent_nats_per_dim", "arrays": "nats_per_dim"}[self.kind]

    @property
    def text(self) -> str:
        """The same in words."""
        nats = "nats per dimension"
        return {"pixels": "bits per dimension", "latents": f"{nats} of latents", "arrays": nats}[self.kind]

    @property
    def short(self) -> str:
        """The same in short, as after a number."""
        return "bits/dim" if self.kind == "pixels" else "nats/dim"

    @property
    def nats(self) -> float:
        """Nats in one of it."""
        return math.log(2) if self.kind == "pixels" else 1.0

    def per_dim(self, log_prob: torch.Tensor) -> torch.Tensor:
        """Log-densities in this unit: [`bits_per_dim`] of pixels, else -log p / num_dims (+ `log_scale`).

        Args:
            log_prob: (images,) log p(x) in nats of what the flow is given.
        """
        if self.kind == "pixels":
            return bits_per_dim(log_prob, self.num_dims)
        return -log_prob / self.num_dims + self.log_scale

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics under the names of what they are of: nothing but pixels has bits.

        Args:
            metrics: By name; those named `...bits_per_dim` are as [`bits_per_dim`] has them.

        Example:
            >>> DensityUnit(num_dims=64, kind="latents").named({"loss": 0.5, "bits_per_dim": 9.0})
            {'loss': 0.5, 'latent_nats_per_dim': 1.3862943611198906}
        """
        if self.kind == "pixels":
            return dict(metrics)
        return {
            name.replace("bits_per_dim", self.name): (value - 7) * math.log(2) + self.log_scale  # 7: see bits_per_dim
            if name.endswith("bits_per_dim")
            else value
            for name, value in metrics.items()
        }


__all__ = ["DensityUnit", "bits_per_dim", "nats_per_dim", "normal_log_prob"]

"""Training of a small autoencoder whose latents a flow can model: unit variance, and a decoder that bears noise.

The encoder's output gets Gaussian noise of a strength drawn for each image from [0, latent_noise], and the decoder is
to give the clean image back:

    loss = mean (y - x)^2 + l1_weight mean |y - x| + feature_weight mean (e(y) - e(x))^2 + variance_weight V
           + kl_weight KL,

with y = d(z + s eps) and V the distance of each channel's batch statistics from the standard normal. A flow trained on
latents with noise of the same strength needs no denoising of its own. With a frozen encoder, which gives the features
e, only the decoder learns: that fine-tunes a public autoencoder to noisy latents.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from tarflow_hf.images.arguments import option, require
from tarflow_hf.images.latents import (
    Autoencoder,
    crop_to_size,
    latent_channels,
    latent_scaling,
    pad_to_grid,
    posterior_moments,
    spatial_factor,
)
from tarflow_hf.images.processing import ImageFormat

AutoencoderName = Literal["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"]
AUTOENCODERS: dict[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
}


@dataclass(frozen=True)
class AutoencoderArguments:
    """The options of a run of `examples/train_vae.py` beside those of the data.

    Example:
        >>> AutoencoderArguments(autoencoder_config={"latent_channels": 2}).image_format
        ImageFormat(image_size=32, num_channels=3, resize='short_side')
        >>> AutoencoderArguments(init_from="./vae", autoencoder_config={"latent_channels": 2})
        Traceback (most recent call last):
            ...
        ValueError: init_from brings its own configuration: leave autoencoder_config out
    """

    image_size: int | tuple[int, ...] = option(32, "side of square images, or [height, width], pixels")
    num_channels: int = option(3, "1 for grey, 3 for RGB")
    autoencoder: AutoencoderName = option("AutoencoderTiny", "class of diffusers")
    autoencoder_config: dict[str, Any] | None = option(None, "arguments of the class; in_channels is num_channels")
    init_from: str | None = option(None, "autoencoder to start from in place of a new one: folder or Hub name")
    freeze_encoder: bool = option(False, "train the decoder alone, so that the latents stay what they are")
    grid_multiple: int = option(1, "what the sides of the grid are multiples of: patch_size of the flow to come")
    latent_noise: float = option(0.3, "largest noise on the latents, in their standard deviations")
    l1_weight: float = option(0.1, "weight of the absolute error beside the squared one")
    feature_weight: float = option(0.0, "weight of the error in the frozen encoder's features (freeze_encoder)")
    variance_weight: float = option(0.1, "weight of the distance of the latents from mean 0 and variance 1")
    kl_weight: float = option(1e-4, "weight of the divergence of an AutoencoderKL's posterior, nats a latent")
    batch_size: int = option(32, "images of a step, over all processes")
    max_steps: int = option(2000, "length of the training, optimizer steps")
    warmup_steps: int = option(50, "steps with a rising learning rate")
    learning_rate: float = option(2e-3, "highest learning rate")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    ema_decay: float = option(0.999, "decay of the moving average of the weights, which is what is saved")
    seed: int = option(0, "of the initial weights, the order of the images, flips and noise")
    output_dir: str = option("runs/vae", "folder of the run", may_change=True)
    log_every: int = option(50, "steps between two lines of metrics.jsonl", may_change=True)
    eval_every: int = option(500, "steps between evaluations and checkpoints", may_change=True)
    eval_images: int = option(512, "held-out images that are reconstructed", may_change=True)

    def __post_init__(self) -> None:
        for name in ("latent_noise", "l1_weight", "feature_weight", "variance_weight", "kl_weight"):
            require(0 <= getattr(self, name) < float("inf"), f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("grid_multiple", "batch_size", "max_steps", "log_every", "eval_every", "eval_images"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            require(0 < getattr(self, name) < float("inf"), f"{name} must be above 0, got {getattr(self, name)}")
        require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
        require(
            self.init_from is None or self.autoencoder_config is None,
            "init_from brings its own configuration: leave autoencoder_config out",
        )
        require(
            self.feature_weight == 0 or self.freeze_encoder,
            f"feature_weight={self.feature_weight} needs freeze_encoder=true: features must not move",
        )
        _ = self.image_format  # checks its values
        if self.autoencoder_config is not None:
            self._check_autoencoder()

    @property
    def image_format(self) -> ImageFormat:
        """What every image is turned into."""
        return ImageFormat(self.image_size, self.num_channels)

    def new_autoencoder(self) -> Autoencoder:
        """An autoencoder with random weights, as the options say."""
        channels = {"in_channels": self.num_channels}
        if self.autoencoder != "AutoencoderDC":  # which has one number for both
            channels["out_channels"] = self.num_channels
        vae = AUTOENCODERS[self.autoencoder](**{**(self.autoencoder_config or {}), **channels})
        spatial_factor(vae)
        return cast(Autoencoder, vae)

    def _check_autoencoder(self) -> None:
        """Raises ValueError unless `autoencoder_config` makes an autoencoder, which takes no memory yet."""
        config = self.autoencoder_config or {}
        for name in config.keys() & {"in_channels", "out_channels"}:
            raise ValueError(f"autoencoder_config must leave {name} out, which is num_channels={self.num_channels}")
        try:
            with torch.device("meta"):
                vae = self.new_autoencoder()
            if latent_channels(vae) < 1:
                raise ValueError(f"latent_channels must be at least 1, got {latent_channels(vae)}")
            latent_scaling(vae)
        except Exception as error:  # of whatever a class of diffusers makes of numbers that cannot be
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"autoencoder_config={config} makes no {self.autoencoder}: {reason}") from error


def reconstruct(
    vae: Autoencoder, pixel_values: torch.Tensor, noise: torch.Tensor | float = 0.0, multiple: int = 1
) -> torch.Tensor:
    """Images through the autoencoder, with noise added to the standardised latents of the posterior's mean.

    Args:
        vae: The autoencoder.
        pixel_values: (batch, channels, height, width) images in [-1, 1].
        noise: What is added to the latents, of their shape; or 0.
        multiple: What the sides of the grid are padded to multiples of.

    Returns:
        Images of the same shape, not clipped.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> reconstruct(AutoencoderTiny().eval(), torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 3, 28, 28])
    """
    _, scale = latent_scaling(vae)
    mean, _ = posterior_moments(vae, pad_to_grid(pixel_values, vae, multiple))
    decoded = cast(Any, vae).decode(mean + noise / scale.to(mean)).sample
    return crop_to_size(decoded, (pixel_values.shape[-2], pixel_values.shape[-1]))


def reconstruction_loss(
    vae: Autoencoder, pixel_values: torch.Tensor, arguments: AutoencoderArguments, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and the mean squared error in it without gradients.

    Args:
        vae: The autoencoder, in training mode.
        pixel_values: (batch, channels, height, width) images in [-1, 1].
        arguments: Strength of the noise, and the weights.
        generator: Source of the noise, on the CPU.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> vae, images = AutoencoderTiny(latent_channels=4), torch.zeros(2, 3, 32, 32)
        >>> loss, error = reconstruction_loss(vae, images, AutoencoderArguments(), torch.Generator().manual_seed(0))
        >>> loss.requires_grad, error.requires_grad
        (True, False)
    """
    # A new autoencoder's latents are trained to have variance 1; those of a frozen encoder are scaled.
    scale = latent_scaling(vae)[1].to(pixel_values.device) if arguments.freeze_encoder else pixel_values.new_ones(1)
    mean, std = posterior_moments(vae, pad_to_grid(pixel_values, vae, arguments.grid_multiple))
    strength = arguments.latent_noise * torch.rand(len(mean), 1, 1, 1, generator=generator).to(mean) / scale
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    spread = strength if std is None else (std.square() + strength.square()).sqrt()
    decoded = cast(Any, vae).decode(mean + spread * noise).sample
    difference = crop_to_size(decoded, (pixel_values.shape[-2], pixel_values.shape[-1])) - pixel_values
    error = difference.square().mean()
    loss = error + arguments.l1_weight * difference.abs().mean()
    if arguments.feature_weight:
        features, _ = posterior_moments(vae, decoded)
        loss = loss + arguments.feature_weight * ((features - mean) * scale).square().mean()
    if not arguments.freeze_encoder:
        loss = loss + arguments.variance_weight * variance_penalty(mean)
        if std is not None:
            loss = loss + arguments.kl_weight * 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).mean()
    return loss, error.detach()


def variance_penalty(latents: torch.Tensor) -> torch.Tensor:
    """Mean over channels of KL(N(m, v) || N(0, 1)) = (m^2 + v - log v - 1) / 2, m and v over batch and places.

    Args:
        latents: (batch, channels, rows, columns).

    Example:
        >>> variance_penalty(torch.tensor([[[[1.0, -1.0]]]])).item()  # mean 0, variance 1
        0.0
    """
    variance, mean = torch.var_mean(latents.float(), dim=(0, 2, 3), correction=0)
    return 0.5 * (mean.square() + variance - variance.clamp_min(1e-8).log() - 1).mean()


def trainable_parameters(vae: Autoencoder, arguments: AutoencoderArguments) -> list[torch.nn.Parameter]:
    """What the optimizer changes; the rest is frozen.

    Args:
        vae: The autoencoder.
        arguments: Whether the encoder is frozen.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> vae = AutoencoderTiny()
        >>> some = trainable_parameters(vae, AutoencoderArguments(freeze_encoder=True))
        >>> len(some) < len(list(vae.parameters()))
        True
    """
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(not (arguments.freeze_encoder and name.startswith(("encoder.", "quant_conv."))))
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]


__all__ = [
    "AutoencoderArguments",
    "AutoencoderName",
    "reconstruct",
    "reconstruction_loss",
    "trainable_parameters",
    "variance_penalty",
]

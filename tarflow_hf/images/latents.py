"""Images to and from the latents of a diffusers autoencoder: padding, the autoencoder's own scaling, and cropping.

The flow sees standardised latents z = (e(x) - shift) * scale, where e is the encoder and scale and shift are what the
autoencoder's configuration says: `scaling_factor` and `shift_factor`, or per channel `latents_mean` and `latents_std`.
"""

from collections.abc import Sequence
from typing import Any, cast

import PIL.Image
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.nn import functional

from tarflow_hf.configuration_tarflow import TarFlowConfig, height_and_width
from tarflow_hf.images.arrays import to_model_units
from tarflow_hf.images.processing import preprocess_images

Autoencoder = ModelMixin
"""Any diffusers autoencoder with a fixed grid of latents: AutoencoderKL, AutoencoderTiny, AutoencoderDC."""


def latent_channels(vae: Autoencoder) -> int:
    """Channels of the autoencoder's latents.

    Args:
        vae: The autoencoder.

    Raises:
        ValueError: If it is no image autoencoder of diffusers.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> latent_channels(AutoencoderTiny(latent_channels=4))
        4
    """
    known = isinstance(vae, ModelMixin) and hasattr(vae, "encode") and hasattr(vae, "decode")
    channels = vae.config.get("latent_channels") if known else None
    if not isinstance(channels, int):
        raise ValueError(f"vae must be an image autoencoder of diffusers, got {type(vae).__name__}")
    return channels


def spatial_factor(vae: Autoencoder) -> int:
    """Pixels along one side of the image for each latent along the same side.

    2^(stages - 1), from the lengths of the configuration's channel lists.

    Args:
        vae: The autoencoder.

    Raises:
        ValueError: If the configuration has no such list.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> spatial_factor(AutoencoderTiny())  # four stages
        8
    """
    for name in ("block_out_channels", "encoder_block_out_channels"):
        channels = vae.config.get(name)
        if channels is not None:
            return int(2 ** (len(channels) - 1))
    raise ValueError(f"vae must have block_out_channels in its configuration, {type(vae).__name__} has none")


def latent_scaling(vae: Autoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and scale that standardise the autoencoder's latents, from its configuration.

    z = (latents - shift) * scale, with shift 0 where the configuration gives none.

    Args:
        vae: The autoencoder.

    Returns:
        Shift and scale, each (channels or 1, 1, 1), float32 on the CPU.

    Raises:
        ValueError: If a scale is not finite and above 0.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> shift, scale = latent_scaling(AutoencoderTiny(scaling_factor=0.5))
        >>> shift.item(), scale.item()
        (0.0, 0.5)
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise ValueError(f"the vae must have both latents_mean and latents_std, or neither, got {mean} and {std}")
    if mean is None:
        factor, offset = config.get("scaling_factor"), config.get("shift_factor")
        mean, deviation = [0.0 if offset is None else offset], [1.0 if factor is None else factor]
    else:
        deviation = std
    channels = {1, latent_channels(vae)}
    numbers = [
        value for values in (mean, deviation) for value in (values if isinstance(values, list | tuple) else "?")
    ]
    if (
        not all(type(value) in (int, float) for value in numbers)
        or len(mean) != len(deviation)
        or len(mean) not in channels
    ):
        raise ValueError(f"the vae's scaling must be numbers, one or one a channel, got {mean} and {deviation}")
    shift, scale = torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)
    scale = scale if std is None else 1 / scale
    if not (scale.isfinite().all() and (scale > 0).all() and shift.isfinite().all()):
        raise ValueError(f"the vae's scaling must be finite and above 0, got scale {scale.tolist()}")
    return shift.view(-1, 1, 1), scale.view(-1, 1, 1)


def pad_to_grid(pixel_values: torch.Tensor, vae: Autoencoder, multiple: int = 1) -> torch.Tensor:
    """Images with their edge repeated on all sides, up to the next size that the autoencoder's grid fits.

    Args:
        pixel_values: (batch, channels, height, width) images.
        vae: The autoencoder.
        multiple: What the sides of the grid shall be multiples of, for a flow with patches of several latents.

    Returns:
        (batch, channels, padded height, padded width), the image in the middle.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> pad_to_grid(torch.zeros(1, 3, 28, 28), AutoencoderTiny()).shape
        torch.Size([1, 3, 32, 32])
    """
    factor = spatial_factor(vae) * multiple
    missing = [-side % factor for side in pixel_values.shape[-2:]]
    if not any(missing):
        return pixel_values
    (top, left), (height, width) = ((count // 2 for count in missing), missing)
    return functional.pad(pixel_values, (left, width - left, top, height - top), mode="replicate")


def crop_to_size(pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of images: takes away what [`pad_to_grid`] put on.

    Args:
        pixel_values: (batch, channels, height, width) images.
        size: Height and width to keep.

    Raises:
        ValueError: If the images are smaller.

    Example:
        >>> crop_to_size(torch.zeros(1, 3, 32, 32), (28, 28)).shape
        torch.Size([1, 3, 28, 28])
    """
    height, width = pixel_values.shape[-2:]
    if height < size[0] or width < size[1]:
        raise ValueError(f"size must be at most {height}x{width}, the autoencoder's output, got {size[0]}x{size[1]}")
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pixel_values[..., top : top + size[0], left : left + size[1]]


def image_channels(vae: Autoencoder) -> int:
    """Channels of the images that the autoencoder takes and gives.

    Args:
        vae: The autoencoder.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> image_channels(AutoencoderTiny(in_channels=1, out_channels=1))
        1
    """
    return int(vae.config["in_channels"])


def image_shape(
    vae: Autoencoder | None, config: TarFlowConfig, image_size: int | Sequence[int] | None = None
) -> tuple[int, int]:
    """Height and width of the images of a model of pixels or, with an autoencoder, of latents.

    Args:
        vae: The autoencoder, or None.
        config: The flow's configuration, of pixels or of the grid of latents.
        image_size: Side, or height and width, to cut the autoencoder's images to. None: they stay whole.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> image_shape(AutoencoderTiny(), TarFlowConfig(image_size=4, num_channels=4), image_size=28)
        (28, 28)
    """
    if vae is not None and image_size is not None:
        return height_and_width(image_size)
    factor = 1 if vae is None else spatial_factor(vae)
    height, width = height_and_width(config.image_size)
    return height * factor, width * factor


def check_autoencoder(
    vae: Autoencoder | None, config: TarFlowConfig, image_size: int | Sequence[int] | None = None
) -> None:
    """Raises ValueError unless an autoencoder's latents are what a flow models.

    Args:
        vae: The autoencoder, or None for a flow of pixels.
        config: The flow's configuration.
        image_size: Side, or height and width, to cut the autoencoder's images to.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> check_autoencoder(AutoencoderTiny(latent_channels=4), TarFlowConfig(num_channels=3))
        Traceback (most recent call last):
            ...
        ValueError: transformer must have num_channels=4, the latent channels of the vae, got 3
    """
    if vae is None:
        if image_size is not None:
            raise ValueError(f"image_size must be None without vae: it is the transformer's, got {image_size}")
        return
    channels, factor = latent_channels(vae), spatial_factor(vae)
    latent_scaling(vae)
    if config.num_channels != channels:
        raise ValueError(
            f"transformer must have num_channels={channels}, the latent channels of the vae, got {config.num_channels}"
        )
    for side, wanted in zip(height_and_width(config.image_size), image_shape(vae, config, image_size), strict=True):
        cell = factor * config.patch_size
        if not side * factor - cell < wanted <= side * factor:
            raise ValueError(
                f"image_size must be {side * factor - cell + 1} to {side * factor} for a grid of {side} latents of "
                f"{factor} pixels each in patches of {config.patch_size}, got {wanted}"
            )


def posterior_moments(vae: Autoencoder, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the encoder's distribution, not standardised; None for a deterministic encoder.

    Args:
        vae: The autoencoder.
        pixel_values: (batch, channels, height, width) images in [-1, 1], of a size that fits the grid.

    Returns:
        Two (batch, latent channels, rows, columns), or one and None.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> mean, std = posterior_moments(AutoencoderTiny().eval(), torch.zeros(1, 3, 32, 32))
        >>> mean.shape, std
        (torch.Size([1, 4, 4, 4]), None)
    """
    encoded = cast(Any, vae).encode(pixel_values)
    distribution = getattr(encoded, "latent_dist", None)
    if distribution is not None:
        return distribution.mean, distribution.std
    return (encoded.latent if hasattr(encoded, "latent") else encoded.latents), None


def encode_moments(
    vae: Autoencoder, pixel_values: torch.Tensor, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the standardised latents of images, which are padded where they need be.

    Args:
        vae: The autoencoder, in evaluation mode.
        pixel_values: (batch, channels, height, width) images in [-1, 1].
        multiple: As in [`pad_to_grid`].

    Returns:
        Mean and standard deviation, each (batch, latent channels, rows, columns) float32; None in place of the
        standard deviation for a deterministic encoder.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> mean, std = encode_moments(AutoencoderTiny().eval(), torch.zeros(1, 3, 28, 28))
        >>> mean.shape, std
        (torch.Size([1, 4, 4, 4]), None)
    """
    shift, scale = (value.to(pixel_values.device) for value in latent_scaling(vae))
    mean, std = posterior_moments(vae, pad_to_grid(pixel_values, vae, multiple).to(vae.dtype))
    return (mean.float() - shift) * scale, None if std is None else std.float() * scale


def flow_input(
    images: PIL.Image.Image | Sequence[PIL.Image.Image] | torch.Tensor,
    vae: Autoencoder | None,
    config: TarFlowConfig,
    image_size: int | Sequence[int] | None,
    device: torch.device,
) -> torch.Tensor:
    """Images as a flow takes them: pixel values in [-1, 1], the autoencoder's standardised latents, or scaled arrays.

    Args:
        images: Pictures of any size and mode, or a (images, channels, height, width) tensor in [-1, 1] as it is. Of a
            flow of arrays such a tensor in the units of the data.
        vae: The autoencoder, or None.
        config: The flow's configuration.
        image_size: Side, or height and width, of an autoencoder's images. None: of its whole grid.
        device: Where the flow is.

    Raises:
        ValueError: If a tensor has not the size of the autoencoder's images, or a flow of arrays gets pictures.

    Example:
        >>> import PIL.Image
        >>> from diffusers import AutoencoderTiny
        >>> picture, config = PIL.Image.new("RGB", (50, 40)), TarFlowConfig(image_size=4, num_channels=4)
        >>> flow_input(picture, AutoencoderTiny().eval(), config, 28, torch.device("cpu")).shape
        torch.Size([1, 4, 4, 4])
    """
    channels = config.num_channels if vae is None else image_channels(vae)
    shape = image_shape(vae, config, image_size)
    if config.value_scale is not None and not isinstance(images, torch.Tensor):
        raise ValueError(f"images of a flow of arrays must be a tensor in the units of the data, got {images!r:.60}")
    images = preprocess_images(images, shape, channels, config.resize).to(device)
    if config.value_scale is not None:
        return to_model_units(images, config)
    if vae is None:
        return images
    if not len(images):
        return images.new_zeros(0, config.num_channels, *height_and_width(config.image_size))
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
    if tuple(images.shape[1:]) != (channels, *shape):
        expected = f"{channels}x{shape[0]}x{shape[1]}"
        raise ValueError(f"images must be (images, channels, height, width) of {expected}, got {tuple(images.shape)}")
    with torch.no_grad():
        return encode_moments(vae, images, config.patch_size)[0]


def decode_latents(vae: Autoencoder, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images of standardised latents, d(z / scale + shift), cut to a size. The autoencoder's slicing and tiling hold.

    Args:
        vae: The autoencoder, in evaluation mode.
        latents: (batch, latent channels, rows, columns) standardised latents z.
        size: Height and width of the images.

    Returns:
        (batch, channels, height, width) float32 images, about [-1, 1] and not clipped.

    Raises:
        ValueError: If the autoencoder's output is smaller than `size`.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> decode_latents(AutoencoderTiny().eval(), torch.zeros(1, 4, 4, 4), (28, 28)).shape
        torch.Size([1, 3, 28, 28])
    """
    shift, scale = (value.to(latents.device) for value in latent_scaling(vae))
    decoded = cast(Any, vae).decode((latents.float() / scale + shift).to(vae.dtype)).sample
    return crop_to_size(decoded.float(), size)


__all__ = [
    "check_autoencoder",
    "crop_to_size",
    "decode_latents",
    "encode_moments",
    "flow_input",
    "image_channels",
    "image_shape",
    "latent_channels",
    "latent_scaling",
    "pad_to_grid",
    "posterior_moments",
    "spatial_factor",
]

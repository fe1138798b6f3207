"""Image files to 8-bit tensors of one size, and 8-bit tensors to [-1, 1] and back. Pillow, NumPy and torch only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from os import PathLike
from typing import get_args

import numpy as np
import torch
from PIL import Image

from tarflow_hf.configuration_tarflow import NoiseType, height_and_width
from tarflow_hf.images.arguments import ResizeMethod
from tarflow_hf.images.reading import convert_image, open_image

_MAX_CUT_AWAY = 4  # how many times the crop an image is resized to as a whole


@dataclass(frozen=True)
class ImageFormat:
    """What every image of a data set is turned into.

    Args:
        image_size: Side of a square image in pixels, at least 1, or (height, width).
        num_channels: 1 for grey or 3 for RGB.
        resize: `"short_side"` or `"adm"`, see [`resize_and_crop`].

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> ImageFormat(image_size=64, num_channels=3)
        ImageFormat(image_size=64, num_channels=3, resize='short_side')
        >>> ImageFormat(image_size=64, num_channels=4)
        Traceback (most recent call last):
            ...
        ValueError: images can be read with num_channels 1 (grey) or 3 (RGB), got 4
    """

    image_size: int | Sequence[int]
    num_channels: int
    resize: ResizeMethod = "short_side"

    def __post_init__(self) -> None:
        height_and_width(self.image_size)  # checks it
        if isinstance(self.num_channels, bool) or self.num_channels not in (1, 3):
            raise ValueError(f"images can be read with num_channels 1 (grey) or 3 (RGB), got {self.num_channels}")
        if self.resize not in get_args(ResizeMethod):
            raise ValueError(f"resize must be {' or '.join(map(repr, get_args(ResizeMethod)))}, got {self.resize!r}")


def resize_and_crop(
    image: Image.Image, image_size: int | Sequence[int], method: ResizeMethod = "short_side"
) -> Image.Image:
    """Resizes an image so that it just covers `image_size`, its short side for a square, and crops the centre.

    - `"short_side"`: one antialiased bilinear resize, as in TarFlow's own training; the long side is rounded down.
    - `"adm"`: halved by box averaging while both sides are at least twice those asked for, then bicubic; the long side
      is rounded to the nearest pixel. This is the preprocessing behind most published ImageNet numbers.

    Args:
        image: The image; it is returned as it is where it already has the size.
        image_size: Side of the result in pixels, or (height, width).
        method: How to resize.

    Returns:
        The image, `image_size` large.

    Reference: arXiv 2412.06329 (short side); Dhariwal and Nichol, arXiv 2105.05233, appendix (ADM).

    Example:
        >>> from PIL import Image
        >>> resize_and_crop(Image.new("RGB", (300, 200)), 64, "short_side").size
        (64, 64)
    """
    height, width = height_and_width(image_size)
    if image.size == (width, height):
        return image
    if method == "adm":
        while image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(width / image.width, height / image.height)
        resized = round(image.width * scale), round(image.height * scale)
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        return _resized_part(image, resized, (left, top, left + width, top + height), Image.Resampling.BICUBIC)
    side, short = (height, image.height) if height * image.width >= width * image.height else (width, image.width)
    resized = side * image.width // short, side * image.height // short
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return _resized_part(image, resized, (left, top, left + width, top + height), Image.Resampling.BILINEAR)


def _resized_part(
    image: Image.Image, resized: tuple[int, int], part: tuple[int, int, int, int], resampling: Image.Resampling
) -> Image.Image:
    """What `image.resize(resized, resampling).crop(part)` gives, at the cost of the part alone for long thin images.

    Those are cut in coordinates of the source first. Pillow keeps such coordinates in single precision: a level may
    then differ by one from the literal way, which ordinary images take.
    """
    size = part[2] - part[0], part[3] - part[1]
    if resized[0] * resized[1] <= _MAX_CUT_AWAY * size[0] * size[1]:
        return image.resize(resized, resampling).crop(part)
    start, stop, box = [0, 0], [0, 0], [0.0] * 4
    for axis in range(2):
        scale = image.size[axis] / resized[axis]
        reach = 2 * max(scale, 1.0) + 1  # of the wider filter, bicubic
        low, high = part[axis] * scale, part[axis + 2] * scale
        start[axis], stop[axis] = max(floor(low - reach), 0), min(ceil(high + reach), image.size[axis])
        box[axis], box[axis + 2] = low - start[axis], min(high, image.size[axis]) - start[axis]
    return image.crop((start[0], start[1], stop[0], stop[1])).resize(
        size, resampling, box=(box[0], box[1], box[2], box[3])
    )


def preprocess_image(source: bytes | str | PathLike[str] | Image.Image, image_format: ImageFormat) -> torch.Tensor:
    """One image file as an 8-bit tensor: opened, converted, resized and cropped.

    Args:
        source: The bytes of an image file, its path, or an opened image.
        image_format: Size, channels and way of resizing.

    Returns:
        (channels, height, width) uint8 levels 0 ... 255.

    Raises:
        OSError: If the image cannot be read.
        ValueError: If its mode cannot be converted.

    Example:
        >>> from PIL import Image
        >>> photo = Image.new("RGB", (300, 200), "white")
        >>> levels = preprocess_image(photo, ImageFormat(image_size=64, num_channels=1))
        >>> levels.shape, levels.dtype, int(levels.min())
        (torch.Size([1, 64, 64]), torch.uint8, 255)
    """
    image = source if isinstance(source, Image.Image) else open_image(source)
    image = convert_image(image, image_format.num_channels)
    image = resize_and_crop(image, image_format.image_size, image_format.resize)
    levels = torch.from_numpy(np.array(image))
    return levels[None] if image_format.num_channels == 1 else levels.movedim(-1, 0).contiguous()


def preprocess_images(
    images: object, image_size: int | Sequence[int], num_channels: int, resize: ResizeMethod = "short_side"
) -> torch.Tensor:
    """Pixel values of what a user hands over as images: pictures, or a tensor that is taken as it is.

    Args:
        images: An opened image or a list of them, prepared as by [`preprocess_image`]; or finite (images, channels,
            height, width) pixel values.
        image_size: Side that pictures get, or (height, width).
        num_channels: 1 or 3: grey or RGB pictures.
        resize: How pictures are resized, see [`resize_and_crop`].

    Returns:
        (images, channels, height, width) pixel values in [-1, 1].

    Raises:
        ValueError: If the images are anything else or not finite.

    Example:
        >>> from PIL import Image
        >>> preprocess_images([Image.new("RGB", (300, 200), "white")], 64, 1).unique()
        tensor([1.])
        >>> preprocess_images("photo.png", 64, 1)
        Traceback (most recent call last):
            ...
        ValueError: images must be PIL images or a (images, channels, height, width) tensor in [-1, 1], got str
    """
    if isinstance(images, torch.Tensor):
        finite = images.isfinite()
        if not finite.all():
            place = (~finite).nonzero()[0].tolist()
            raise ValueError(f"images must be finite, got others in image {place[0] if place else 0}")
        return images
    pictures = list(images) if isinstance(images, (list, tuple)) else [images]
    kinds = {type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)}
    if kinds:
        got = " and ".join(sorted(kinds))
        raise ValueError(
            f"images must be PIL images or a (images, channels, height, width) tensor in [-1, 1], got {got}"
        )
    if not pictures:
        return torch.zeros(0, num_channels, *height_and_width(image_size))
    image_format = ImageFormat(image_size, num_channels, resize)
    levels = [preprocess_image(picture, image_format) for picture in pictures if isinstance(picture, Image.Image)]
    return to_pixel_values(torch.stack(levels))


def to_pixel_values(levels: torch.Tensor) -> torch.Tensor:
    """8-bit levels k as float32 pixel values x = k / 127.5 - 1 in [-1, 1].

    Args:
        levels: uint8 levels 0 ... 255 of any shape.

    Returns:
        float32 pixel values of the same shape.

    Example:
        >>> to_pixel_values(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([-1.0000, -0.6000,  1.0000])
    """
    return levels.float() / 127.5 - 1


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """Values in float64: on their device, or on the CPU where that has none (MPS).

    Args:
        values: Of any shape.

    Example:
        >>> in_float64(torch.zeros(2)).dtype
        torch.float64
    """
    return (values.cpu() if values.device.type == "mps" else values).double()


def to_levels(pixel_values: torch.Tensor, noise_type: NoiseType = "gaussian") -> torch.Tensor:
    """Pixel values x as 8-bit levels k, read as the model's noise wrote them; values outside take the end levels.

    gaussian: the nearest, k = round(127.5 (x + 1)). uniform: the cell that x lies in, k = floor(128 (x + 1)), which
    undoes [`noise.dequantize`]. Both give k back for x = k / 127.5 - 1.

    Args:
        pixel_values: Finite floating-point pixel values of any shape.
        noise_type: Noise that the model was trained with.

    Returns:
        uint8 levels of the same shape.

    Example:
        >>> to_levels(torch.tensor([-1.0, -0.6, 1.2]))
        tensor([  0,  51, 255], dtype=torch.uint8)
        >>> to_levels(torch.tensor([-0.993, 0.998]), noise_type="uniform")  # cells of 0 and 255
        tensor([  0, 255], dtype=torch.uint8)
    """
    if noise_type == "uniform":
        return ((in_float64(pixel_values) + 1) * 128).floor().clamp(0, 255).to(pixel_values.device, torch.uint8)
    return ((pixel_values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_shown(pixel_values: torch.Tensor, noise_type: NoiseType) -> torch.Tensor:
    """Samples of a model as pixel values x = k / 127.5 - 1 of the levels that they stand for.

    Those of Gaussian noise stay as they are, on no grid; so do numbers that are not finite.

    Args:
        pixel_values: What the model gives, about [-1, 1], of any shape.
        noise_type: Noise that the model was trained with, see [`to_levels`].

    Returns:
        Pixel values of the same shape and dtype.

    Example:
        >>> as_shown(torch.tensor([-0.993, 0.998]), "uniform")  # black is black, and white white
        tensor([-1.,  1.])
    """
    if noise_type != "uniform":
        return pixel_values
    finite = pixel_values.isfinite()
    levels = to_levels(torch.where(finite, pixel_values, 0.0), noise_type)
    return torch.where(finite, to_pixel_values(levels).to(pixel_values.dtype), pixel_values)


__all__ = [
    "ImageFormat",
    "ResizeMethod",
    "as_shown",
    "in_float64",
    "preprocess_image",
    "preprocess_images",
    "resize_and_crop",
    "to_levels",
    "to_pixel_values",
]

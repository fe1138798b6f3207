"""Image files to 8-bit tensors of one size, and 8-bit tensors to [-1, 1] and back. Pillow, NumPy and torch only."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageOps

from tarflow_hf.configuration_tarflow import height_and_width
from tarflow_hf.images.arguments import ResizeMethod

_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


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
        if self.num_channels not in (1, 3):
            raise ValueError(f"images can be read with num_channels 1 (grey) or 3 (RGB), got {self.num_channels}")
        if self.resize not in get_args(ResizeMethod):
            raise ValueError(f"resize must be {' or '.join(map(repr, get_args(ResizeMethod)))}, got {self.resize!r}")


def open_image(source: bytes | str | PathLike[str]) -> Image.Image:
    """Opens and fully decodes an image, so that a damaged file is noticed here and not later.

    Args:
        source: The bytes of an image file, or its path.

    Returns:
        The image, decoded.

    Raises:
        OSError: If the image cannot be read: missing, truncated or of an unknown format.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (12, 8)).save("photo.png")
        >>> open_image("photo.png").size
        (12, 8)
    """
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        return image


def convert_image(image: Image.Image, num_channels: int) -> Image.Image:
    """Turns an image of any mode upright and into 8-bit grey or RGB.

    - The EXIF orientation is applied.
    - Transparent pixels are laid over white. Dropping the alpha channel would show whatever colour an editor left
      under the transparent pixels, often black or random, and white is what a page shows behind such an image.
    - 16-bit levels v become round(v / 257), so that 65535 becomes 255; Pillow's own conversion would clip at 255.
    - Palette, CMYK, YCbCr and 1-bit images are converted by Pillow; grey from colour is the ITU-R 601-2 luma.

    Args:
        image: An image of any mode but floating point, whose range is unknown.
        num_channels: 1 for mode "L", 3 for mode "RGB".

    Returns:
        The image in mode "L" or "RGB".

    Raises:
        ValueError: If the mode cannot be converted.

    Example:
        >>> from PIL import Image
        >>> see_through = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
        >>> convert_image(see_through, num_channels=3).getpixel((0, 0))  # white shows through
        (255, 255, 255)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _from_sixteen_bits(image)
    elif image.mode == "F":
        raise ValueError("cannot convert a floating-point image (mode 'F'): the range of its levels is unknown")
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if num_channels == 1 else "RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    levels = np.array(image).astype(np.int64)
    low, high = levels.min(), levels.max()
    if low < 0 or high > 65535:
        raise ValueError(f"cannot convert an image of mode {image.mode!r} with levels {low} ... {high} beyond 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


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
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
    else:
        side, short = (height, image.height) if height * image.width >= width * image.height else (width, image.width)
        image = image.resize((side * image.width // short, side * image.height // short), Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


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


def to_levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixel values x as the nearest 8-bit levels k = round(127.5 (x + 1)); values outside [-1, 1] take the end levels.

    Args:
        pixel_values: Floating-point pixel values of any shape.

    Returns:
        uint8 levels of the same shape.

    Example:
        >>> to_levels(torch.tensor([-1.0, -0.6, 1.2]))
        tensor([  0,  51, 255], dtype=torch.uint8)
    """
    return ((pixel_values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


__all__ = [
    "ImageFormat",
    "ResizeMethod",
    "convert_image",
    "open_image",
    "preprocess_image",
    "resize_and_crop",
    "to_levels",
    "to_pixel_values",
]

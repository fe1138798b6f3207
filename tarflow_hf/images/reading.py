"""Image files of every kind and mode to upright 8-bit grey or RGB: what a viewer shows, or an error that says why."""

from io import BytesIO
from os import PathLike

import numpy as np
from PIL import Image

_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # the EXIF tag
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def open_image(source: bytes | str | PathLike[str]) -> Image.Image:
    """Opens and fully decodes an image, so that a damaged file is noticed here and not later.

    Of an animation or a file of several pages the first picture is taken.

    Args:
        source: The bytes of an image file, or its path.

    Returns:
        The image, decoded.

    Raises:
        OSError: If the image cannot be read: missing, truncated, damaged, of an unknown format, or of more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`.
        ValueError: If this is neither.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (12, 8)).save("photo.png")
        >>> open_image("photo.png").size
        (12, 8)
    """
    if not isinstance(source, bytes | str | PathLike):
        raise ValueError(f"an image must be the bytes of a file or its path, got {type(source).__name__}")
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise OSError(
                    f"an image of {image.width}x{image.height} pixels is above the limit of {limit:,} pixels"
                )
            raw_mode = image.tile[0][3] if image.tile else None
            image.load()
    except (OSError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OSError(str(error)) from error
    except Exception as error:  # formats report damage by SyntaxError, struct.error, IndexError, zlib.error and others
        raise OSError(f"damaged image: {type(error).__name__}: {error}") from error
    _scale_transparency(image, raw_mode[0] if isinstance(raw_mode, tuple) and raw_mode else raw_mode)
    return image


def _scale_transparency(image: Image.Image, raw_mode: object) -> None:
    """Brings the transparent level of a PNG to the 8 bits that its levels were brought to.

    Pillow keeps it in the bits of the file. Colours of 16 bits cannot be told apart any more once they have 8.
    """
    transparent = image.info.get("transparency")
    if transparent is None or not isinstance(raw_mode, str):
        return
    if raw_mode == "RGB;16B":
        raise OSError("a 16-bit RGB image with a transparent colour (tRNS) cannot be read exactly; save it as RGBA")
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = transparent * 255 // (2 ** int(raw_mode[2:]) - 1)


def convert_image(image: Image.Image, num_channels: int) -> Image.Image:
    """Turns an image of any mode upright and into 8-bit grey or RGB.

    - The EXIF orientation is applied; a damaged EXIF block is taken as none.
    - Transparent pixels are laid over white. Dropping the alpha channel would show whatever colour an editor left
      under the transparent pixels, often black or random, and white is what a page shows behind such an image.
    - 16-bit levels v become round(v / 257), so that 65535 becomes 255; Pillow's own conversion would clip at 255.
    - Palette, CMYK, YCbCr, Lab, HSV and 1-bit images are converted by Pillow, without colour profiles; grey from
      colour is the ITU-R 601-2 luma.

    Args:
        image: An image of any mode but floating point, whose range is unknown.
        num_channels: 1 for mode "L", 3 for mode "RGB".

    Returns:
        The image in mode "L" or "RGB".

    Raises:
        ValueError: If the mode cannot be converted, or there is no pixel.

    Example:
        >>> from PIL import Image
        >>> see_through = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
        >>> convert_image(see_through, num_channels=3).getpixel((0, 0))  # white shows through
        (255, 255, 255)
    """
    if min(image.size) < 1:
        raise ValueError(f"an image must have pixels, got {image.width}x{image.height}")
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _from_sixteen_bits(image)
    elif image.mode == "F":
        raise ValueError("cannot convert a floating-point image (mode 'F'): the range of its levels is unknown")
    elif image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"cannot convert an image of mode {image.mode!r}")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("L" if num_channels == 1 else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged block beside a sound picture; Pillow's errors are of many types
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    levels = np.array(image).astype(np.int64)
    low, high = levels.min(), levels.max()
    if low < 0 or high > 65535:
        raise ValueError(f"cannot convert an image of mode {image.mode!r} with levels {low} ... {high} beyond 16 bits")
    grey = ((levels + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


__all__ = ["convert_image", "open_image"]

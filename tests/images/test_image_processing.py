"""Images of every mode become upright 8-bit squares, resized as the two published ways say."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_hf.images.processing import (
    ImageFormat,
    preprocess_image,
    resize_and_crop,
    to_levels,
    to_pixel_values,
)
from tarflow_hf.images.reading import convert_image, open_image


def noise_image(width, height, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(image, x=0, y=0):
    return image.getpixel((x, y))


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((500, 375), (85, 64), (10, 0)),  # 64 * 500 / 375 = 85.33 rounds down; (85 - 64) / 2 = 10.5 rounds to even
        ((375, 500), (64, 85), (0, 10)),
        ((64, 67), (64, 67), (0, 2)),  # 1.5 rounds to even: 2
        ((100, 100), (64, 64), (0, 0)),
        ((20, 30), (64, 96), (0, 16)),  # small images are enlarged
    ],
)
def test_short_side_resize_is_one_bilinear_resize_and_a_centre_crop(size, resized, corner):
    image = noise_image(*size)
    expected = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = corner
    expected = expected.crop((left, top, left + 64, top + 64))
    assert np.array_equal(np.array(resize_and_crop(image, 64)), np.array(expected))


def test_an_image_of_the_right_size_is_untouched():
    image = noise_image(64, 64)
    for method in ("short_side", "adm"):
        assert np.array_equal(np.array(resize_and_crop(image, 64, method)), np.array(image))


def test_adm_halves_by_box_averages_until_below_twice_the_size():
    image = noise_image(256, 256, "L")
    levels = np.array(image).astype(float)
    for _ in range(2):
        levels = np.floor(0.5 + levels.reshape(len(levels) // 2, 2, -1, 2).mean((1, 3)))
    result = np.array(resize_and_crop(image, 64, "adm")).astype(float)
    assert result.shape == (64, 64)
    assert np.abs(result - levels).max() <= 2  # Pillow rounds after each direction


def test_adm_ends_with_a_bicubic_resize_of_the_halved_image():
    image = noise_image(500, 375)
    halved = image.resize((250, 187), Image.Resampling.BOX)
    expected = halved.resize((round(250 * 100 / 187), 100), Image.Resampling.BICUBIC)
    left = (expected.width - 100) // 2
    expected = expected.crop((left, 0, left + 100, 100))
    result = resize_and_crop(image, 100, "adm")
    assert np.array_equal(np.array(result), np.array(expected))
    assert not np.array_equal(np.array(result), np.array(resize_and_crop(image, 100)))


def test_transparent_pixels_are_laid_over_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    converted = convert_image(rgba, 3)
    assert (pixel(converted), pixel(converted, 1)) == ((255, 0, 0), (255, 255, 255))
    half = convert_image(Image.new("LA", (1, 1), (0, 128)), 1)
    assert pixel(half) == 127
    assert pixel(convert_image(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), 1)) == 255


def test_palette_images_keep_their_colours_and_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    assert pixel(convert_image(palette, 3)) == (200, 100, 50)
    transparent = open_image(encoded(palette, "PNG", transparency=1))
    converted = convert_image(transparent, 3)
    assert (pixel(converted), pixel(converted, 1)) == ((200, 100, 50), (255, 255, 255))


def test_cmyk_and_one_bit_images_become_colours_and_greys():
    assert pixel(convert_image(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), 3)) == (0, 255, 255)
    assert pixel(convert_image(Image.new("1", (1, 1), 1), 1)) == 255


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_and_not_clipped(dtype):
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=dtype)
    image = Image.fromarray(levels)
    if dtype == np.uint16:
        image = open_image(encoded(image, "PNG"))
    assert image.mode in ("I;16", "I")
    assert np.array(convert_image(image, 1)).tolist() == [[0, 1, 128, 255]]
    assert np.array(convert_image(image, 3))[0, 2].tolist() == [128, 128, 128]


def test_levels_beyond_sixteen_bits_and_floats_are_refused():
    with pytest.raises(ValueError, match="beyond 16 bits"):
        convert_image(Image.fromarray(np.array([[70000]], dtype=np.int32)), 1)
    with pytest.raises(ValueError, match="floating-point"):
        convert_image(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), 1)


def test_exif_orientation_is_applied():
    image = Image.new("L", (2, 1))
    image.putpixel((1, 0), 255)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = convert_image(open_image(encoded(image, "PNG", exif=exif)), 1)
    assert np.array(upright).tolist() == [[0], [255]]


def test_a_truncated_or_foreign_file_is_an_error():
    whole = encoded(noise_image(40, 40), "JPEG")
    for broken in (whole[: len(whole) // 2], b"no image at all", b""):
        with pytest.raises(OSError, match=r"truncated|cannot identify"):
            open_image(broken)


@pytest.mark.parametrize(("num_channels", "mode"), [(1, "RGB"), (3, "L"), (1, "L"), (3, "RGB")])
def test_preprocessing_gives_channels_first_levels(num_channels, mode):
    image = noise_image(13, 9, mode)
    levels = preprocess_image(encoded(image, "PNG"), ImageFormat(8, num_channels))
    assert (levels.shape, levels.dtype) == ((num_channels, 8, 8), torch.uint8)
    expected = np.array(resize_and_crop(image.convert("RGB" if num_channels == 3 else "L"), 8))
    assert np.array_equal(levels.numpy(), expected.reshape(8, 8, num_channels).transpose(2, 0, 1))


def test_levels_and_pixel_values_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    pixel_values = to_pixel_values(levels)
    assert (pixel_values[0], pixel_values[255]) == (-1, 1)
    assert torch.equal(to_levels(pixel_values), levels)
    assert to_levels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 3), "image_size must be at least 1"), ((8, 2), "num_channels 1"), ((8, 3, "nearest"), "resize must be")],
)
def test_an_image_format_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageFormat(*arguments)

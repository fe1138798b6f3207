"""Images of every mode, size and kind of damage: what a viewer shows comes out, or an error names the reason."""

import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from png_files import BOMB, chunk, png
from test_image_processing import encoded, noise_image

from tarflow_hf.images.processing import ImageFormat, preprocess_image, preprocess_images, resize_and_crop
from tarflow_hf.images.reading import convert_image, open_image


def pixels(bits, colour, rows, *, transparent=None, size=(2, 1), extra=b""):
    """A PNG of any bit depth, with a transparent colour if one is given."""
    transparency = b"" if transparent is None else chunk(b"tRNS", transparent)
    return png(*size, bits, colour, rows, extra=extra + transparency)


def literal(image, size, method):
    """The whole image resized, then cropped."""
    short = min(image.size)
    if method == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
    else:
        image = image.resize(tuple(size * side // short for side in image.size), Image.Resampling.BILINEAR)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("method", ["short_side", "adm"])
def test_ordinary_sizes_take_the_literal_way(method):
    chance = np.random.default_rng(0)
    for index in range(60):
        short = int(chance.integers(3, 160))
        sides = [short, int(short * chance.uniform(1, 3.9))]
        image = noise_image(*(sides if index % 2 else sides[::-1]), seed=index)
        size = int(chance.integers(2, 80))
        found = np.array(resize_and_crop(image, size, method))
        assert np.array_equal(found, literal(image, size, method)), (image.size, size)


@pytest.mark.parametrize("method", ["short_side", "adm"])
@pytest.mark.parametrize("shape", [(10, 700), (700, 10), (3, 90), (129, 1500), (1, 400), (31, 2001)])
def test_long_strips_are_cut_first_and_differ_by_a_level_at_most(method, shape):
    image = noise_image(*shape)
    for size in (8, 33):
        found = np.array(resize_and_crop(image, size, method)).astype(int)
        expected = literal(image, size, method).astype(int)
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.02


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 4), (1, 60_000)])
@pytest.mark.parametrize("method", ["short_side", "adm"])
def test_a_strip_never_becomes_larger_than_its_crop(size, method, monkeypatch):
    made = []
    resize = Image.Image.resize

    def watched(image, size, *arguments, **options):
        made.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    levels = preprocess_image(encoded(Image.new("RGB", size, (10, 20, 30)), "PNG"), ImageFormat(256, 3, method))
    assert levels.amax((1, 2)).tolist() == levels.amin((1, 2)).tolist() == [10, 20, 30]
    assert max(made) == 256 * 256


SHOWN = [  # mode, colour, what a viewer shows over white
    ("1", 1, (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("LA", (0, 128), (127, 127, 127)),
    ("La", (64, 128), (191, 191, 191)),
    ("PA", (3, 0), (255, 255, 255)),
    ("RGB", (9, 8, 7), (9, 8, 7)),
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
    ("RGBa", (0, 0, 0, 128), (127, 127, 127)),
    ("RGBX", (9, 8, 7, 0), (9, 8, 7)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("YCbCr", (255, 128, 128), (255, 255, 255)),
    ("LAB", (255, 128, 128), (255, 255, 255)),
    ("HSV", (0, 255, 255), (255, 0, 0)),
    ("I", 65535, (255, 255, 255)),
    ("I;16", 257 * 3, (3, 3, 3)),
    ("I;16B", 257 * 3, (3, 3, 3)),
    ("I;16L", 257 * 3, (3, 3, 3)),
    ("I;16N", 257 * 3, (3, 3, 3)),
]


@pytest.mark.parametrize(("mode", "colour", "shown"), SHOWN, ids=[row[0] for row in SHOWN])
def test_every_mode_of_pillow_comes_out_as_a_viewer_shows_it(mode, colour, shown):
    image = Image.new(mode, (2, 3))
    image.paste(colour, (0, 0, 2, 3)) if mode not in ("La", "RGBa", "I;16L", "I;16N") else None
    if mode in ("La", "RGBa"):
        image = Image.frombytes(mode, (2, 3), bytes(colour) * 6)
    elif mode in ("I;16L", "I;16N"):
        image = Image.frombytes(mode, (2, 3), np.full(6, colour, dtype="<u2").tobytes())
    assert np.abs(np.array(convert_image(image, 3)).astype(int) - shown).max() <= 1
    grey = np.array(convert_image(image, 1)).astype(int)
    assert np.abs(grey - np.dot(shown, [0.299, 0.587, 0.114])).max() <= 2


def test_a_palette_with_alpha_is_laid_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 0, 1, 2, 3, 255], "RGBA")
    palette.putpixel((1, 0), 1)
    assert [convert_image(palette, 3).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (1, 2, 3)]


@pytest.mark.parametrize(
    ("bits", "rows", "transparent", "levels"),
    [
        (16, struct.pack(">HH", 1000, 40000), 40000, [4, 255]),
        (4, bytes([0x2F]), 2, [255, 255]),
        (4, bytes([0x24]), 4, [34, 255]),
        (2, bytes([0b00100000]), 0, [255, 170]),
        (1, bytes([0b01000000]), 0, [255, 255]),
        (8, bytes([7, 9]), 9, [7, 255]),
    ],
)
def test_the_transparent_grey_of_a_png_is_white_at_every_bit_depth(bits, rows, transparent, levels):
    data = pixels(bits, 0, b"\0" + rows, transparent=struct.pack(">H", transparent))
    assert np.array(convert_image(open_image(data), 1)).tolist() == [levels]
    assert np.array(convert_image(open_image(data), 3))[0, :, 1].tolist() == levels


def test_a_transparent_colour_is_white_with_8_bits_and_refused_with_16():
    shown = convert_image(
        open_image(pixels(8, 2, bytes([0, 1, 2, 3, 9, 9, 9]), transparent=bytes([0, 1, 0, 2, 0, 3]))), 3
    )
    assert np.array(shown)[0].tolist() == [[255, 255, 255], [9, 9, 9]]
    sixteen = pixels(16, 2, b"\0" + struct.pack(">6H", *range(6)), transparent=struct.pack(">3H", 0, 1, 2))
    with pytest.raises(OSError, match="16-bit RGB image with a transparent colour"):
        open_image(sixteen)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage garbage", b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, and reads on
def test_a_damaged_exif_block_does_not_hide_a_sound_picture(exif, kind):
    image = Image.new("RGB", (8, 8), (200, 200, 200))
    levels = preprocess_image(encoded(image, kind, exif=exif), ImageFormat(8, 3))
    assert (levels.float() - 200).abs().max() <= 2


@pytest.mark.parametrize("orientation", [0, 9, 99, 1])
def test_an_orientation_that_means_nothing_turns_nothing(orientation):
    image = noise_image(5, 4)
    exif = image.getexif()
    exif[0x0112] = orientation
    assert convert_image(open_image(encoded(image, "PNG", exif=exif)), 3).size == (5, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = orientation
    stored = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the turn that undoes it
    methods = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE"]
    methods.append("ROTATE_90")
    method = methods[stored[orientation] - 1]
    turned = image if method is None else image.transpose(Image.Transpose[method])
    assert np.array_equal(convert_image(open_image(encoded(turned, "PNG", exif=exif)), 1), np.array(image))


def test_a_damaged_colour_profile_is_left_aside():
    image = Image.new("RGB", (4, 4), (9, 9, 9))
    for kind in ("PNG", "JPEG"):
        assert convert_image(open_image(encoded(image, kind, icc_profile=b"no profile")), 1).getpixel((0, 0)) == 9


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert preprocess_image(data, ImageFormat(4, 1)).unique().tolist() == [10]


def test_too_many_pixels_are_an_unreadable_image(monkeypatch):
    with pytest.raises(OSError, match="pixels"):
        open_image(BOMB)
    image = encoded(Image.new("1", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # Pillow only warns below twice the limit
    with pytest.raises(OSError, match="pixels"):
        open_image(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(image).size == (100, 100)


def test_a_text_larger_than_any_is_named():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 70_000_000, zip=True)
    with pytest.raises(OSError, match="damaged image: ValueError"):
        open_image(encoded(Image.new("L", (2, 2)), "PNG", pnginfo=text))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000"])
def test_whatever_is_cut_off_or_flipped_is_an_os_error_or_a_picture(kind):
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        return
    whole, messages = encoded(noise_image(32, 32), kind), []
    chance = np.random.default_rng(0)
    for index in range(40):
        data = bytearray(whole[: chance.integers(0, len(whole))] if index % 2 else whole)
        for place in chance.integers(0, max(len(data), 1), 6) if data and not index % 2 else []:
            data[place] = chance.integers(0, 256)
        try:
            assert preprocess_image(bytes(data), ImageFormat(8, 3)).shape == (3, 8, 8)
        except (OSError, ValueError) as error:
            messages.append(str(error))
    assert all(messages)


def test_no_pixels_and_unknown_modes_are_named():
    with pytest.raises(ValueError, match="must have pixels, got 0x5"):
        preprocess_image(Image.new("RGB", (0, 5)), ImageFormat(8, 3))


def test_what_is_taken_as_images():
    picture, array = noise_image(9, 7), np.zeros((4, 4))
    assert preprocess_images([picture, picture], 4, 1).shape == (2, 1, 4, 4)
    assert preprocess_images(picture, 4, 3).shape == (1, 3, 4, 4)
    assert preprocess_images([], 4, 3).shape == (0, 3, 4, 4)
    for given, got in [
        (array, "ndarray"),
        ("a.png", "str"),
        ([array, "x"], "ndarray and str"),
        (None, "None"),
    ]:
        with pytest.raises(ValueError, match=f"images must be PIL images .* got {got}"):
            preprocess_images(given, 4, 1)

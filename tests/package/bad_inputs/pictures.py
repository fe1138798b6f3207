"""Image files, folders of them, and what is handed over as images."""

from io import BytesIO

import datasets
import numpy as np
import torch
from conftest import tiny_model
from PIL import Image
from png_files import BOMB, chunk, png

from bad_inputs import Bad
from tarflow_hf import TarFlowPipeline
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, UnreadableImageError
from tarflow_hf.images.processing import ImageFormat, preprocess_image, resize_and_crop
from tarflow_hf.images.sources import load_image_data


def whole(kind="PNG"):
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def row(name, data, message):
    """A row: the second image of a data set is these bytes, or an image of a mode that cannot be read."""

    def call(folder):
        if isinstance(data, Image.Image):
            data.save(folder / "picture.tiff")
        content = (folder / "picture.tiff").read_bytes() if isinstance(data, Image.Image) else data
        cells = [{"bytes": whole(), "path": None}, None if content is None else {"bytes": content, "path": None}]
        rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(folder / "a.parquet")
        found, _ = load_image_data(DataArguments(data=str(folder / "a.parquet")), class_conditional=False)
        StoredImages(found, ImageFormat(8, 3))[1]

    return Bad(
        name, call, UnreadableImageError, rf"image in row 1 of data set .*a\.parquet.*{message}.*skip_bad_images"
    )


def invert(name, images, message):
    """A row: a pipeline of 8x8 grey images is to invert these."""
    return Bad(
        name,
        lambda folder: TarFlowPipeline(transformer=tiny_model(dtype=torch.float32)).invert(images),
        ValueError,
        message,
    )


def data(name, message, error=ValueError, *, files=(), place=".", class_conditional=True, **options):
    """A row: a folder with these images, or a place that is none, is to be loaded."""

    def call(folder):
        for file in files:
            path = folder / "set" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2)).save(path)
        arguments = DataArguments(data=str(folder / "set" / place) if place == "." else place, **options)
        load_image_data(arguments, class_conditional=class_conditional)

    return Bad(name, call, error, message)


ROWS = [
    row("no image", None, "the row has no image"),
    row("no bytes", b"", "cannot identify"),
    row("text", b"hello", "cannot identify"),
    row("a page", b"<html><body>404</body></html>", "cannot identify"),
    row("cut png", whole()[:200], "truncated"),
    row("cut jpeg", whole("JPEG")[:400], "[Tt]runcated"),
    row("cut gif", whole("GIF")[:100], ""),
    row("cut webp", whole("WEBP")[:100], ""),
    row("a bomb", BOMB, "exceeds limit"),
    row("a smaller bomb", png(10_000, 10_000, 8, 0), "pixels"),
    row("no width", png(0, 5, 8, 0), ""),
    row("an unknown depth", png(2, 2, 7, 0, b"\0\0\0\0"), ""),
    row("a wrong checksum", whole().replace(b"IHDR\0", b"IHDR\1"), ""),
    row("floats", Image.new("F", (2, 2)), "floating-point image"),
    row("32 bits", Image.new("I", (2, 2), 70_000), "beyond 16 bits"),
    row("negative levels", Image.new("I", (2, 2), -1), "beyond 16 bits"),
    row(
        "a transparent colour of 16 bits",
        png(1, 1, 16, 2, b"\0" * 7, extra=chunk(b"tRNS", b"\0" * 6)),
        "16-bit RGB image with a transparent colour",
    ),
    Bad(
        "no pixels",
        lambda folder: preprocess_image(Image.new("L", (0, 3)), ImageFormat(8, 1)),
        ValueError,
        "must have pixels, got 0x3",
    ),
    Bad("no such file", lambda folder: preprocess_image("a.png", ImageFormat(8, 1)), FileNotFoundError, r"a\.png"),
    Bad("two channels", lambda folder: ImageFormat(8, 2), ValueError, r"num_channels 1 \(grey\) or 3 \(RGB\), got 2"),
    Bad(
        "levels for a file",
        lambda folder: preprocess_image(np.zeros((2, 2)), ImageFormat(8, 1)),
        ValueError,
        "got ndarray",
    ),
    Bad("half a size", lambda folder: ImageFormat(8.5, 1), ValueError, "image_size must .* got 8.5"),
    Bad("truth for a size", lambda folder: ImageFormat(True, 1), ValueError, "image_size must .* got True"),
    Bad("truth for channels", lambda folder: ImageFormat(8, True), ValueError, r"num_channels 1 .* got True"),
    Bad("size 0", lambda folder: ImageFormat(0, 1), ValueError, "image_size"),
    Bad("no resize", lambda folder: ImageFormat(8, 1, "nearest"), ValueError, "resize must be .* got 'nearest'"),
    Bad("crop to 0", lambda folder: resize_and_crop(Image.new("L", (2, 2)), 0), ValueError, "image_size"),
    invert("a path", "a.png", "images must be PIL images .* got str"),
    invert("an array", np.zeros((8, 8)), "images must be PIL images .* got ndarray"),
    invert("a list of tensors", [torch.zeros(1, 8, 8)], "images must be PIL images .* got Tensor"),
    invert("nothing", None, "images must be PIL images .* got NoneType"),
    invert("not a number", torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1).expand(2, 1, 8, 8), "image 1"),
    invert("infinite", torch.full((1, 1, 8, 8), float("inf")), "images must be finite, got others in image 0"),
    invert("integers", torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"floating point in \[-1, 1\], got torch.uint8"),
    invert("another size", torch.zeros(1, 1, 4, 4), "shape"),
    data("a flat folder", "0 columns of class labels.*class folders", files=("0.png", "1.png")),
    data("one class folder", "0 columns of class labels.*class folders", files=("a/0.png", "a/1.png")),
    data("classes at several depths", "0 columns of class labels", files=("a/0.png", "b/c/1.png")),
    data(
        "no such split",
        "has no split 'validation', found train",
        files=("a/0.png", "b/1.png"),
        eval_split="validation",
    ),
    data("no such folder", "is no folder", FileNotFoundError, place="./gone"),
    data("no such parquet", "no parquet file matches 'gone.parquet'", FileNotFoundError, place="gone.parquet"),
    data("no such column", "no column 'c', found columns", files=("a/0.png", "b/1.png"), image_column="c"),
]

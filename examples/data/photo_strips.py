"""Strips of photographs, 16 pixels high and 32 wide, with their brightness and contrast: making and measuring.

    python examples/data/photo_strips.py make SOURCE [FOLDER]
    python examples/data/photo_strips.py measure runs/photo_strips --guidance_scale 1 1.5 2

`brightness` is the mean of the levels of a strip and `contrast` their standard deviation, over pixels and channels,
both divided by 255: strong colours have contrast too. `make` cuts the photographs of SOURCE, which is what `data` of a
recipe may be with the splits train and test, into as many strips as fit side by side and below each other. `measure`
draws strips to the brightness and contrast of held-out ones, and tells how near they come; `--picture` shows a strip
for each brightness and contrast of a grid.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from tarflow_hf import TarFlowPipeline, save_image_grid
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.reading import convert_image, open_image
from tarflow_hf.images.sources import ImageData, load_image_data

HEIGHT, WIDTH = 16, 32
COLUMNS = ("brightness", "contrast")
FEATURES = Features({"image": Image(), **{column: Value("float32") for column in COLUMNS}})
FOLDER = Path(__file__).parent / "photo_strips"
_SHOWN = ((0.2, 0.35, 0.5, 0.65, 0.8), (0.05, 0.12, 0.2, 0.28))  # brightness and contrast of the picture


def main(argv: Sequence[str]) -> None:
    """Does what the first word of the command line says."""
    options = parse_arguments(argv)
    options.command(options)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("make", help="cut photographs into strips")
    one.set_defaults(command=make)
    one.add_argument("source", help="photographs, with the splits train and test")
    one.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="[photo_strips beside this script]")
    two = commands.add_parser("measure", help="are samples as bright and as rich in contrast as asked for?")
    two.set_defaults(command=measure)
    two.add_argument("model", help="folder of a saved pipeline, or its name on the Hub")
    two.add_argument(
        "--data", type=Path, default=FOLDER, help="folder of the strips [photo_strips beside this script]"
    )
    two.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    two.add_argument("--num_samples", type=int, default=500, help="held-out strips whose values are asked for [500]")
    two.add_argument("--picture", type=Path, help="PNG file of a grid, at the last guidance scale")
    two.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def brightness_and_contrast(levels: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all 8-bit levels of a strip, divided by 255."""
    return float(levels.mean()) / 255, float(levels.std()) / 255


def strips(photograph: PILImage.Image) -> Iterator[PILImage.Image]:
    """Parts of HEIGHT x WIDTH pixels, line by line; what is left over on the right and below is in none."""
    for top in range(0, photograph.height - HEIGHT + 1, HEIGHT):
        for left in range(0, photograph.width - WIDTH + 1, WIDTH):
            yield photograph.crop((left, top, left + WIDTH, top + HEIGHT))


def rows(data: ImageData) -> Iterator[dict[str, Any]]:
    """The rows of a split."""
    for row in data.rows:
        cell = row[data.image_column]
        photograph = open_image(cell["path"] if cell["bytes"] is None else cell["bytes"])
        for strip in strips(convert_image(photograph, 3)):
            file = BytesIO()
            strip.save(file, "PNG")
            values = brightness_and_contrast(np.asarray(strip))
            yield {"image": {"bytes": file.getvalue(), "path": None}, **dict(zip(COLUMNS, values, strict=True))}


def make(options: argparse.Namespace) -> None:
    """Writes both splits into the folder, over what is there."""
    splits = load_image_data(DataArguments(data=options.source, eval_split="test"), class_conditional=False)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip(("train", "test"), splits, strict=True):
        assert data is not None  # eval_split is named
        found = list(rows(data))
        if not found:
            raise ValueError(
                f"no image of {options.source}, split {name}, has the {HEIGHT} x {WIDTH} pixels of a strip"
            )
        path = options.folder / f"{name}.parquet"
        Dataset.from_list(found, features=FEATURES).to_parquet(path)
        print(f"{path}: {len(found)} strips")


def measure(options: argparse.Namespace) -> None:
    """Prints correlation and error of what was asked for and what is measured, and draws the picture asked for."""
    pipe = TarFlowPipeline.from_pretrained(options.model)
    held_out = load_dataset("parquet", data_files=str(options.data / "test.parquet"), split="train")
    if not 1 <= options.num_samples <= len(held_out):
        raise ValueError(f"num_samples must be from 1 to the {len(held_out)} strips, got {options.num_samples}")
    chosen = np.random.default_rng(options.seed).permutation(len(held_out))[: options.num_samples]
    asked = np.stack([np.array(held_out[column])[chosen] for column in COLUMNS], axis=1)
    for scale in options.guidance_scale:
        found = np.array([brightness_and_contrast(levels) for levels in draw(pipe, asked, scale, options.seed)])
        for index, column in enumerate(COLUMNS):
            correlation = np.corrcoef(asked[:, index], found[:, index])[0, 1]
            error = np.sqrt(np.mean((asked[:, index] - found[:, index]) ** 2))
            print(f"guidance {scale:g}, {column}: correlation {correlation:.4f}, rms error {error:.4f}")
    if options.picture:
        grid = np.array([(brightness, contrast) for contrast in _SHOWN[1] for brightness in _SHOWN[0]])
        images = draw(pipe, grid, options.guidance_scale[-1], options.seed)
        save_image_grid(
            [PILImage.fromarray(levels) for levels in images],
            options.picture,
            columns=len(_SHOWN[0]),
            row_labels=[f"contrast {contrast}" for contrast in _SHOWN[1]],
            column_labels=[f"brightness {brightness}" for brightness in _SHOWN[0]],
        )


def draw(pipe: TarFlowPipeline, conditions: np.ndarray, guidance_scale: float, seed: int) -> np.ndarray:
    """(images, HEIGHT, WIDTH, 3) 8-bit levels of one sample for each brightness and contrast."""
    parts = []
    generator = torch.Generator().manual_seed(seed)
    for part in np.array_split(conditions, -(-len(conditions) // 100)):
        (images,) = pipe(
            condition=part.tolist(),
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="np",
            return_dict=False,
        )
        parts.append(np.asarray(images))
    return (np.concatenate(parts) * 255).round().astype(np.uint8)


if __name__ == "__main__":
    main(sys.argv[1:])

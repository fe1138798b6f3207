"""Draws the picture that opens the README: samples of every model of `examples/showcase`, of the first seeds.

    python -m examples.showcase_picture [fashion photos emoji] [--output FILE]

Nothing is picked: a model's images are those of the seeds 0, 1, 2, ..., with its saved settings; its classes, or
groups of classes, take turns, and in a group all classes are as likely.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageOps

from examples.data.classifiers import groups_of
from examples.make_showcase import Groups, as_images, draw
from tarflow_hf import TarFlowPipeline, save_image_grid
from tarflow_hf.flow.class_names import class_names

HERE = Path(__file__).parent
FIGURE = HERE / "figures" / "showcase.png"
ROWS, COLUMNS = 3, 14  # of each model


def main(argv: Sequence[str]) -> None:
    """Draws the models that the command line names, in that order."""
    found = sorted(index.parent.name for index in (HERE / "showcase").glob("*/model_index.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=found, help=f"of {', '.join(found)} [all]")
    parser.add_argument("--output", type=Path, default=FIGURE, help=f"PNG file [{FIGURE.relative_to(HERE.parent)}]")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.models) - set(found)):
        parser.error(f"examples/showcase has {', '.join(found)}, not {', '.join(unknown)}")
    samples = {name: first_samples(HERE / "showcase" / name) for name in options.models}
    side = max(max(image.size) for images in samples.values() for image in images)
    cells = [framed(image, side) for images in samples.values() for image in images]
    names = [name if row == 0 else "" for name in samples for row in range(ROWS)]
    save_image_grid(cells, options.output, columns=COLUMNS, row_labels=names)
    print(f"{options.output}: {', '.join(samples)}")


def first_samples(folder: Path) -> list[Image.Image]:
    """As many samples of a model as a part of the picture has."""
    pipe = TarFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names, of_class = groups_of(class_names(pipe.transformer.config))
    groups = Groups(names, of_class, torch.ones(len(of_class)))
    return as_images(draw(pipe, groups.labels(torch.arange(ROWS * COLUMNS) % max(1, len(names)))))


def framed(image: Image.Image, side: int) -> Image.Image:
    """The image in colour on a square, with the colour of its corner around it."""
    colour = image.convert("RGB")
    across, down = side - colour.width, side - colour.height
    border = (across // 2, down // 2, across - across // 2, down - down // 2)
    return ImageOps.expand(colour, border, fill=cast(tuple[int, ...], colour.getpixel((0, 0))))


if __name__ == "__main__":
    main(sys.argv[1:])

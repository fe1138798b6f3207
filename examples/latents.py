"""Looks into the latents and the likelihood of a trained model.

    python examples/latents.py interpolate runs/digits first.png second.png --class_label 3
    python examples/latents.py rank runs/digits --data photos/ --split train

`interpolate` writes a strip of pictures from one image to another, on the great circle between their latents. `rank`
orders the images of a data set or folder by their exact likelihood: ranking.csv, and ranking.png with the most and the
least likely ones, among which outliers stand out.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.inputs import class_of_text
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.images.reading import open_image
from tarflow_hf.metrics.atomic import replacing
from tarflow_hf.metrics.command_line import add_model_and_data, load_images, open_workplace
from tarflow_hf.metrics.images import RealImages
from tarflow_hf.metrics.likelihood import unit_of
from tarflow_hf.metrics.measure import Dequantization, likelihoods
from tarflow_hf.training.export import load_pipeline

COLUMNS = 16  # of the contact sheet


def main(argv: Sequence[str]) -> None:
    """Does what the first word of the command line says."""
    options = parse(argv)
    options.command(options)


def slerp(first: torch.Tensor, second: torch.Tensor, steps: int) -> torch.Tensor:
    """Points on the great circle between two latents: z(t) = (sin((1 - t) w) z_0 + sin(t w) z_1) / sin w.

    Gaussian latents lie near a sphere; the straight line between two of them runs through its improbable inside.

    Args:
        first: (tokens, patch_dim) latents z_0.
        second: (tokens, patch_dim) latents z_1, at the angle w to the first.
        steps: Points, at least 2; the first is z_0 and the last z_1.

    Returns:
        (steps, tokens, patch_dim) latents.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    cosine = torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    t = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)[:, None, None]
    if angle < 1e-4:  # the same direction: the circle is a line
        return torch.lerp(first, second, t)
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def interpolate(options: argparse.Namespace) -> None:
    """Writes the strip of pictures between two images."""
    pipe = TarFlowPipeline.from_pretrained(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.transformer.config.value_scale is not None:
        raise ValueError(f"interpolate takes image files, and {options.model} is a model of arrays: see pipe.invert")
    images = [open_image(path) for path in options.images]
    labels = None if options.class_label is None else [class_of_text(options.class_label, pipe.transformer.config)]
    first, second = pipe.invert(images, None if labels is None else torch.tensor(labels * 2))
    path = slerp(first, second, options.steps)
    output = pipe(
        None if labels is None else torch.tensor(labels * options.steps),
        num_images_per_label=1,
        guidance_scale=1.0,
        denoising_strength=0.0,
        latents=path,
    )
    strip = cast(ImagePipelineOutput, output).images
    save_image_grid(cast(list[Image.Image], strip), options.output, columns=options.steps)
    print(f"{options.steps} images -> {options.output}")


def rank(options: argparse.Namespace) -> None:
    """Writes the images' bits per dimension (of latents: nats) in order, and the extremes as a contact sheet."""
    place = open_workplace(options, load_pipeline)
    images, numbering = load_images(options, place)
    columns = min(COLUMNS, images.num_images) if options.columns is None else options.columns
    if not 1 <= columns <= images.num_images:
        raise ValueError(f"--columns must be from 1 to the {images.num_images} images, got {columns}")
    found = likelihoods(place, images, Dequantization(options.num_noise_draws, options.seed), numbering)
    log_prob = found.get("log_prob_with_labels", found["log_prob"]).mean(axis=1)
    unit = unit_of(place.pipe)
    values = unit.per_dim(torch.from_numpy(log_prob)).numpy()
    if place.state.is_main_process:
        order = values.argsort()
        write_ranking(options.output_dir / "ranking.csv", images, unit.name, values, order)
        write_contact_sheet(options.output_dir / "ranking.png", place.pipe, images, order, columns)
        reach = f"{len(values)} images, {values.min():.3f} to {values.max():.3f} {unit.text}"
        print(f"{reach} -> {options.output_dir}")
    place.finish()


def write_ranking(path: Path, images: RealImages, unit: str, values: np.ndarray, order: np.ndarray) -> None:
    """A table of all images, the most likely first."""
    names = images.names()
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rank", "row", "image", unit])
        writer.writerows((place, row, names[row], values[row]) for place, row in enumerate(order.tolist()))


def write_contact_sheet(
    path: Path, pipe: TarFlowPipeline, images: RealImages, order: np.ndarray, columns: int
) -> None:
    """Two rows: the most likely images and, most unlikely first, the least likely ones."""
    pictures = []
    for row in [*order[:columns], *order[::-1][:columns]]:
        levels = images.images[int(row)].levels
        if levels.is_floating_point():
            pictures += pipe.pictures(levels[None])
        else:
            pictures.append(Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.movedim(0, -1).numpy()))
    save_image_grid(pictures, path, columns=columns, row_labels=["most likely", "least likely"])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Look into a TarFlow model.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("interpolate", help="a strip of pictures between two images", allow_abbrev=False)
    one.set_defaults(command=interpolate)
    one.add_argument("model", help="folder or Hub name of a pipeline")
    one.add_argument("images", nargs=2, type=Path, help="two image files")
    one.add_argument("--class_label", help="class id or name of both images [no label]")
    one.add_argument("--steps", type=int, default=9, help="pictures, the two ends included [9]")
    one.add_argument("--output", type=Path, default=Path("interpolation.png"), help="PNG file [interpolation.png]")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    two = commands.add_parser("rank", help="the most and the least likely images", allow_abbrev=False)
    two.set_defaults(command=rank)
    add_model_and_data(two)
    two.add_argument("--num_noise_draws", type=int, default=1, help="dequantisation draws averaged over [1]")
    two.add_argument(
        "--columns", type=int, help=f"images in a row of the contact sheet [{COLUMNS}, or as many as there are]"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

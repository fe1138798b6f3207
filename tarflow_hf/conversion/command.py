"""The command that converts a checkpoint of the authors' code."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from tarflow_hf.configuration_tarflow import NoiseType
from tarflow_hf.conversion.checkpoint import convert_reference_checkpoint
from tarflow_hf.conversion.folders import VARIANTS, save_converted, set_class_names
from tarflow_hf.flow.sampling.guidance import GuidanceRule, GuidanceSchedule
from tarflow_hf.hub.known_data import KNOWN_DATA, class_names, named_data, read_class_names
from tarflow_hf.hub.model_card import SAMPLING_DEFAULTS
from tarflow_hf.hub.push import push_folder
from tarflow_hf.pipeline_tarflow import TarFlowPipeline

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tarflow_hf.conversion", description="Convert a checkpoint of the TarFlow authors' code."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="the .pth file; code in it is not run")
    add("folder", type=Path, help="new folder for the pipeline")
    add("--image_size", type=int, required=True, help="side of the images, pixels")
    add("--num_channels", type=int, default=3, help="1 for grey, 3 for RGB")
    add("--noise_type", choices=get_args(NoiseType), help="training noise, if the file name does not tell")
    add("--noise_std", type=float, help="standard deviation of Gaussian noise, if the file name does not tell")
    add("--noise_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels of an iTARFlow checkpoint")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--dataset", choices=named_data(), help="known data set, for class names and the page")
    names.add_argument("--id2label", type=Path, help="class names: one a line, or JSON")
    add("--dtype", choices=sorted(_DTYPES), default="float32", help="of the plain weights")
    add("--variant", choices=sorted(VARIANTS), nargs="*", default=[], help="more weights beside the plain ones")
    add("--guidance_scale", type=float, help="default to save: 1 + the paper's w")
    add("--guidance_schedule", choices=get_args(GuidanceSchedule), help="default to save")
    add("--attention_temperature", type=float, help="default to save, of the unlabelled branch")
    add("--denoising_strength", type=float, help="default to save: 1 is Tweedie")
    add("--guidance_rule", choices=get_args(GuidanceRule), help="default to save")
    add("--num_refinement_steps", type=int, help="default to save, of an iTARFlow checkpoint")
    add("--temperature", type=float, help="default to save, of the latents that are drawn")
    add("--push_to_hub", metavar="NAME", help="then upload the folder to this repository")
    add("--private", action="store_true", help="make that repository private, if it is made now")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.private and not options.push_to_hub:
        raise ValueError("--private needs --push_to_hub, the repository to make")
    model = convert_reference_checkpoint(
        options.checkpoint,
        image_size=options.image_size,
        num_channels=options.num_channels,
        noise_type=options.noise_type,
        noise_std=options.noise_std,
        noise_range=tuple(options.noise_range) if options.noise_range else None,
    )
    if options.id2label:
        set_class_names(model, read_class_names(options.id2label))
    elif options.dataset and model.config.num_classes:  # an unconditional model of the same data has none to name
        set_class_names(model, class_names(options.dataset))
    defaults = {name: value for name in SAMPLING_DEFAULTS if (value := getattr(options, name)) is not None}
    save_converted(
        TarFlowPipeline(transformer=model, **defaults),
        options.folder,
        dtype=_DTYPES[options.dtype],
        variants=options.variant,
        data=KNOWN_DATA.get(options.dataset),
    )
    print(f"{options.folder}: {model.num_parameters():,} parameters")
    if options.push_to_hub:
        print(push_folder(options.folder, options.push_to_hub, private=options.private or None).commit_url)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what is wrong with the input ends it with one line that says so."""
    try:
        _run(_parser().parse_args(arguments))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


__all__ = ["main"]

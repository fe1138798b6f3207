"""Options that the measuring examples share, and what they are turned into: a pipeline, images and a reference."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.constants import HF_HOME

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.sampling.guidance import GuidanceSchedule
from tarflow_hf.hub.bars import no_bars_off_a_terminal
from tarflow_hf.images.arguments import ArrayLayout, DataArguments
from tarflow_hf.images.arrays import format_of
from tarflow_hf.images.labels import label_numbering, renumber
from tarflow_hf.images.processing import ResizeMethod
from tarflow_hf.images.sources import NO_LABEL, load_image_data
from tarflow_hf.metrics.distances import MIN_SAMPLES
from tarflow_hf.metrics.features import FeatureExtractor, load_feature_extractor
from tarflow_hf.metrics.images import RealImages, check_layout, reference_summary
from tarflow_hf.metrics.measure import Workplace, start_processes
from tarflow_hf.metrics.samples import SampleLabels
from tarflow_hf.metrics.statistics import FeatureSummary
from tarflow_hf.pipeline_tarflow import TarFlowPipeline


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the data set and the work."""
    add = parser.add_argument
    add("model", help="folder of a pipeline, or its name on the Hub")
    add("--data", required=True, help="Hub data set, image folder, or parquet file, pattern or folder")
    add("--data_config", help="configuration of the Hub data set")
    add("--split", default="test", help="split of the data set [test]")
    add("--image_column", help="column of the images [the only image column]")
    add("--label_column", help="column of the labels [the only column of class labels]")
    add("--array_layout", choices=get_args(ArrayLayout), help="for a model of arrays: what their axes are")
    add("--skip_bad_images", action="store_true", help="leave unreadable images out, and say which")
    add("--ignore_labels", action="store_true", help="take the data set as unlabelled")
    add("--resize", choices=get_args(ResizeMethod), help="how images are resized [as in the model's training]")
    add("--num_images", type=int, help="real images used, from the first [all]")
    add("--output_dir", type=Path, help="[MODEL/evaluation, or runs/evaluation/NAME for a model of the Hub]")
    add("--batch_size", type=int, default=64, help="images a process works on at once [64]")
    add("--num_workers", type=int, default=4, help="threads that read images [4]")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights [float32]")
    add("--seed", type=int, default=0, help="of dequantisation and samples [0]")


def add_distances(parser: argparse.ArgumentParser, *, num_samples: int) -> None:
    """Options of the distances of samples to real images."""
    add = parser.add_argument
    add("--num_samples", type=int, default=num_samples, help=f"samples drawn [{num_samples}]")
    add(
        "--feature_extractor",
        default="inception",
        help="inception, efficientnet-lite0 or FILE.py:FUNCTION [inception]",
    )
    add("--inception_weights", help="file of the FID Inception weights of torch-fidelity")
    add("--reference", help=".npz with mu and sigma of the real features [computed from the data set]")
    add("--statistics_cache", type=Path, default=Path(HF_HOME, "tarflow_hf", "statistics"), help="their cache")


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Options of how samples are drawn."""
    add = parser.add_argument
    add(
        "--sample_labels",
        choices=get_args(SampleLabels),
        default="random",
        help="classes of samples: random (all as often), balanced (in turn), data (as often as there), none [random]",
    )
    add("--guidance_schedule", choices=get_args(GuidanceSchedule), help="linear or constant [the pipeline's]")


def open_workplace(
    options: argparse.Namespace, load: Callable[..., TarFlowPipeline] = TarFlowPipeline.from_pretrained
) -> Workplace:
    """The pipeline on this process's device, and the folders of the work; fills in `options.output_dir`.

    Args:
        options: The command line.
        load: Makes a pipeline of `options.model` and a `dtype`.
    """
    if options.output_dir is None:
        folder = Path(options.model)
        options.output_dir = folder / "evaluation" if folder.is_dir() else Path("runs/evaluation", folder.name)
    state = start_processes()
    no_bars_off_a_terminal()
    pipe = load(options.model, dtype=getattr(torch, options.dtype)).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.transformer.config.condition_dim:
        state.print("the model is measured, and samples are drawn, without a condition")
    return Workplace(pipe, state, options.output_dir / "work", options.batch_size)


def load_images(options: argparse.Namespace, place: Workplace) -> tuple[RealImages, torch.Tensor | None]:
    """The images of the data set, and the model's number of each of its classes (None where labels play no part)."""
    config = place.pipe.transformer.config
    check_layout(config, options.array_layout)
    arguments = DataArguments(
        data=options.data,
        data_config=options.data_config,
        train_split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
        array_layout=options.array_layout,
        value_mean=tuple(config.value_mean or ()),
        value_scale=tuple(config.value_scale or ()),
        horizontal_flip=False,
        skip_bad_images=options.skip_bad_images,
        resize=options.resize or config.resize,
    )
    with place.state.main_process_first():
        data, _ = load_image_data(arguments, class_conditional=config.num_classes > 0 and not options.ignore_labels)
    images = RealImages.of(
        data,
        format_of(place.pipe.image_shape, place.pipe.num_channels, arguments),
        num_images=options.num_images,
        num_workers=options.num_workers,
        skip_bad_images=options.skip_bad_images,
    )
    if images.bad_rows:
        place.state.print(f"unreadable images in rows {list(images.bad_rows)} of {data.name}, left out")
    numbering = label_numbering(data, config)
    if numbering is not None and set(images.labels()) == {NO_LABEL}:
        raise ValueError(
            f"no image of split {options.split!r} of data set {data.name!r} has a label (all are {NO_LABEL}): "
            "measure it with --ignore_labels"
        )
    return images, numbering


def check_pictures(pipe: TarFlowPipeline) -> None:
    """Raises ValueError where there are no 8-bit images whose features could be compared."""
    if pipe.transformer.config.value_scale is not None:
        raise ValueError("distances of features need 8-bit images, and this is a model of arrays")


def load_extractor(options: argparse.Namespace, place: Workplace) -> FeatureExtractor:
    """The feature extractor, on this process's device.

    Raises:
        ValueError: If the model is one of arrays.
    """
    check_pictures(place.pipe)
    extractor = load_feature_extractor(options.feature_extractor, inception_weights=options.inception_weights)
    extractor.network.to(place.state.device)
    return extractor


def load_reference(
    options: argparse.Namespace, place: Workplace, images: RealImages, extractor: FeatureExtractor
) -> FeatureSummary:
    """Statistics of real images: of a file, or of the data set.

    Raises:
        ValueError: If the file does not fit the extractor, or the data set is too small.
    """
    if options.reference is not None:
        return _fitting(options.reference, extractor, images.read(range(1)).levels.to(place.state.device))
    if images.num_images < MIN_SAMPLES:
        raise ValueError(f"distances need at least {MIN_SAMPLES} real images, got num_images={images.num_images}")
    return reference_summary(
        images, extractor, place.state, batch_size=options.batch_size, cache_dir=options.statistics_cache
    )


def _fitting(path: str, extractor: FeatureExtractor, levels: torch.Tensor) -> FeatureSummary:
    """A reference from a file, compared with what the extractor gives for an image."""
    reference, width = FeatureSummary.load(path), extractor(levels).shape[1]
    if reference.mean.size != width:
        raise ValueError(
            f"--reference {path} holds {reference.mean.size} features, {extractor.frechet_name} has {width}"
        )
    if reference.extractor not in (None, extractor.frechet_name):
        raise ValueError(f"--reference {path} is of {reference.extractor!r}, not of {extractor.frechet_name!r}")
    return reference


def sample_labels(
    options: argparse.Namespace, images: RealImages, numbering: torch.Tensor | None, config: TarFlowConfig
) -> dict[str, Any]:
    """The fields `labels` and `label_counts` of [`SampleSettings`], as `--sample_labels` says.

    Args:
        options: The command line.
        images: The images that samples are compared with.
        numbering: The model's number of each of their classes, of [`load_images`].
        config: The model's configuration.

    Raises:
        ValueError: If the samples' classes are to be the images', which have none.
    """
    if options.sample_labels != "data" or not config.num_classes:
        return {"labels": options.sample_labels}
    if numbering is None:
        raise ValueError("--sample_labels data needs labelled images")
    labels = renumber(torch.tensor(images.labels()), numbering)
    counts = labels[labels != NO_LABEL].bincount(minlength=config.num_classes)
    return {"labels": "data", "label_counts": tuple(counts.tolist())}


def check_num_samples(num_samples: int) -> None:
    """Raises ValueError unless there will be samples enough for all distances; before anything is computed."""
    if num_samples < MIN_SAMPLES:
        raise ValueError(f"--num_samples must be at least {MIN_SAMPLES} for the distances, got {num_samples}")


__all__ = [
    "check_num_samples",
    "check_pictures",
    "add_distances",
    "add_model_and_data",
    "add_samples",
    "load_extractor",
    "load_images",
    "load_reference",
    "open_workplace",
    "sample_labels",
]

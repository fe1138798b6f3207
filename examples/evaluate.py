"""Measures a trained model: exact likelihood, distances of its samples to real images, classification.

    accelerate launch examples/evaluate.py runs/digits --data examples/data/digits --split test
    ... --metrics frechet_distance --feature_extractor efficientnet-lite0 --num_samples 5000 --save_samples png
    ... --metrics frechet_distance --feature_extractor inception --inception_weights weights.pth --reference stats.npz
    ... --classify
    python examples/evaluate.py --help

Writes metrics.json and per_image.parquet to the output folder, and the pictures and samples asked for. Stopped at any
moment and started again with the same command, it goes on where it was; one process or several give the same numbers.
What has been computed is kept in the `work` folder there, by its settings, and may be deleted afterwards.
For a pipeline with an autoencoder the likelihood is that of noisy latents, and is called `latent_nats_per_dim`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from tarflow_hf.flow.choices import Decoder
from tarflow_hf.hub.model_card import Result
from tarflow_hf.images.arguments import public_place, without_credentials
from tarflow_hf.images.labels import renumber
from tarflow_hf.images.plotting import save_reliability
from tarflow_hf.metrics import command_line
from tarflow_hf.metrics.distances import feature_distances
from tarflow_hf.metrics.images import RealImages
from tarflow_hf.metrics.likelihood import density_summary, unit_of
from tarflow_hf.metrics.measure import (
    Dequantization,
    Workplace,
    class_likelihoods,
    likelihoods,
    sample_summary,
    samples,
)
from tarflow_hf.metrics.posterior import calibration, class_posterior, log_loss
from tarflow_hf.metrics.report import read_metrics, update_card, write_metrics, write_per_image
from tarflow_hf.metrics.samples import SampleSettings, save_npz, save_png
from tarflow_hf.metrics.statistics import Moments
from tarflow_hf.training.export import load_pipeline

METRICS = ("bits_per_dim", "frechet_distance")
_OF_SAMPLES = (
    "num_samples feature_extractor inception_weights reference statistics_cache sample_labels save_samples decoder "
    "guidance_scale guidance_schedule attention_temperature denoising_strength temperature"
).split()
_SAID = (  # in the command already, or nothing that the numbers depend on
    "model data split metrics output_dir batch_size num_workers statistics_cache save_samples update_card"
).split()
Measured = dict[str, dict[str, Any]]
Columns = dict[str, np.ndarray]
Numbered = tuple[RealImages, torch.Tensor | None]  # with the number of each class in the model


def main(argv: Sequence[str]) -> None:
    """Measures as the command line says."""
    options = parse(argv)
    if "frechet_distance" in options.metrics:
        command_line.check_num_samples(options.num_samples)
    place = command_line.open_workplace(options, load_pipeline)
    if "frechet_distance" in options.metrics:
        command_line.check_pictures(place.pipe)
    read_metrics(options.output_dir / "metrics.json")  # what is no such file is said before the work
    images, numbering = command_line.load_images(options, place)
    measured: Measured = {}
    columns: Columns = {}
    if "bits_per_dim" in options.metrics:
        bits, of_images = measure_bits_per_dim(options, place, (images, numbering))
        measured, columns = measured | bits, columns | of_images
    if options.classify:
        read, of_images = measure_classification(options, place, (images, numbering))
        measured, columns = measured | read, columns | of_images
    if "frechet_distance" in options.metrics:
        measured |= measure_distances(options, place, (images, numbering))
    if place.state.is_main_process:
        if columns:
            columns = {"image": np.array(images.names()), **columns}
        report(options, place, measured, columns)
    place.finish()


def report(options: argparse.Namespace, place: Workplace, measured: Measured, columns: Columns) -> None:
    """Writes what was measured and prints it."""
    write_metrics(options.output_dir / "metrics.json", measured)
    if columns:
        write_per_image(options.output_dir / "per_image.parquet", columns)
    if options.update_card:
        update_card(options.model, place.pipe, results(measured, options))
    for name, entry in measured.items():
        error = f" +- {entry['standard_error']:.3g}" if "standard_error" in entry else ""
        print(f"{name}: {entry['value']:.5g}{error}" + (f" ({entry['note']})" if "note" in entry else ""))
    print(f"written to {options.output_dir}")


def measure_bits_per_dim(
    options: argparse.Namespace, place: Workplace, numbered: Numbered
) -> tuple[Measured, Columns]:
    """Mean bits per dimension (of latents: nats) with its standard error, and the values of each image."""
    noise = Dequantization(options.num_noise_draws, options.seed)
    found = likelihoods(place, numbered[0], noise, numbered[1])
    measured: Measured = {}
    columns: Columns = {}
    unit = unit_of(place.pipe)
    for name in ("log_prob", "log_prob_with_labels"):
        if name not in found:
            continue
        log_prob = found[name].mean(axis=1)
        metric = name.replace("log_prob", unit.name)
        columns[metric] = unit.per_dim(torch.from_numpy(log_prob)).numpy()
        if name == "log_prob_with_labels":
            columns["class_label"] = found["class_labels"]
            log_prob = log_prob[found["class_labels"] >= 0]
        summary = density_summary(Moments.of(log_prob[:, None]), unit)
        settings = {"num_noise_draws": noise.num_draws, "seed": noise.seed}
        measured[metric] = {"value": summary.pop(unit.name), **summary, **settings, **source(options)}
    return measured, columns


def measure_classification(
    options: argparse.Namespace, place: Workplace, numbered: Numbered
) -> tuple[Measured, Columns]:
    """Top-1 accuracy of Bayes' rule with equal classes, its calibration, and the class read in each image."""
    images, numbering = numbered
    if numbering is None:
        raise ValueError("classification needs a class-conditional model and labelled images")
    noise = Dequantization(options.num_noise_draws, options.seed)
    labels = renumber(torch.tensor(images.labels()), numbering)
    log_prob = torch.from_numpy(class_likelihoods(place, images, noise))
    posterior = class_posterior(log_prob)
    probability, predicted = posterior.max(dim=1)
    columns = {"class_label": labels, "predicted_class": predicted, "probability": probability}
    checked = calibration(posterior[labels >= 0], labels[labels >= 0])
    count = int((labels >= 0).sum())
    accuracy = {
        "value": checked.accuracy,
        "standard_error": (checked.accuracy * (1 - checked.accuracy) / count) ** 0.5,
        "log_loss": log_loss(log_prob[labels >= 0], labels[labels >= 0]),
        "expected_calibration_error": checked.expected_error,
        "num_samples": count,
        "num_noise_draws": noise.num_draws,
        "seed": noise.seed,
        **source(options),
    }
    if place.state.is_main_process:
        title = f"{Path(options.model).name} on {without_credentials(options.data)}"
        bins = (checked.bin_confidence, checked.bin_accuracy, checked.bin_count)
        save_reliability(*bins, options.output_dir / "calibration.png", title=title)
    return {"accuracy": accuracy}, {name: values.numpy() for name, values in columns.items()}


def measure_distances(options: argparse.Namespace, place: Workplace, numbered: Numbered) -> Measured:
    """Distances of samples to real images in the features of a network, and the samples as files."""
    images, numbering = numbered
    extractor = command_line.load_extractor(options, place)
    reference = command_line.load_reference(options, place, images, extractor)
    settings = SampleSettings(
        options.seed,
        options.guidance_scale,
        options.guidance_schedule,
        options.attention_temperature,
        options.denoising_strength,
        options.temperature,
        decoder=options.decoder,
        **command_line.sample_labels(options, images, numbering, place.pipe.transformer.config),
    ).resolved(place.pipe)
    files = samples(place, options.num_samples, settings)
    generated = sample_summary(place, files, extractor)
    if not place.state.is_main_process:
        return {}
    if options.save_samples == "png":
        save_png(files, options.output_dir / "samples")
    elif options.save_samples == "npz":
        save_npz(files, options.output_dir / "samples.npz")
    distances = feature_distances(generated, reference)
    shared = {name: distances.pop(name) for name in list(distances) if name.startswith(("num_", "note"))}
    shared |= {**vars(settings), **source(options), "reference": options.reference}
    del shared["label_counts"]  # those of the data
    compared = {"num_samples": shared.pop("num_compared", 0)}
    compared |= {"num_reference_samples": shared.pop("num_compared_reference", 0)}
    measured = {extractor.frechet_name: {"value": distances.pop("frechet_distance"), **shared}}
    if "kernel_distance" in distances:
        kernel, error = distances.pop("kernel_distance"), distances.pop("kernel_distance_standard_error")
        shared.pop("note", None)  # the kernel distance is unbiased
        shared |= compared
        measured[extractor.kernel_name] = {"value": kernel, "standard_error": error, **shared}
    for name, value in distances.items():  # precision, recall, density, coverage
        measured[name] = {"value": value, "features": extractor.frechet_name, **shared}
    return measured


def source(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured on what."""
    data = without_credentials(options.data)
    return {"model": options.model, "data": data, "split": options.split, "dtype": options.dtype}


def results(measured: Measured, options: argparse.Namespace) -> tuple[Result, ...]:
    """The measurements as rows of a model card, which carries no path of this machine."""
    details = (
        "num_samples",
        "num_reference_samples",
        "num_noise_draws",
        "dtype",
        "features",
        "guidance_scale",
        "denoising_strength",
        "attention_temperature",
        "temperature",
        "decoder",
    )
    data, command = public_place(options.data), command_of(options)
    return tuple(
        Result(
            metric=name.lower(),
            name=name,
            value=entry["value"],
            dataset=data,
            split=options.split,
            method=", ".join(
                f"{detail}={entry[detail]}" for detail in details if entry.get(detail, "float32") != "float32"
            ),
            source=command,
        )
        for name, entry in measured.items()
    )


def command_of(options: argparse.Namespace) -> str:
    """The command that measures so, without a path of this machine."""
    defaults, words = make_parser(), ["examples/evaluate.py", public_place(options.model)]
    words += ["--data", public_place(options.data), "--split", options.split, "--metrics", *options.metrics]
    for name, value in vars(options).items():
        if name not in _SAID and value != defaults.get_default(name):
            words += [f"--{name}"] if value is True else [f"--{name}", public_place(str(value))]
    return shlex.join(words)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if "frechet_distance" not in options.metrics:
        for name in _OF_SAMPLES:
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name} is of samples, which --metrics frechet_distance draws")
    return options


def make_parser() -> argparse.ArgumentParser:
    """What the command line may say."""
    parser = argparse.ArgumentParser(description="Measure a TarFlow model.", allow_abbrev=False)
    command_line.add_model_and_data(parser)
    command_line.add_distances(parser, num_samples=5000)
    command_line.add_samples(parser)
    add = parser.add_argument
    add("--metrics", nargs="+", choices=METRICS, default=["bits_per_dim"], help="what to measure [bits_per_dim]")
    add("--classify", action="store_true", help="read the class of each image by Bayes' rule")
    add("--num_noise_draws", type=int, default=1, help="dequantisation draws averaged over for each image [1]")
    add("--guidance_scale", type=float, help="1 + the paper's w [the pipeline's]")
    add("--attention_temperature", type=float, help="of the unlabelled branch [the pipeline's]")
    add("--denoising_strength", type=float, help="0 is off, 1 is Tweedie's formula [the pipeline's]")
    add("--temperature", type=float, help="standard deviation of the latents [the pipeline's]")
    add("--decoder", choices=get_args(Decoder), default="exact", help="of the samples, with a learned inverse [exact]")
    add("--save_samples", choices=("png", "npz"), help="samples as a folder of PNG files, or as ADM's samples.npz")
    add("--update_card", action="store_true", help="write the results into the model-index of the model's page")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])

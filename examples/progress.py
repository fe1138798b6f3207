"""Measures the checkpoints of a training run: how bits per dimension and the distance to real images fell.

    accelerate launch examples/train.py --checkpoint_every 20 --keep_checkpoints 1000
    accelerate launch examples/progress.py runs/digits --num_samples 1000 \
        --feature_extractor examples/data/digits_classifier.py:digits_classifier

The held-out images are those of the run's recipe. Writes progress.csv, progress_distance.png and
progress_bits_per_dim.png to RUN/evaluation. Averaged weights are measured where the run keeps an average; samples are
drawn without guidance. Stopped and started again it goes on where it was.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.images.labels import label_numbering
from tarflow_hf.images.plotting import save_curve
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.atomic import replacing
from tarflow_hf.metrics.command_line import (
    add_distances,
    add_samples,
    check_num_samples,
    load_extractor,
    load_reference,
    sample_labels,
)
from tarflow_hf.metrics.distances import feature_distances
from tarflow_hf.metrics.features import FeatureExtractor
from tarflow_hf.metrics.images import RealImages
from tarflow_hf.metrics.likelihood import density_summary, unit_of
from tarflow_hf.metrics.measure import (
    Dequantization,
    Workplace,
    likelihoods,
    sample_summary,
    samples,
    start_processes,
)
from tarflow_hf.metrics.samples import SampleSettings
from tarflow_hf.metrics.statistics import FeatureSummary, Moments
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.checkpoints import complete_checkpoints
from tarflow_hf.training.export import load_pipeline, read_options

Row = dict[str, float]


def main(argv: Sequence[str]) -> None:
    """Measures every complete checkpoint of the run that the command line names."""
    options = parse(argv)
    check_num_samples(options.num_samples)
    checkpoints = complete_checkpoints(options.run / "checkpoints")
    if not checkpoints:
        raise FileNotFoundError(f"{options.run} has no complete checkpoints")
    state = start_processes()
    arguments, class_names = read_options(checkpoints[-1])
    _, data = load_image_data(arguments.data, class_conditional=bool(class_names))
    if data is None:
        raise ValueError(f"the recipe of {options.run} names no held-out images (eval_split)")
    images = RealImages.of(data, arguments.image_format, num_images=options.num_images)
    rows: list[Row] = []
    for checkpoint in checkpoints:
        run = load_pipeline(checkpoint)  # without its sampling defaults: no guidance
        pipe = TarFlowPipeline(run.transformer, vae=run.vae, image_size=run.config.image_size).to(state.device)
        pipe.set_progress_bar_config(disable=True)
        place = Workplace(pipe, state, options.run / "evaluation" / "work", options.batch_size)
        extractor = load_extractor(options, place)
        reference = load_reference(options, place, images, extractor)
        step = float(checkpoint.name.removeprefix("step-"))
        rows.append({"step": step, **measure(options, place, images, extractor, reference)})
    if state.is_main_process:
        report(options.run, rows, extractor.frechet_name, unit_of(place.pipe))
    place.finish()


def measure(
    options: argparse.Namespace,
    place: Workplace,
    images: RealImages,
    extractor: FeatureExtractor,
    reference: FeatureSummary,
) -> Row:
    """Likelihood and, on the main process, the distances of the samples of one checkpoint."""
    config = place.pipe.transformer.config
    numbering = label_numbering(images.images.data, config)
    found = likelihoods(place, images, Dequantization(seed=options.seed), numbering)
    log_prob = found.get("log_prob_with_labels", found["log_prob"])
    unit = unit_of(place.pipe)
    row = {unit.name: float(density_summary(Moments.of(log_prob), unit)[unit.name])}
    labels = sample_labels(options, images, numbering, config)
    settings = SampleSettings(options.seed, guidance_schedule=options.guidance_schedule, **labels)
    generated = sample_summary(place, samples(place, options.num_samples, settings), extractor)
    if place.state.is_main_process:
        row["frechet_distance"] = float(feature_distances(generated, reference)["frechet_distance"])
    return row


def report(run: Path, rows: list[Row], distance: str, unit: DensityUnit) -> None:
    """Writes the table and the plots, and prints the table."""
    folder = run / "evaluation"
    with replacing(folder / "progress.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    names = {"frechet_distance": (distance, "distance"), unit.name: (unit.text, unit.name)}
    for name, (label, file_name) in names.items():
        line = {label: ([row["step"] for row in rows], [row[name] for row in rows])}
        save_curve(line, folder / f"progress_{file_name}.png", ylabel=label, title=run.name)
    for row in rows:
        density = f"{row[unit.name]:.4f} {unit.text}"
        print(f"step {row['step']:.0f}: {density}, {distance} {row['frechet_distance']:.3f}")
    print(f"written to {folder}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Measure the checkpoints of a training run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of the run")
    add_distances(parser, num_samples=1000)
    add_samples(parser)
    parser.add_argument("--num_images", type=int, help="held-out images used, from the first [all]")
    parser.add_argument("--batch_size", type=int, default=64, help="images a process works on at once [64]")
    parser.add_argument("--seed", type=int, default=0, help="of dequantisation and samples [0]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Looks for good sampling settings: guidance x denoising strength x attention temperature on a small budget.

    accelerate launch examples/sweep.py runs/digits --data examples/data/digits --split test --num_samples 300 \
        --feature_extractor examples/data/digits_classifier.py:digits_classifier \
        --guidance_scale 1 1.5 2 3 --denoising_strength 0 0.5 1 --write_defaults

Writes sweep.csv and sweep.png (distance against guidance, one line per strength and temperature) to the output folder
and prints the table. All settings start from the same latents. With --write_defaults the best one becomes the defaults
in the model's model_index.json. Stopped and started again it goes on where it was; samples stay in the `work` folder.
"""

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tarflow_hf.hub.checkpoint_files import INDEX, edit_json
from tarflow_hf.images.plotting import save_curve
from tarflow_hf.metrics import command_line
from tarflow_hf.metrics.atomic import replacing
from tarflow_hf.metrics.distances import feature_distances
from tarflow_hf.metrics.features import FeatureExtractor
from tarflow_hf.metrics.measure import Workplace, sample_summary, samples
from tarflow_hf.metrics.samples import NonFiniteSamplesError, SampleSettings
from tarflow_hf.metrics.statistics import FeatureSummary
from tarflow_hf.training.export import load_pipeline

SETTINGS = ("guidance_scale", "denoising_strength", "attention_temperature", "temperature")
Row = dict[str, float]


def main(argv: Sequence[str]) -> None:
    """Sweeps as the command line says."""
    options = parse(argv)
    command_line.check_num_samples(options.num_samples)
    place = command_line.open_workplace(options, load_pipeline)
    images, numbering = command_line.load_images(options, place)
    extractor = command_line.load_extractor(options, place)
    reference = command_line.load_reference(options, place, images, extractor)
    rows: list[Row] = []
    labels = command_line.sample_labels(options, images, numbering, place.pipe.transformer.config)
    for settings in grid(options, place, labels):
        row = {name: getattr(settings, name) for name in SETTINGS}
        row |= measure(place, options.num_samples, settings, extractor, reference)
        rows.append(row)
    if place.state.is_main_process:
        report(options, rows, extractor)
    place.finish()


def grid(options: argparse.Namespace, place: Workplace, labels: dict[str, Any]) -> list[SampleSettings]:
    """Every combination of the values given; what is not given is the pipeline's default."""
    values = [getattr(options, name) or [None] for name in SETTINGS]
    return [
        SampleSettings(
            seed=options.seed,
            guidance_schedule=options.guidance_schedule,
            **dict(zip(SETTINGS, chosen, strict=True)),
            **labels,
        ).resolved(place.pipe)
        for chosen in itertools.product(*values)
    ]


def measure(
    place: Workplace,
    num_samples: int,
    settings: SampleSettings,
    extractor: FeatureExtractor,
    reference: FeatureSummary,
) -> Row:
    """Distances of the samples of one setting, on the main process; nan where samples are not finite."""
    try:
        files = samples(place, num_samples, settings)
    except NonFiniteSamplesError as error:
        place.state.print(error)
        return {"frechet_distance": math.nan}
    generated = sample_summary(place, files, extractor)
    if not place.state.is_main_process:
        return {}
    distances = feature_distances(generated, reference)
    if "note" in distances:
        print(distances["note"])
    return {name: float(value) for name, value in distances.items() if name != "note"}


def report(options: argparse.Namespace, rows: list[Row], extractor: FeatureExtractor) -> None:
    """Writes the table and the plot, prints the table, and saves the best setting if asked."""
    columns = [name for name in max(rows, key=len) if not name.startswith("num_")]
    rows.sort(key=lambda row: (math.isnan(row["frechet_distance"]), row["frechet_distance"]))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(options.output_dir / "sweep.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{row.get(name, math.nan):.4g}" for name in columns))
    if math.isfinite(rows[0]["frechet_distance"]):  # the best one: else there is nothing to draw
        plot(rows, extractor.frechet_name, options)
    print(f"written to {options.output_dir}")
    if options.write_defaults:
        write_defaults(options, rows[0])


def plot(rows: list[Row], distance: str, options: argparse.Namespace) -> None:
    """The distance against the guidance scale, one line per strength and temperatures."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(rows, key=lambda row: (row["denoising_strength"], row["guidance_scale"])):
        name = f"denoising_strength {row['denoising_strength']:g}"
        for setting in ("attention_temperature", "temperature"):
            if len(getattr(options, setting) or []) > 1:
                name += f", {setting} {row[setting]:g}"
        scales, distances = lines.setdefault(name, ([], []))
        scales.append(row["guidance_scale"])
        distances.append(row["frechet_distance"])
    title = f"{options.num_samples} samples of {Path(options.model).name}"
    save_curve(lines, options.output_dir / "sweep.png", xlabel="guidance_scale", ylabel=distance, title=title)


def write_defaults(options: argparse.Namespace, best: Row) -> None:
    """Makes a setting the defaults of a saved pipeline."""
    if math.isnan(best["frechet_distance"]):
        raise ValueError("no setting gave finite samples: the defaults stay as they are")
    chosen: dict[str, float | str] = {name: best[name] for name in SETTINGS}
    if options.guidance_schedule is not None:
        chosen["guidance_schedule"] = options.guidance_schedule
    path = Path(options.model, INDEX)
    edit_json(path, **chosen)
    print(f"{path} now holds {chosen}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Compare sampling settings of a TarFlow model.", allow_abbrev=False)
    command_line.add_model_and_data(parser)
    command_line.add_distances(parser, num_samples=1000)
    command_line.add_samples(parser)
    add = parser.add_argument
    add("--guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="1 + the paper's w [1 1.5 2 3]")
    add("--denoising_strength", type=float, nargs="+", help="0 is off, 1 is Tweedie's formula [the pipeline's]")
    add("--attention_temperature", type=float, nargs="+", help="of the unlabelled branch [the pipeline's]")
    add("--temperature", type=float, nargs="+", help="of the latents [the pipeline's]")
    add("--write_defaults", action="store_true", help="save the best setting as the model's defaults")
    options = parser.parse_args(argv)
    if options.write_defaults and not Path(options.model).is_dir():
        parser.error(f"--write_defaults needs the folder of a pipeline, got {options.model!r}")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])

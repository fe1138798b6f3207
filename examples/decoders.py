"""Measures the decoders of a pipeline with a learned inverse: exact, one pass and refined, from the same latents.

    python -m examples.decoders runs/digits_inverse --data examples/data/digits \
        --feature_extractor examples/data/digits_classifier.py:digits_classifier --threads 1
    ... --tables speed tokens                          # seconds alone, for a quiet machine

Writes decoders.md with three tables, decoders.json with the numbers, decoders.png with the same latents by every
decoder and guidance scale, and errors.png with the twenty images of the smallest and of the largest reconstruction
error at the pipeline's own guidance. The tables:

- quality: distance to the real images, the share that the extractor's `logits` (if it has them) read as the class
  asked for, and how far images are from the exact ones; the rank correlations of `pipe.reconstruction_error`;
- speed: whole calls of the pipeline in rounds in which all decoders run in turn, medians and ranges, and the sweeps;
- tokens: the same for flows of random weights and growing numbers of tokens. Random predictions are easy to solve, so
  that the exact decoder is slower for a trained flow.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from PIL import Image

from examples import benchmark
from examples.benchmark_table import markdown
from tarflow_hf import (
    TarFlowConfig,
    TarFlowInverseConfig,
    TarFlowInverseModel,
    TarFlowModel,
    TarFlowPipeline,
)
from tarflow_hf.flow.choices import Decoder
from tarflow_hf.flow.sampling.settings import SamplingSettings
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.metrics import command_line
from tarflow_hf.metrics.distances import feature_distances
from tarflow_hf.metrics.features import FeatureExtractor
from tarflow_hf.metrics.measure import Workplace, reconstruction_errors, sample_summary, samples
from tarflow_hf.metrics.resumable import Arrays
from tarflow_hf.metrics.samples import SampleSettings, to_channels_first
from tarflow_hf.metrics.statistics import FeatureSummary, rank_correlation
from tarflow_hf.training.export import load_pipeline

DECODERS = get_args(Decoder)
TABLES = ("quality", "speed", "tokens")
EXTREMES = 20  # images of the smallest and of the largest error that are shown
Row = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Measures as the command line says."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    command_line.check_num_samples(options.num_samples)
    place = command_line.open_workplace(options, load_pipeline)
    if place.pipe.inverse is None:
        raise ValueError(f"{options.model} must be a pipeline with an inverse, see examples/train_inverse.py")
    tables: dict[str, list[Row]] = {}
    if "quality" in options.tables:
        tables["quality"] = quality(options, place)
    if not place.state.is_main_process:
        return place.finish()
    if "speed" in options.tables:
        tables["speed"] = [row for size in options.batch_sizes for row in speed(options, place.pipe, size)]
    if "tokens" in options.tables:
        tables["tokens"] = [row for side in options.sides for row in speed_of_length(options, side)]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    about = {"machine": benchmark.machine(str(place.state.device)), "model": options.model, **tables}
    (options.output_dir / "decoders.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(markdown([list(rows[0]), *([shown(value) for value in row.values()] for row in rows)])
                       for rows in tables.values())  # fmt: skip
    (options.output_dir / "decoders.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    place.finish()


def shown(value: Any) -> str:  # noqa: ANN401  # a cell: text or number
    """A cell of a table: numbers with three digits, nothing for None."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def quality(options: argparse.Namespace, place: Workplace) -> list[Row]:
    """A row for each guidance scale and decoder; writes the pictures."""
    images, _ = command_line.load_images(options, place)
    extractor = command_line.load_extractor(options, place)
    reference = command_line.load_reference(options, place, images, extractor)
    own = place.pipe.sampling_defaults["guidance_scale"]
    rows: list[Row] = []
    strips: dict[str, np.ndarray] = {}
    for scale in sorted({*options.guidance_scales, own}):
        settings = {
            decoder: SampleSettings(options.seed, scale, labels="balanced", decoder=decoder).resolved(place.pipe)
            for decoder in DECODERS
        }
        found = {decoder: decoded(options, place, settings[decoder], extractor, reference) for decoder in DECODERS}
        errors = reconstruction_errors(place, options.num_samples, settings["one_pass"])
        if not place.state.is_main_process:
            continue
        rows += [row_of(scale, decoder, found, errors) for decoder in DECODERS]
        strips |= {f"{name.replace('_', ' ')}, {scale:g}": found[name]["images"][:10] for name in DECODERS}
        if scale == own:
            save_extremes(options, found, errors)
    if strips:
        shown_images = [image for strip in strips.values() for image in as_images(strip)]
        columns = len(shown_images) // len(strips)
        path = options.output_dir / "decoders.png"
        save_image_grid(shown_images, path, columns=columns, row_labels=list(strips))
    return rows


def decoded(
    options: argparse.Namespace,
    place: Workplace,
    settings: SampleSettings,
    extractor: FeatureExtractor,
    reference: FeatureSummary,
) -> Arrays:
    """Samples of one setting: `images`, `class_labels`, their `distance`, and what each is read as in `asked`.

    `asked` is the probability that the extractor's network gives to the class asked for, and `right` whether it is the
    largest; NaN for a network without `logits` and for images without a class.
    """
    files = samples(place, options.num_samples, settings)
    summary = sample_summary(place, files, extractor)
    found = files.gather()
    right = asked = np.full(len(found["images"]), np.nan)
    if hasattr(extractor.network, "logits") and settings.labels != "none":
        with torch.no_grad():
            levels = to_channels_first(found["images"]).to(place.state.device).split(500)
            logits = torch.cat([extractor.network.logits(part) for part in levels]).cpu()  # type: ignore[operator]
        labels = torch.from_numpy(found["class_labels"])
        right = (logits.argmax(1) == labels).double().numpy()
        asked = logits.double().softmax(1).gather(1, labels[:, None])[:, 0].numpy()
    distance = feature_distances(summary, reference)["frechet_distance"] if place.state.is_main_process else np.nan
    return {**found, "distance": np.array(distance), "right": right, "asked": asked}


def row_of(scale: float, decoder: str, found: dict[str, Arrays], errors: np.ndarray) -> Row:
    """A row of the table of quality."""
    exact, own = found["exact"], found[decoder]
    away = rms(own["images"], exact["images"])
    row: Row = {
        "guidance": scale,
        "decoder": decoder,
        "distance": float(own["distance"]),
        "of exact's": float(own["distance"] / exact["distance"]),
        "read as asked": float(own["right"].mean()),
        "rms to exact, levels": float(np.sqrt(np.square(away).mean())),
        "error, median": None,
        "rank correlation of error and rms": None,
        "of error and misreading": None,
    }
    if decoder == "one_pass":
        row["error, median"] = float(np.median(errors))
        row["rank correlation of error and rms"] = rank_correlation(errors, away)
        if np.isfinite(own["asked"]).all():
            row["of error and misreading"] = rank_correlation(errors, -own["asked"])
    return row


def rms(levels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(images,) root mean square difference of 8-bit images, in levels."""
    return np.sqrt(np.square(levels.astype(float) - others).mean(axis=(1, 2, 3)))


def as_images(levels: np.ndarray) -> list[Image.Image]:
    """(images, height, width, channels) levels as pictures."""
    return [Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in levels]


def save_extremes(options: argparse.Namespace, found: dict[str, Arrays], errors: np.ndarray) -> None:
    """Writes errors.png: the images of the smallest and of the largest errors, and the exact ones above them."""
    order = np.argsort(errors, kind="stable")
    count = min(EXTREMES, len(order) // 2)
    strips = [
        as_images(found[decoder]["images"][rows])
        for rows in (order[:count], order[-count:])
        for decoder in ("exact", "one_pass")
    ]
    names = ["smallest, exact", "smallest, one pass", "largest, exact", "largest, one pass"]
    path = options.output_dir / "errors.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_grid([image for strip in strips for image in strip], path, columns=count, row_labels=names)


def speed(options: argparse.Namespace, pipe: TarFlowPipeline, batch_size: int, **about: object) -> list[Row]:
    """A row for each decoder: images per second of whole calls at this batch size, and how many sweeps they take."""
    assert pipe.inverse is not None
    config, scale = pipe.transformer.config, min(2.0, float(pipe.inverse.config.max_guidance_scale))
    given = argparse.Namespace(device=pipe.device.type, rounds=options.rounds, batch_size=batch_size)
    labels = benchmark.batch_labels(given, config)

    def contender(called: TarFlowPipeline, decoder: Decoder, suffix: str = "") -> benchmark.Contender:
        def run(number: int) -> torch.Tensor:
            latents = benchmark.round_latents(number, given, config)
            call: dict[str, Any] = {"guidance_scale": scale, "decoder": decoder, "output_type": "pt"}
            return called(labels, latents=latents, return_dict=False, **call)[0]  # type: ignore[return-value]

        return benchmark.Contender(decoder + suffix, run)

    contenders = [contender(pipe, decoder) for decoder in DECODERS]
    if options.compile:
        torch.compiler.reset()  # copies share their code, and it has only so many graphs
        compiled = copy.deepcopy(pipe)
        compiled.transformer.compile_decoding()
        cast(TarFlowInverseModel, compiled.inverse).compile()
        contenders += [contender(compiled, decoder, " compiled") for decoder in DECODERS]
    benchmark.measure(contenders, given, peaks=False)
    rows = []
    for own in contenders:
        ratios = [base / seconds for base, seconds in zip(contenders[0].seconds, own.seconds, strict=True)]
        rates = [batch_size / seconds for seconds in own.seconds]
        rows.append(
            about
            | {
                "batch": batch_size,
                "decoder": own.name,
                "images/s": statistics.median(rates),
                "range": f"{min(rates):.3g} to {max(rates):.3g}",
                "times exact": statistics.median(ratios),
                "its range": f"{min(ratios):.3g} to {max(ratios):.3g}",
                "sweeps": sweeps(pipe, benchmark.round_latents(0, given, config), labels, scale, own.name.split()[0]),
            }
        )
    return rows


@torch.no_grad()
def sweeps(
    pipe: TarFlowPipeline, latents: torch.Tensor, labels: torch.Tensor | None, scale: float, decoder: str
) -> int:
    """Sweeps of all blocks of the exact decoder, from the inverse's first guesses for the refined one; one pass: 0."""
    assert pipe.inverse is not None
    if decoder == "one_pass":
        return 0
    guesses = None
    if decoder == "refined":
        guesses = pipe.inverse(latents, labels, guidance_scale=scale, return_dict=True).states
    guidance = SamplingSettings.of(pipe.config, {"guidance_scale": scale}).guidance
    solved = pipe.transformer.decode_blocks(latents, labels, guidance=guidance, guesses=guesses)
    return sum(count for _, count in solved)


def speed_of_length(options: argparse.Namespace, side: int) -> list[Row]:
    """The rows of speed of a flow of side^2 tokens, eight blocks, and its inverse, both of random weights."""
    torch.manual_seed(0)
    shape = TarFlowConfig(
        image_size=2 * side, num_channels=1, hidden_size=64, num_blocks=8, layers_per_block=2, num_classes=10
    )
    flow = benchmark.with_small_weights(TarFlowModel(shape).eval())
    config = TarFlowInverseConfig(
        flow=flow.config, hidden_size=64, num_layers=18, max_guidance_scale=4.0, num_training_steps=1
    )
    pipe = TarFlowPipeline(transformer=flow, inverse=TarFlowInverseModel(config).eval()).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    tokens = flow.config.num_tokens
    return [row for size in options.length_batch_sizes for row in speed(options, pipe, size, tokens=tokens)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_model_and_data(parser)
    command_line.add_distances(parser, num_samples=1000)
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="what to measure [all]")
    add("--guidance_scales", nargs="+", type=float, default=[1.0, 2.0, 4.0], help="and the pipeline's [1 2 4]")
    add("--batch_sizes", nargs="+", type=int, default=[1, 16, 64], help="of the table of speed [1 16 64]")
    add("--sides", nargs="+", type=int, default=[4, 8, 16], help="of the grids of tokens [4 8 16]")
    add("--length_batch_sizes", nargs="+", type=int, default=[1, 16], help="of the table of tokens [1 16]")
    add("--rounds", type=int, default=9, help="of the tables of time [9]")
    add("--threads", type=int, help="threads of torch on the CPU")
    add("--compile", action="store_true", help="time each decoder compiled, too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the table of tokens")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

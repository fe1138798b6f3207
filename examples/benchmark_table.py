"""Times decoding at several batch sizes and lengths of the sequence, and writes tables of the ratios.

python -m examples.benchmark_table --model runs/fashion_mnist_cpu --reference path/to/ml-tarflow --output table.md \
    --plot lengths.png

Every figure is of rounds in which all contenders run in turn in one process, see `examples/benchmark.py`. The first
table has a row for each batch size: the seconds of the first contender (the authors' code where `--reference` names
it), how many times faster the others are, the sweeps of each block and the seconds of the first calls, which compile.
The second one has seconds against the number of tokens of models with random weights, and the exponent fitted to them.
"""

import argparse
import importlib
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples import benchmark
from tarflow_hf import TarFlowConfig, TarFlowModel


def main(argv: Sequence[str]) -> None:
    """Writes the tables that the command line asks for."""
    options = parse_arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = benchmark.load_pipeline(options).to(options.device).transformer
    text = f"{benchmark.machine(options.device)}\n\n{batch_table(options, model)}\n\n{length_table(options)}\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what it shares with `examples/benchmark.py` has its defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(benchmark.SIZES), default="fashion", help="a model of random weights")
    parser.add_argument("--model", help="folder of a trained pipeline, in place of --size")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[8, 16, 32, 64], help="of images of (side / 2)^2 tokens"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reference", type=Path, help="your clone of the authors' ml-tarflow")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--plot", type=Path, help="PNG file of the second table to write")
    shared = benchmark.parse_arguments(["sampling", "--compile"])
    return argparse.Namespace(**(vars(shared) | vars(parser.parse_args(argv))))


def batch_table(options: argparse.Namespace, model: TarFlowModel) -> str:
    """A row for each batch size: times faster than the first contender, medians over the rounds with their range."""
    rows: list[list[str]] = []
    for batch in options.batch_sizes:
        contenders = measured(options, model, batch, options.reference)
        first = contenders[0]
        if not rows:
            names = [contender.name for contender in contenders]
            rows = [["batch", f"{names[0]}, seconds", *names[1:], "sweeps of each block", "first calls, seconds"]]
        cells = [str(batch), f"{statistics.median(first.seconds):.3f}"]
        for contender in contenders[1:]:
            ratios = [base / own for base, own in zip(first.seconds, contender.seconds, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
        windowed = next(contender for contender in contenders if contender.name == "windowed")
        sweeps = zip(*windowed.notes["sweeps_per_block"], strict=True)
        cells.append(", ".join(f"{statistics.fmean(block):.1f}" for block in sweeps))
        compiled = [contender for contender in contenders if contender.name.endswith("compiled")]
        cells.append(" + ".join(f"{contender.notes['first_seconds']:.0f}" for contender in compiled))
        rows.append(cells)
        print(cells, file=sys.stderr)
    return markdown(rows)


def length_table(options: argparse.Namespace) -> str:
    """A row for each contender: milliseconds of one image at each length, and the fitted exponent of their growth."""
    lengths = [(side // 2) ** 2 for side in options.sides]
    rows: dict[str, list[float]] = {}
    for side in options.sides:
        sizes = {"image_size": side, "num_channels": 1, "patch_size": 2, "hidden_size": 64, "num_classes": 10}
        config = TarFlowConfig(**sizes, num_blocks=2, layers_per_block=2)
        model = benchmark.with_small_weights(TarFlowModel(config).eval()).to(options.device)
        for contender in measured(options, model, 1, None):
            rows.setdefault(contender.name, []).append(statistics.median(contender.seconds))
    if options.plot:
        draw_lengths(lengths, rows, options)
    head = ["milliseconds, batch 1", *(f"T = {length}" for length in lengths), "exponent"]
    cells = [
        [name, *(f"{1e3 * s:.1f}" for s in seconds), exponent(lengths, seconds)] for name, seconds in rows.items()
    ]
    return markdown([head, *cells])


def draw_lengths(lengths: Sequence[int], rows: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Draws the seconds against the lengths; needs matplotlib, which the rest does without."""
    plotting = importlib.import_module("tarflow_hf.images.plotting")
    curves = {name: (lengths, [1e3 * s for s in seconds]) for name, seconds in rows.items()}
    title = ", ".join(f"{name} {value}" for name, value in benchmark.machine(options.device).items())
    names = {"xlabel": "tokens", "ylabel": "milliseconds for an image", "title": title}
    plotting.save_curve(curves, options.plot, **names, logarithmic=True)


def measured(
    options: argparse.Namespace, model: TarFlowModel, batch: int, folder: Path | None
) -> list[benchmark.Contender]:
    """All contenders at this batch size, timed."""
    given = argparse.Namespace(**(vars(options) | {"batch_size": batch}))
    reference = benchmark.load_reference(folder, model) if folder else None
    contenders = benchmark.sampling(given, model, reference)
    benchmark.measure(contenders, given, peaks=False)
    return contenders


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> str:
    """The p of seconds = c * length^p, by least squares of the logarithms; a dash for a single length.

    Example:
        >>> exponent([1, 2, 4], [3.0, 12.0, 48.0])
        '2.00'
    """
    if len(lengths) < 2:
        return "-"
    slope, _ = statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds])
    return f"{slope:.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of which the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])

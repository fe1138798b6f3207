"""Tiles of a digital elevation model, 16x16 heights in metres: making them, and samples measured beside them.

    python examples/data/elevation.py make [FOLDER]
    python examples/data/elevation.py measure runs/elevation [--picture marginals.png]

The heights (the Jacksboro fault in Tennessee, 344 x 403 points 3 seconds of arc apart) come with matplotlib. `make`
cuts them into tiles that overlap, a step of four apart; every fifth stripe of 16 columns is held out. `measure` draws
tiles and compares marginals: of the heights, of the slopes from a point to its eastern neighbour, of the relief of a
tile (its highest point less its lowest), and of the heights of points above the mean of their four neighbours. Told is
the largest distance of the cumulative distributions of samples and training tiles, that of Kolmogorov and Smirnov, and
beside it that of held-out and training tiles.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure

from tarflow_hf.training.export import load_pipeline

SIDE, STEP, STRIPES = 16, 4, 5
FOLDER = Path(__file__).parent / "elevation"


def relief(tiles: np.ndarray) -> np.ndarray:
    """(tiles,) highest point less lowest point of each."""
    return tiles.max((1, 2)) - tiles.min((1, 2))


def roughness(tiles: np.ndarray) -> np.ndarray:
    """Heights above the mean of the four neighbours, of all points within a tile."""
    neighbours = tiles[:, :-2, 1:-1] + tiles[:, 2:, 1:-1] + tiles[:, 1:-1, :-2] + tiles[:, 1:-1, 2:]
    return tiles[:, 1:-1, 1:-1] - neighbours / 4


MARGINALS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "height, m": lambda tiles: tiles,
    "height of the eastern neighbour less own, m": lambda tiles: np.diff(tiles, axis=2),
    "relief of a tile, m": relief,
    "height above the four neighbours, m": roughness,
}


def main(argv: Sequence[str]) -> None:
    """Does what the first word of the command line says."""
    options = parse_arguments(argv)
    options.command(options)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("make", help="cut the heights into tiles")
    one.set_defaults(command=make)
    one.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="[elevation beside this script]")
    two = commands.add_parser("measure", help="are the marginals of samples those of the data?")
    two.set_defaults(command=measure)
    two.add_argument("model", help="folder of a saved pipeline, or its name on the Hub")
    two.add_argument("--data", type=Path, default=FOLDER, help="folder of the tiles [elevation beside this script]")
    two.add_argument("--num_samples", type=int, default=1000)
    two.add_argument("--picture", type=Path, help="PNG file of the marginals")
    two.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def tiles_of(heights: np.ndarray, lefts: Sequence[int]) -> np.ndarray:
    """(tiles, SIDE, SIDE) parts of a map whose first column is one of these."""
    tops = range(0, heights.shape[0] - SIDE + 1, STEP)
    return np.stack([heights[top : top + SIDE, left : left + SIDE] for top in tops for left in lefts])


def make(options: argparse.Namespace) -> None:
    """Writes both splits into the folder, over what is there."""
    heights = cast(Any, get_sample_data("jacksboro_fault_dem.npz"))["elevation"]
    period = STRIPES * SIDE
    every = range(0, heights.shape[1] - SIDE + 1, STEP)
    train = [left for left in every if left % period + SIDE <= period - SIDE]
    held_out = [left for left in every if left % period == period - SIDE]
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, lefts in (("train", train), ("test", held_out)):
        tiles = tiles_of(heights, lefts)
        np.save(options.folder / f"{name}.npy", tiles)
        print(f"{options.folder / f'{name}.npy'}: {len(tiles)} tiles, {tiles.min()} to {tiles.max()} m")


def largest_distance(first: np.ndarray, second: np.ndarray) -> float:
    """sup |F(x) - G(x)| of the cumulative distributions of two sets of numbers, in [0, 1]."""
    first, second = np.sort(first, axis=None), np.sort(second, axis=None)
    places = np.concatenate([first, second])
    shares = [np.searchsorted(values, places, side="right") / len(values) for values in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def measure(options: argparse.Namespace) -> None:
    """Prints how far the marginals are from each other, and draws them."""
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    parts = []
    for start in range(0, options.num_samples, 100):
        count = min(100, options.num_samples - start)
        (values,) = pipe(num_images_per_label=count, generator=generator, output_type="np", return_dict=False)
        parts.append(np.asarray(values)[..., 0])
    tiles = {"samples": np.concatenate(parts)}
    for name, split in (("held-out tiles", "test"), ("training tiles", "train")):
        tiles[name] = np.load(options.data / f"{split}.npy").astype(np.float64)
    for name, of in MARGINALS.items():
        found = {kind: of(values) for kind, values in tiles.items()}
        ours, others = (largest_distance(found[kind], found["training tiles"]) for kind in list(found)[:2])
        print(f"{name}: samples {ours:.3f}, held-out tiles {others:.3f} from the training tiles")
    if options.picture:
        draw(tiles, options.picture)
        print(f"-> {options.picture}")


def draw(tiles: Mapping[str, np.ndarray], path: Path) -> None:
    """Histograms of the marginals, one panel each."""
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, of) in zip(figure.subplots(2, 2).flat, MARGINALS.items(), strict=True):
        found = {kind: of(values).ravel() for kind, values in tiles.items()}
        low, high = np.quantile(np.concatenate([found["samples"], found["training tiles"]]), [0.001, 0.999]).round()
        width = np.ceil((high - low) / 60)  # whole metres, as the map has
        for kind, values in found.items():
            weights = np.full(len(values), 1 / len(values))
            axes.hist(
                values, bins=np.arange(low - 0.5, high + width, width), weights=weights, histtype="step", label=kind
            )
        axes.set(xlabel=name, ylabel="share of a bin")
    axes.legend()
    figure.savefig(path, format="png")


if __name__ == "__main__":
    main(sys.argv[1:])

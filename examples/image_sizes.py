"""Bits per dimension at other image sizes before any training there: what adapted position embeddings are worth.

    python examples/image_sizes.py runs/digits --data examples/data/digits --sizes 4 6 10 12 8x12

A model made for each size by `adapt` is measured on held-out images of that size, with the training noise on: with
fresh position embeddings, with interpolated ones, and with those of `adapt`, which are nearer to their mean.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from tarflow_hf import TarFlowModel, TarFlowPipeline, adapt, bits_per_dim
from tarflow_hf.metrics.images import noisy_images
from tarflow_hf.training.grids import interpolate_over_grid

Size = tuple[int, int]
Kind = Callable[[TarFlowModel, TarFlowModel], None]


def main(argv: Sequence[str]) -> None:
    """Prints a row for each size."""
    options = parse_arguments(argv)
    source = TarFlowPipeline.from_pretrained(options.model).transformer
    print("| size | fresh | interpolated | `adapt` |\n| --- | --- | --- | --- |")
    for size in options.sizes:
        bits = [f"{measure(source, size, kind, options):.3f}" for kind in KINDS]
        print(f"| {size[0]} x {size[1]} | {' | '.join(bits)} |", flush=True)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline, or its name on the Hub")
    parser.add_argument("--data", required=True, help="data set with the classes and conditions of the model")
    parser.add_argument("--split", default="test", help="split of the data set [test]")
    parser.add_argument("--sizes", type=size_of, nargs="+", required=True, help="sides of squares, or HEIGHTxWIDTH")
    parser.add_argument("--num_images", type=int, default=100, help="images, drawn evenly from all classes [100]")
    return parser.parse_args(argv)


def size_of(text: str) -> Size:
    """Height and width of 8 or 8x12."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def fresh(source: TarFlowModel, new: TarFlowModel) -> None:
    """Position embeddings as an untrained model has them."""
    torch.manual_seed(0)
    untrained, own = TarFlowModel(new.config).state_dict(), new.state_dict()
    for name in filter(_of_positions, own):
        own[name].copy_(untrained[name])


def interpolated(source: TarFlowModel, new: TarFlowModel) -> None:
    """Position embeddings interpolated and no more."""
    trained, own = source.state_dict(), new.state_dict()
    for name in filter(_of_positions, own):
        own[name].copy_(interpolate_over_grid(trained[name], source.config.grid_size, new.config.grid_size))


def _of_positions(name: str) -> bool:
    return name.endswith("position_embedding")


def adapted(source: TarFlowModel, new: TarFlowModel) -> None:
    """Those of `adapt`, which are there already."""


KINDS: tuple[Kind, ...] = (fresh, interpolated, adapted)


@torch.no_grad()
def measure(source: TarFlowModel, size: Size, kind: Kind, options: argparse.Namespace) -> float:
    """Mean bits per dimension of noisy images of a size."""
    model, _ = adapt(source, image_size=size)
    kind(source, model)
    noisy, labels, conditions = noisy_images(
        model.config, options.data, options.split, num_images=options.num_images, seed=0
    )
    log_prob = []
    for part in torch.arange(len(noisy)).split(50):
        given = [None if values is None else values[part] for values in (labels, conditions)]
        log_prob.append(model.log_prob(noisy[part], given[0], condition=given[1]))
    return float(bits_per_dim(torch.cat(log_prob), model.config.num_dims).mean())


if __name__ == "__main__":
    main(sys.argv[1:])

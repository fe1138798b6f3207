"""Which condition does an image have? The posterior of one number of a model's condition, from exact likelihoods.

    python examples/posterior.py runs/photo_strips --data examples/data/photo_strips --vary contrast

p(c|x) is proportional to p(x|c), on an even grid of values c of one number, while the others are those of the image.
The grid is refined for each image, around its highest density. Images carry the model's training noise. Writes
posterior.png to MODEL/evaluation, with the posteriors of a few images, and tells how often the true value is in the
central 90 % interval: as it is, and with a temperature that is fitted on one half of the images, for the other half.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from tarflow_hf import TarFlowModel, TarFlowPipeline
from tarflow_hf.images.arguments import ArrayLayout
from tarflow_hf.images.plotting import Curves, save_curve
from tarflow_hf.metrics.images import noisy_images
from tarflow_hf.metrics.posterior import central_interval, class_posterior, condition_log_prob, fit_temperature

_KEPT_NATS = 30.0  # below the highest log-density: what is less likely has no share of the posterior
_SHOWN = 3
_SPREAD = 4.0  # standard deviations of the training data that the first grid covers to both sides


def main(argv: Sequence[str]) -> None:
    """Measures and draws what the command line asks for."""
    options = parse_arguments(argv)
    pipe = TarFlowPipeline.from_pretrained(options.model).to(options.device)
    model, names = pipe.transformer, pipe.transformer.config.condition_names or []
    if options.vary not in names:
        raise ValueError(
            f"vary must be one of the condition's numbers, {', '.join(names) or 'none'}, got {options.vary!r}"
        )
    place = names.index(options.vary)
    told = {"num_images": options.num_images, "seed": options.seed, "array_layout": options.array_layout}
    images, labels, conditions = noisy_images(model.config, options.data, options.split, **told)
    assert conditions is not None  # it has names
    images, conditions = images.to(options.device), conditions.to(options.device)
    labels = None if labels is None else labels.to(options.device)
    grid = refined_grid(model, images, conditions, place, options, labels)
    log_prob = along(model, images, conditions, place, grid, labels)
    true = conditions[:, place].double().cpu()
    fitted = fit_temperature(log_prob[::2], (grid[::2] - true[::2, None]).abs().argmin(dim=1))
    print(coverage(grid, log_prob, true, options.mass, 1.0))
    print(coverage(grid[1::2], log_prob[1::2], true[1::2], options.mass, fitted))
    path = options.output or Path(options.model, "evaluation", "posterior.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_curve(
        curves(grid, class_posterior(log_prob), true),
        path,
        ylabel="density",
        xlabel=options.vary,
        title=f"posterior of {options.vary} for {min(_SHOWN, len(true))} images; upright lines: the true values",
    )
    print(path)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline with a condition, or its name on the Hub")
    parser.add_argument("--data", required=True, help="data set with columns named as the numbers of the condition")
    parser.add_argument("--split", default="test", help="split of the data set [test]")
    parser.add_argument("--array_layout", choices=get_args(ArrayLayout), help="for a model of arrays: their axes")
    parser.add_argument("--vary", required=True, help="the number whose posterior is asked for")
    parser.add_argument("--num_images", type=int, default=200, help="images, drawn from the split [200]")
    parser.add_argument("--grid", type=int, default=41, help="points of the grid [41]")
    parser.add_argument("--mass", type=float, default=0.9, help="probability of the interval [0.9]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="PNG file [MODEL/evaluation/posterior.png]")
    options = parser.parse_args(argv)
    if options.grid < 3:
        parser.error(f"--grid must be at least 3 points, got {options.grid}")
    if options.num_images < 2:
        parser.error(f"--num_images must be at least 2, got {options.num_images}")
    return options


def along(
    model: TarFlowModel,
    images: torch.Tensor,
    conditions: torch.Tensor,
    place: int,
    values: torch.Tensor,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """(images, n) log p(x|c), where number `place` of each condition takes its n values in turn."""
    tried = conditions[:, None].repeat(1, values.shape[1], 1)
    tried[:, :, place] = values.to(tried)
    return condition_log_prob(model, images, tried, class_labels=labels).cpu()


def refined_grid(
    model: TarFlowModel,
    images: torch.Tensor,
    conditions: torch.Tensor,
    place: int,
    options: argparse.Namespace,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """(images, grid) even values for each image, over what is likely at all on a grid over the whole data."""
    config, seen = model.config, conditions[:, place].double().cpu()
    mean = config.condition_mean[place] if config.condition_mean else float(seen.mean())
    std = config.condition_std[place] if config.condition_std else float(seen.std())
    ends = min(float(seen.min()), mean - _SPREAD * std), max(float(seen.max()), mean + _SPREAD * std)
    coarse = torch.linspace(*ends, options.grid, dtype=torch.float64)
    log_prob = along(model, images, conditions, place, coarse.expand(len(seen), -1), labels)
    likely = log_prob > log_prob.amax(dim=1, keepdim=True) - _KEPT_NATS
    step = coarse[1] - coarse[0]
    low = torch.where(likely, coarse, math.inf).amin(dim=1) - step
    high = torch.where(likely, coarse, -math.inf).amax(dim=1) + step
    return low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, options.grid, dtype=torch.float64)


def coverage(grid: torch.Tensor, log_prob: torch.Tensor, true: torch.Tensor, mass: float, temperature: float) -> str:
    """How often the true value is in the interval, its standard error, and how wide the interval is."""
    ends = central_interval(grid, class_posterior(log_prob, temperature=temperature), mass)
    inside = ((ends[:, 0] <= true.cpu()) & (true.cpu() <= ends[:, 1])).double()
    error = (inside.mean() * (1 - inside.mean()) / len(inside)).sqrt()
    width = (ends[:, 1] - ends[:, 0]).median()
    return (
        f"temperature {temperature:.3g}: {inside.mean():.1%} ± {error:.1%} of {len(inside)} true values are in the "
        f"{mass:.0%} interval, median width {width:.4f}"
    )


def curves(grid: torch.Tensor, posterior: torch.Tensor, true: torch.Tensor) -> Curves:
    """The densities of the first images, and an upright line at each true value."""
    found = {}
    for index in range(min(_SHOWN, len(true))):
        density = posterior[index] / (grid[index, 1] - grid[index, 0])
        found[f"image {index + 1}"] = (grid[index].tolist(), density.tolist())
        found[f"value of image {index + 1}, {true[index]:.3f}"] = (
            [float(true[index])] * 2,
            [0.0, float(density.max())],
        )
    return found


if __name__ == "__main__":
    main(sys.argv[1:])

"""How fast a run's input is by itself, beside how fast the run trains: a device that waits for images is seen."""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from tarflow_hf.images.arguments import require
from tarflow_hf.images.latent_data import collate_latents
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.augmentation import Augmenter
from tarflow_hf.training.json_lines import read_rows
from tarflow_hf.training.latents import encode_run_data, flow_config
from tarflow_hf.training.recipes import parse_arguments
from tarflow_hf.training.step_inputs import step_inputs

_WAITS_BELOW = 1.5  # times the training's speed: a run that waits trains nearly as fast as its input comes


@dataclass(frozen=True)
class InputSpeed:
    """What was measured.

    Args:
        batch_size: Images of a step.
        rates: Images a second in each round.
        trained: Images a second of a run in each line of its log; empty where none was named.

    Example:
        >>> print(InputSpeed(64, rates=(980.0, 1000.0, 1010.0), trained=(240.0, 250.0, 260.0)))
        input: 1000 images/s (980 to 1010 in 3 rounds), 15.62 steps/s of 64 images
        training: 250 images/s (240 to 260 in 3 lines), 3.906 steps/s
        the input is 4.0 times as fast as the training, which does not wait for it
        >>> print(InputSpeed(64, rates=(260.0,), trained=(250.0,)))
        input: 260 images/s (260 to 260 in 1 rounds), 4.062 steps/s of 64 images
        training: 250 images/s (250 to 250 in 1 lines), 3.906 steps/s
        the input is 1.0 times as fast as the training, which waits for it: try more num_workers, or cache_images
    """

    batch_size: int
    rates: tuple[float, ...]
    trained: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Medians and ranges, and what they mean."""
        rate, size = statistics.median(self.rates), self.batch_size
        spread = f"({min(self.rates):.4g} to {max(self.rates):.4g} in {len(self.rates)} rounds)"
        lines = [f"input: {rate:.4g} images/s {spread}, {rate / size:.4g} steps/s of {size} images"]
        if self.trained:
            trained = statistics.median(self.trained)
            waits = rate < _WAITS_BELOW * trained
            advice = "waits for it: try more num_workers, or cache_images" if waits else "does not wait for it"
            spread = f"({min(self.trained):.4g} to {max(self.trained):.4g} in {len(self.trained)} lines)"
            lines += [
                f"training: {trained:.4g} images/s {spread}, {trained / size:.4g} steps/s",
                f"the input is {rate / trained:.1f} times as fast as the training, which {advice}",
            ]
        return "\n".join(lines)


def input_speed(
    arguments: TrainingArguments, *, rounds: int = 5, steps: int = 20, metrics: Path | None = None
) -> InputSpeed:
    """Measures the input of a run by itself: the loader of the trainer, its workers, resizing, flips, noise, batches.

    A first round, in which workers start and their queues fill, is not counted. What is measured is one process that
    has the machine to itself; while it trains on a CPU, it shares that with its workers.

    Args:
        arguments: The options of the run. With `vae` the data are encoded first, where training will find them.
        rounds: Rounds that are timed, at least 1.
        steps: Steps of a round, at least 1.
        metrics: `metrics.jsonl` of a run, whose speed is told too; it stands in `timing.jsonl` beside it.

    Raises:
        ValueError: If rounds or steps are below 1, or the files of the run do not tell its speed.

    Example:
        >>> from tarflow_hf.training.recipes import parse_arguments
        >>> arguments = parse_arguments([], default_recipe="examples/recipes/digits.yaml")
        >>> len(input_speed(arguments, rounds=3, steps=2).rates)
        3
    """
    for name, value in (("rounds", rounds), ("steps", steps)):
        require(value >= 1, f"{name} must be at least 1, got {value}")
    trained = () if metrics is None else training_rates(metrics)
    conditional, settings = arguments.model.class_conditional, arguments.optimization
    data, _ = load_image_data(arguments.data, class_conditional=conditional)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    latents = encode_run_data(arguments, accelerator, data, None)
    config = flow_config(arguments, data.class_names, None if latents is None else latents.vae, **data.condition)
    augment = Augmenter(
        config,
        settings,
        horizontal_flip=arguments.data.horizontal_flip,
        device=accelerator.device,
        latent_source=arguments.data.latent_source,
    )
    layout = BatchLayout(settings.batch_size, settings.gradient_accumulation_steps)
    encoded = None if latents is None else (latents.train, collate_latents)
    inputs = step_inputs(data, arguments, layout, augment, steps=range((1 + rounds) * steps), encoded=encoded)
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        for _ in range(steps):
            next(inputs)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rates = tuple(steps * settings.batch_size / took for took in seconds[1:])
    return InputSpeed(settings.batch_size, rates, trained)


def training_rates(metrics: Path) -> tuple[float, ...]:
    """Images a second of a run, line by line, from `timing.jsonl` beside its `metrics.jsonl`.

    Args:
        metrics: `metrics.jsonl` of the run.

    Raises:
        FileNotFoundError: If one of the files is not there.
        ValueError: If no line tells a speed.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("metrics.jsonl").write_text("")
        >>> _ = Path("timing.jsonl").write_text('{"step": 10, "images_per_second": 250.0}' + chr(10))
        >>> training_rates(Path("metrics.jsonl"))
        (250.0,)
    """
    timing = metrics.with_name("timing.jsonl")
    for path in (metrics, timing):
        if not path.is_file():
            raise FileNotFoundError(
                f"metrics must name metrics.jsonl of a run, with timing.jsonl beside it: no {path}"
            )
    rates = tuple(row["images_per_second"] for row in read_rows(timing) if "images_per_second" in row)
    require(bool(rates), f"{timing} tells no images_per_second yet: the run has not written a line")
    return rates


def input_speed_of(argv: Sequence[str], *, default_recipe: Path) -> InputSpeed:
    """[`input_speed`] as a command line asks for it: [recipe.yaml] [--option value ...] and options of the measure.

    Args:
        argv: The arguments after the program's name.
        default_recipe: The recipe that is read where none is named.

    Raises:
        SystemExit: If the command line is not understood; the reason is printed.
        ValueError: As for [`input_speed`], or if an option does not fit.

    Example:
        >>> from pathlib import Path
        >>> options = ["--batch_size", "32", "--rounds", "2", "--steps", "3"]
        >>> input_speed_of(options, default_recipe=Path("examples/recipes/digits.yaml")).batch_size
        32
    """
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("measuring, beside all options of a recipe")
    group.add_argument("--rounds", type=int, default=5, help="rounds that are timed [%(default)s]")
    group.add_argument("--steps", type=int, default=20, help="steps of a round [%(default)s]")
    group.add_argument("--metrics", type=Path, help="metrics.jsonl of a run, whose speed is told too")
    if "--help" in argv or "-h" in argv:
        print(parser.format_help())
    options, of_recipe = parser.parse_known_args(argv)
    return input_speed(parse_arguments(of_recipe, default_recipe=default_recipe), **vars(options))


__all__ = ["InputSpeed", "input_speed", "input_speed_of", "training_rates"]

"""The input of training steps: batches from the loader, augmented, in the parts that a step takes."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset

from tarflow_hf.images.batches import ImageBatch, make_loader
from tarflow_hf.images.latent_data import LatentBatch
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.images.sources import ImageData
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.augmentation import Augmenter, MicroBatch
from tarflow_hf.training.stopping import leave_stopping_to_the_run

logger = logging.getLogger(__name__)


def step_inputs(
    data: ImageData,
    arguments: TrainingArguments,
    layout: BatchLayout,
    augment: Augmenter,
    *,
    steps: range,
    encoded: tuple[Dataset[Any], Callable[..., Any]] | None = None,
) -> Iterator[tuple[list[MicroBatch], int]]:
    """For each step: the model's input in parts, and how many unreadable images were replaced in it.

    Args:
        data: The training data.
        arguments: The options of the run.
        layout: Which part of each batch is this process's.
        augment: Flips, noise and dropped labels, on the device of this process.
        steps: Steps to read for.
        encoded: As in [`make_loader`].

    Example:
        >>> from tarflow_hf.images.order import BatchLayout
        >>> from tarflow_hf.images.sources import load_image_data
        >>> from tarflow_hf.training.augmentation import Augmenter
        >>> from tarflow_hf.training.recipes import parse_arguments
        >>> arguments = parse_arguments([], default_recipe="examples/recipes/digits.yaml")
        >>> data, _ = load_image_data(arguments.data, class_conditional=True)
        >>> config, settings = arguments.model.to_config(data.class_names), arguments.optimization
        >>> augment = Augmenter(config, settings, horizontal_flip=False, device=torch.device("cpu"))
        >>> (parts, replaced), = step_inputs(data, arguments, BatchLayout(64), augment, steps=range(1))
        >>> parts[0][0].shape, replaced
        (torch.Size([64, 1, 8, 8]), 0)
    """
    loader = make_loader(
        data,
        arguments.data,
        arguments.image_format,
        layout,
        seed=arguments.optimization.seed,
        steps=steps,
        pin_memory=augment.device.type == "cuda",
        encoded=encoded,
    )
    loader.worker_init_fn = leave_stopping_to_the_run
    parts = iter(loader)
    for step in steps:
        batches: list[ImageBatch | LatentBatch] = [next(parts) for _ in range(layout.micro_batches)]
        bad_rows = [row for batch in batches for row in batch.bad_rows]
        if bad_rows:
            logger.warning("unreadable images in rows %s of %s, replaced", bad_rows, data.name)
        inputs = [augment(batch, step, layout.positions(index)) for index, batch in enumerate(batches)]
        yield inputs, len(bad_rows)


__all__ = ["step_inputs"]

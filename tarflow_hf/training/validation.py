"""What a training run looks at on its way: held-out bits per dimension and a grid of samples."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.hub.model_card import SAMPLING_DEFAULTS
from tarflow_hf.images.batches import ImageBatch, StoredImages, collate
from tarflow_hf.images.latent_data import LatentBatch, StoredLatents, collate_latents
from tarflow_hf.images.latents import Autoencoder
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.arguments import OutputArguments
from tarflow_hf.training.augmentation import add_training_noise
from tarflow_hf.training.stopping import Interrupted, StopTogether, leave_stopping_to_the_run
from tarflow_hf.training.trainer import output_bits_per_dim

logger = logging.getLogger(__name__)
_NOISE_SEED = 1_000_003  # of the noise on held-out images, the same in every evaluation
_SAMPLE_SEED = 2_000_003  # of the latents of sample grids


@torch.no_grad()
def held_out_bits_per_dim(
    model: TarFlowModel,
    images: StoredImages | StoredLatents,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
    stop: StopTogether | None = None,
) -> float:
    """Mean bits per dimension of held-out images, with labels where the model has classes. All processes call it.

    The images carry the noise that the model is trained with, drawn from fixed seeds. For uniform noise this is the
    usual bound on the code length of 8-bit images; for Gaussian noise it is the density of noisy images, which
    compares runs of one noise level but is no compression rate. A model with noise conditioning is measured at the
    lowest of its levels.

    Args:
        model: The model in evaluation mode.
        images: The held-out images, or their latents.
        accelerator: The processes, which share the work.
        batch_size: Images that a process evaluates at once.
        num_workers: Processes that read images, for each training process.
        stop: Asked before every batch.

    Returns:
        Bits per dimension, the same on every process.

    Raises:
        Interrupted: If the run is to stop.

    Example:
        >>> from accelerate import Accelerator
        >>> from tarflow_hf.images.batches import StoredImages
        >>> from tarflow_hf.images.sources import load_image_data
        >>> from tarflow_hf.images.processing import ImageFormat
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> digits = DataArguments(data="./examples/data/digits", eval_split="test")
        >>> _, data = load_image_data(digits, class_conditional=False, eval_images=20)
        >>> images = StoredImages(data, ImageFormat(image_size=8, num_channels=1))
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model = TarFlowModel(config).eval()
        >>> bits = held_out_bits_per_dim(model, images, Accelerator(cpu=True), batch_size=10, num_workers=0)
        >>> round(bits, 1)  # of noisy digits under a standard normal: an untrained model changes nothing
        8.8
    """
    rows = range(accelerator.process_index, len(images), accelerator.num_processes)
    batches = iter(_in_batches(images, rows, batch_size, num_workers))
    total = torch.zeros((), dtype=torch.float64)
    for index in range(math.ceil(len(images) / (batch_size * accelerator.num_processes))):
        _ask(stop)
        if (batch := next(batches, None)) is None:  # of the last round another process may have the rest
            continue
        seeds = [_NOISE_SEED + row for row in rows[index * batch_size : (index + 1) * batch_size]]
        total += _noisy_bits(model, batch, seeds, accelerator.device).double().sum().cpu()
    return accelerator.reduce(total.float().to(accelerator.device), "sum").item() / len(images)


def _ask(stop: StopTogether | None) -> None:
    """Raises Interrupted, on all processes, if the run is to stop."""
    if stop is not None:
        stop.check_together()


def _in_batches(
    images: StoredImages | StoredLatents, rows: range, batch_size: int, num_workers: int
) -> DataLoader[Any]:
    """The images of these rows, in order."""
    stored = isinstance(images, StoredLatents)
    return DataLoader(
        Subset(cast(Dataset[Any], images), rows),
        batch_size,
        collate_fn=collate_latents if stored else collate,
        num_workers=0 if isinstance(images, StoredLatents) or images.samples else num_workers,
        worker_init_fn=leave_stopping_to_the_run,
    )


def _noisy_bits(
    model: TarFlowModel, batch: ImageBatch | LatentBatch, seeds: list[int], device: torch.device
) -> torch.Tensor:
    """(batch,) bits per dimension of images with the noise of training, each from its own seed."""
    pixel_values, _ = batch.select(torch.zeros(len(seeds), dtype=torch.bool), device)
    levels = model.lowest_noise_level(pixel_values)
    pixel_values = add_training_noise(pixel_values, model.config, seeds, levels)
    labels = batch.class_labels.to(device) if model.config.num_classes else None
    condition = None if batch.condition is None else batch.condition.to(device)
    return output_bits_per_dim(model(pixel_values, labels, levels, condition, return_dict=True), model)


def make_pipeline(
    model: TarFlowModel,
    settings: OutputArguments,
    vae: Autoencoder | None = None,
    image_size: int | Sequence[int] | None = None,
) -> TarFlowPipeline:
    """The pipeline of a model, with the run's sampling defaults.

    Args:
        model: The model.
        settings: The sampling defaults.
        vae: The autoencoder of a model of latents.
        image_size: Side of the images, where the autoencoder gives larger ones.

    Example:
        >>> from tarflow_hf.training.arguments import OutputArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model = TarFlowModel(config).eval()
        >>> make_pipeline(model, OutputArguments(guidance_scale=2.0)).config["guidance_scale"]
        2.0
    """
    defaults = {name: getattr(settings, name) for name in SAMPLING_DEFAULTS}
    return TarFlowPipeline(transformer=model, vae=vae, image_size=None if vae is None else image_size, **defaults)


def sample_grid(
    model: TarFlowModel,
    settings: OutputArguments,
    accelerator: Accelerator,
    path: Path,
    stop: StopTogether | None = None,
    *,
    vae: Autoencoder | None = None,
    image_size: int | Sequence[int] | None = None,
) -> None:
    """Samples a grid with one row a class and writes it as PNG.

    Without classes there are just rows, or those of a model with a condition: each at another value of its first
    number, from 1.5 deviations below the mean to 1.5 above, the other numbers at their mean. The latents
    are the same in every grid of a run. All processes call it together and share the work.

    Args:
        model: The model in evaluation mode.
        settings: Size of the grid, and guidance and denoising.
        accelerator: The processes.
        path: PNG file, written by the main process.
        vae: The autoencoder of a model of latents.
        image_size: Side of the images, where the autoencoder gives larger ones.
        stop: Asked before every batch, and by its own process after every block.

    Raises:
        Interrupted: If the run is to stop; nothing is written.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> from tarflow_hf.training.arguments import OutputArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model = TarFlowModel(config).eval()
        >>> sample_grid(model, OutputArguments(sample_rows=2), Accelerator(cpu=True), Path("first.png"))
        >>> Path("first.png").exists()
        True
    """
    num_classes, columns = model.config.num_classes, settings.sample_columns
    rows = min(settings.sample_rows, num_classes or settings.sample_rows)
    classes = np.linspace(0, num_classes - 1, rows).round().astype(int).tolist() if num_classes else None
    conditions, names = _row_conditions(model.config, rows)
    names = [str((model.config.id2label or {})[label]) for label in classes] if classes else names
    (pipeline := make_pipeline(model, settings, vae, image_size)).set_progress_bar_config(disable=True)
    own = range(accelerator.process_index, rows * columns, accelerator.num_processes)
    images: list[tuple[int, Image.Image]] = []
    rounds = math.ceil(rows * columns / (settings.eval_batch_size * accelerator.num_processes))
    for start in range(0, rounds * settings.eval_batch_size, settings.eval_batch_size):
        _ask(stop)
        indices = own[start : start + settings.eval_batch_size]
        labels = [classes[index // columns] for index in indices] if classes else None
        given = None if conditions is None else [conditions[index // columns] for index in indices]
        with suppress(Interrupted):  # others learn of it when they are asked next
            images += zip(indices, _sample(pipeline, labels, given, indices, stop) if indices else [], strict=True)
    _ask(stop)
    images = sorted(gather_object(images), key=lambda item: item[0])
    if accelerator.is_main_process:
        with failing_pictures_warn(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image_grid([image for _, image in images], path, columns=columns, row_labels=names)


@contextmanager
def failing_pictures_warn(path: Path) -> Iterator[None]:
    """Turns a picture that cannot be made or written into a warning: no training is worth less than its picture.

    Args:
        path: The picture, for the message.

    Example:
        >>> from pathlib import Path
        >>> with failing_pictures_warn(Path("grid.png")):
        ...     raise OSError("no space left")  # logged
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning("the picture %s was not written: %s", path, error)


def _row_conditions(config: TarFlowConfig, rows: int) -> tuple[list[list[float]] | None, list[str] | None]:
    """The condition of each row of a grid, and what the row is called; None where classes make the rows."""
    if not config.condition_dim or config.num_classes:
        return None, None
    means, stds = (
        list(values or [default] * config.condition_dim)
        for values, default in ((config.condition_mean, 0.0), (config.condition_std, 1.0))
    )
    firsts = [means[0] + stds[0] * deviations for deviations in np.linspace(-1.5, 1.5, rows).tolist()]
    name = (config.condition_names or ["condition"])[0]
    return [[first, *means[1:]] for first in firsts], [f"{name} {first:.3g}" for first in firsts]


def _sample(
    pipeline: TarFlowPipeline,
    labels: list[int] | None,
    conditions: list[list[float]] | None,
    indices: Sequence[int],
    stop: StopTogether | None,
) -> list[Image.Image]:
    def after_block(pipe: TarFlowPipeline, step: int, block: int, tensors: dict[str, torch.Tensor]) -> None:
        if stop is not None:
            stop.check()

    generators = [torch.Generator().manual_seed(_SAMPLE_SEED + index) for index in indices]
    count = 1 if labels or conditions else len(indices)
    (images,) = pipeline(
        torch.tensor(labels) if labels else None,
        num_images_per_label=count,
        condition=conditions,
        generator=generators,
        output_type="latent",
        on_nonfinite="warn",
        callback_on_step_end=after_block,
        return_dict=False,
    )
    return pipeline.pictures(torch.as_tensor(images))  # a tensor for this output type


__all__ = ["failing_pictures_warn", "held_out_bits_per_dim", "make_pipeline", "sample_grid"]

"""Samples of a pipeline as 8-bit images, each from its own seed, and the forms in which evaluators read them."""

import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from tarflow_hf.flow.choices import Decoder
from tarflow_hf.flow.sampling.guidance import GuidanceSchedule
from tarflow_hf.flow.sampling.nonfinite import NonFiniteWarning
from tarflow_hf.images.processing import to_levels
from tarflow_hf.metrics.atomic import replacing
from tarflow_hf.metrics.likelihood import item_generator
from tarflow_hf.metrics.resumable import Arrays, BatchFiles
from tarflow_hf.pipeline_tarflow import TarFlowPipeline

_OF_LABELS = ("seed", "labels", "label_counts")
SampleLabels = Literal["random", "balanced", "data", "none"]


class NonFiniteSamplesError(ValueError):
    """A model gave samples that are not finite numbers."""


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn; None is the pipeline's saved default.

    Args:
        seed: Seed of the latents.
        guidance_scale: 1 + the paper's w.
        guidance_schedule: `"linear"` or `"constant"`.
        attention_temperature: Of the unlabelled branch.
        denoising_strength: 0 is off, 1 is Tweedie's formula.
        temperature: Standard deviation of the latents.
        labels: `"random"`: each sample is of a class drawn uniformly, so that samples are independent, as the kernel
            distance takes them to be; `"balanced"`: sample i is of class i mod num_classes; `"data"`: each is drawn as
            often as `label_counts` says; `"none"`: no labels, as always for an unconditional model.
        decoder: `"exact"`, or `"one_pass"` or `"refined"` for a pipeline with a learned inverse.
        label_counts: Images of each class in a data set, for `labels="data"`.

    Raises:
        ValueError: If `labels` is `"data"` and `label_counts` counts nothing, or has a negative number.

    Example:
        >>> SampleSettings(labels="balanced").class_labels(range(8, 12), num_classes=10)
        [8, 9, 0, 1]
        >>> SampleSettings(labels="random").class_labels(range(8, 12), num_classes=10)
        [3, 2, 2, 1]
        >>> SampleSettings(labels="data", label_counts=(9, 0, 1)).class_labels(range(8, 12), num_classes=3)
        [0, 0, 0, 0]
    """

    seed: int = 0
    guidance_scale: float | None = None
    guidance_schedule: GuidanceSchedule | None = None
    attention_temperature: float | None = None
    denoising_strength: float | None = None
    temperature: float | None = None
    labels: SampleLabels = "random"
    decoder: Decoder = "exact"
    label_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.labels == "data" and (sum(self.label_counts) == 0 or min(self.label_counts) < 0):
            raise ValueError(f"labels='data' needs label_counts of at least one image, got {self.label_counts}")

    def resolved(self, pipe: TarFlowPipeline) -> "SampleSettings":
        """The settings with the pipeline's defaults filled in."""
        values = {name: getattr(pipe.config, name) if value is None else value for name, value in asdict(self).items()}
        values["labels"] = self.labels if pipe.transformer.config.num_classes else "none"
        return SampleSettings(**values)

    def call_options(self) -> dict[str, Any]:
        """What is passed on to the pipeline call."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_LABELS}

    def class_labels(self, batch: range, num_classes: int) -> list[int] | None:
        """The class of each sample of a range of indices, or None without labels.

        Args:
            batch: Indices of the samples.
            num_classes: Classes of the model.

        Raises:
            ValueError: If there is not one count for each class.
        """
        if self.labels == "none":
            return None
        if self.labels == "balanced":
            return [index % num_classes for index in batch]
        each = (np.random.default_rng([self.seed, index]) for index in batch)
        if self.labels == "random":
            return [int(generator.integers(num_classes)) for generator in each]
        if len(self.label_counts) != num_classes:
            raise ValueError(f"label_counts must have one for each of {num_classes} classes, got {self.label_counts}")
        shares = np.array(self.label_counts) / sum(self.label_counts)
        return [int(generator.choice(num_classes, p=shares)) for generator in each]


def draw_samples(pipe: TarFlowPipeline, batch: range, settings: SampleSettings) -> Arrays:
    """The samples of a range of indices. A sample depends on its index, not on the batch it is drawn in.

    Args:
        pipe: The pipeline, its progress bar off.
        batch: Indices of the samples.
        settings: How to draw them.

    Returns:
        `images` (batch, height, width, channels) uint8, `class_labels` (batch,) int64 with -1 for none, and `finite`
        (batch,) whether the model gave finite numbers.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> pipe = untrained_place().pipe
        >>> settings = SampleSettings(denoising_strength=0.0)
        >>> four, two = draw_samples(pipe, range(4), settings), draw_samples(pipe, range(2, 4), settings)
        >>> four["images"].shape, bool((four["images"][2:] == two["images"]).all())
        ((4, 8, 8, 1), True)
    """
    settings = settings.resolved(pipe)
    labels = settings.class_labels(batch, pipe.transformer.config.num_classes)
    with warnings.catch_warnings():  # what is not finite is counted by whoever reads `finite`
        warnings.simplefilter("ignore", NonFiniteWarning)
        (found,) = pipe(
            class_labels=None if labels is None else torch.tensor(labels),
            num_images_per_label=1 if labels else len(batch),
            generator=[item_generator(settings.seed, index) for index in batch],
            output_type="latent",
            return_dict=False,
            on_nonfinite="warn",
            **settings.call_options(),
        )
    found = torch.as_tensor(found)  # a tensor for this output type
    finite, found = found.isfinite().flatten(1).all(dim=1), found.nan_to_num()
    levels = to_levels(pipe.decoded(found), pipe.noise_type).movedim(1, -1)
    return {
        "images": levels.cpu().numpy(),
        "class_labels": np.array(labels or [-1] * len(batch), dtype=np.int64),
        "finite": finite.cpu().numpy(),
    }


def sample_errors(pipe: TarFlowPipeline, batch: range, settings: SampleSettings) -> Arrays:
    """How far one pass is from the exact image, of the latents and classes that [`draw_samples`] draws.

    Args:
        pipe: The pipeline, with a trained inverse.
        batch: Indices of the samples.
        settings: How to draw them.

    Returns:
        `error` (batch,), see the pipeline's `reconstruction_error`.

    Example:
        >>> flow = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)).eval()
        >>> config = TarFlowInverseConfig(flow=flow.config, hidden_size=64, num_layers=3, num_training_steps=1)
        >>> pipe = TarFlowPipeline(transformer=flow, inverse=TarFlowInverseModel(config).eval())
        >>> sample_errors(pipe, range(4), SampleSettings())["error"].shape
        (4,)
    """
    settings = settings.resolved(pipe)
    generators = [item_generator(settings.seed, index) for index in batch]
    latents = pipe.prepare_latents(len(batch), generators, temperature=settings.temperature or 1.0)
    labels = settings.class_labels(batch, pipe.transformer.config.num_classes)
    error = pipe.reconstruction_error(latents, labels, guidance_scale=settings.guidance_scale)
    return {"error": error.cpu().numpy()}


def save_png(files: BatchFiles, folder: Path) -> None:
    """Writes each sample as `000000000.png` and so on, numbered by its index.

    Args:
        files: Samples, of [`measure.samples`].
        folder: Folder of the images, made if missing.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.metrics.measure import samples
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> files = samples(untrained_place(), 3, SampleSettings())
        >>> save_png(files, Path("samples"))
        >>> sorted(path.name for path in Path("samples").iterdir())
        ['000000000.png', '000000001.png', '000000002.png']
    """
    folder.mkdir(parents=True, exist_ok=True)
    for batch, arrays in zip(files.batches, files, strict=True):
        for index, image in zip(batch, arrays["images"], strict=True):
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{index:09d}.png")


def save_npz(files: BatchFiles, path: Path) -> None:
    """Writes all samples as one `.npz` in the form of ADM's evaluator: `arr_0` (samples, height, width, 3) uint8.

    Grey images are repeated in the three channels. Labels follow as `arr_1` (samples,) where all samples have one.
    Images go from batch to file, so that memory does not grow with their number.

    Args:
        files: Samples, of [`measure.samples`].
        path: The file.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from tarflow_hf.metrics.measure import samples
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> files = samples(untrained_place(), 3, SampleSettings())
        >>> save_npz(files, Path("samples.npz"))
        >>> with np.load("samples.npz") as file:
        ...     {name: array.shape for name, array in file.items()}
        {'arr_0': (3, 8, 8, 3), 'arr_1': (3,)}
    """
    labels = np.concatenate([arrays["class_labels"] for arrays in files])
    height, width = files.read(files.batches[0])["images"].shape[1:3]
    with (
        replacing(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (files.num_items, height, width, 3)}
            np.lib.format.write_array_header_2_0(member, header)
            for arrays in files:
                images = arrays["images"]
                member.write(np.broadcast_to(images, (*images.shape[:3], 3)).tobytes())
        if (labels >= 0).all():
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels)


def to_channels_first(images: np.ndarray) -> torch.Tensor:
    """(batch, height, width, channels) uint8 images as a (batch, channels, height, width) tensor.

    Example:
        >>> import numpy as np
        >>> to_channels_first(np.zeros((2, 8, 8, 3), dtype=np.uint8)).shape
        torch.Size([2, 3, 8, 8])
    """
    return torch.from_numpy(images).movedim(-1, 1).contiguous()


__all__ = [
    "NonFiniteSamplesError",
    "SampleLabels",
    "SampleSettings",
    "draw_samples",
    "sample_errors",
    "save_npz",
    "save_png",
    "to_channels_first",
]

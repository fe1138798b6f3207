"""Measurements of a pipeline, resumable and shared by all processes: likelihood, class posterior, sample features."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from tarflow_hf.images.labels import renumber
from tarflow_hf.images.latent_data import fingerprint
from tarflow_hf.metrics.features import FeatureExtractor, weights_fingerprint
from tarflow_hf.metrics.images import RealImages, summary_over_processes
from tarflow_hf.metrics.likelihood import class_log_prob_mean, flow_draws, log_prob_draws
from tarflow_hf.metrics.resumable import Arrays, BatchFiles
from tarflow_hf.metrics.samples import (
    NonFiniteSamplesError,
    SampleSettings,
    draw_samples,
    sample_errors,
    to_channels_first,
)
from tarflow_hf.metrics.statistics import FeatureSummary
from tarflow_hf.pipeline_tarflow import TarFlowPipeline

# What decides no number.
_NAMES = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "transformers_version",
}


def start_processes() -> PartialState:
    """The processes that `accelerate launch`, torchrun or a plain start made.

    Raises:
        RuntimeError: If the launcher started several processes that do not know of each other.

    Example:
        >>> start_processes().num_processes
        1
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), **_timeout_of_several())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(f"{launched} processes were started, but they form groups of {state.num_processes}")
    return state


def _timeout_of_several() -> dict[str, timedelta]:
    """A day for a process to wait for the slowest, where the default is minutes."""
    return {"timeout": timedelta(days=1)} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}


@dataclass(frozen=True)
class Workplace:
    """A pipeline to measure, the processes that do it, and where they keep their work.

    Args:
        pipe: The pipeline, on the device of this process.
        state: The processes.
        folder: Folder of the work, shared by the processes; nothing in it is needed once everything is measured.
        batch_size: Images that a process works on at once.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> place = untrained_place()
        >>> files = place.open("likelihood", 40, {"seed": 0})
        >>> files.batches, files.folder.parent
        ([range(0, 20), range(20, 40)], PosixPath('work/likelihood'))
    """

    pipe: TarFlowPipeline
    state: PartialState
    folder: Path
    batch_size: int

    def open(self, kind: str, num_items: int, settings: Mapping[str, Any]) -> BatchFiles:
        """Work of one kind on these weights.

        Args:
            kind: Name of the folder, for instance "likelihood".
            num_items: Images or samples in all.
            settings: What decides the values beside the weights, as JSON.
        """
        transformer, vae = self.pipe.transformer, self.pipe.vae
        config = {name: value for name, value in transformer.config.to_dict().items() if name not in _NAMES}
        about = json.dumps([config, self.pipe.sampling_defaults], sort_keys=True, default=str)
        identity = {"weights": weights_fingerprint(transformer), "dtype": str(transformer.dtype)}
        identity["about"] = hashlib.sha256(about.encode()).hexdigest()
        if vae is not None:
            identity |= {"vae": fingerprint(vae), "image_size": str(self.pipe.image_shape)}
        if settings.get("decoder", "exact") != "exact" and self.pipe.inverse is not None:
            identity |= {"inverse": weights_fingerprint(self.pipe.inverse)}
        return BatchFiles.open(self.folder / kind, num_items, self.batch_size, {**settings, **identity})

    def finish(self) -> None:
        """Lets the processes part once all are here; without it the last to leave aborts."""
        self.state.wait_for_everyone()
        self.state.destroy_process_group()


@dataclass(frozen=True)
class Dequantization:
    """The noise on real images, uniform within a level or that of a flow of latents: draws of each, and the seed.

    Example:
        >>> Dequantization(num_draws=4)
        Dequantization(num_draws=4, seed=0)
        >>> Dequantization(num_draws=0)
        Traceback (most recent call last):
            ...
        ValueError: num_noise_draws must be at least 1, got 0
    """

    num_draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise ValueError(f"num_noise_draws must be at least 1, got {self.num_draws}")


def labels_content(class_labels: torch.Tensor | None) -> str | None:
    """A hash of labels.

    Example:
        >>> labels_content(torch.tensor([1, 2])) == labels_content(torch.tensor([2, 1])), labels_content(None)
        (False, None)
    """
    return None if class_labels is None else hashlib.sha256(class_labels.numpy().tobytes()).hexdigest()


def likelihoods(place: Workplace, images: RealImages, noise: Dequantization, numbering: torch.Tensor | None) -> Arrays:
    """Log-densities of dequantised images, or of their noisy latents where the pipeline has an autoencoder.

    Args:
        place: The pipeline and the processes.
        images: The images.
        noise: The noise on them.
        numbering: The model's class of each class of the data set; None to measure without labels only.

    Returns:
        `log_prob` (images, draws) in nats, without labels; where labels are numbered `log_prob_with_labels` too, and
        `class_labels` (images,) in the model's numbering, -1 for none.

    Raises:
        ValueError: If the model gives a log-density that is not finite.

    Example:
        >>> from tarflow_hf.metrics.small_example import digits_images, untrained_place
        >>> place, images = untrained_place(), digits_images(40)
        >>> found = likelihoods(place, images, Dequantization(num_draws=2), numbering=torch.arange(10))
        >>> {name: values.shape for name, values in found.items()}
        {'log_prob': (40, 2), 'log_prob_with_labels': (40, 2), 'class_labels': (40,)}
    """
    model = place.pipe.transformer
    class_labels = None if numbering is None else renumber(torch.tensor(images.labels()), numbering)
    settings = {"images": images.content(), "labels": labels_content(class_labels), **asdict(noise)}

    def compute(batch: range) -> Arrays:
        draws = flow_draws(place.pipe, images.read(batch).levels, batch, noise.num_draws, noise.seed)
        arrays = {"log_prob": log_prob_draws(model, draws, None)}
        if class_labels is not None:
            arrays["log_prob_with_labels"] = log_prob_draws(model, draws, class_labels[batch.start : batch.stop])
        return arrays

    files = place.open("likelihood", images.num_images, settings)
    files.run(compute, place.state, "likelihood")
    arrays = files.gather()
    for name in ("log_prob", "log_prob_with_labels"):
        if name in arrays:
            _check_finite(arrays[name], images)
    return arrays | ({} if class_labels is None else {"class_labels": class_labels.numpy()})


def class_likelihoods(place: Workplace, images: RealImages, noise: Dequantization) -> np.ndarray:
    """Log-densities of dequantised images, or of their noisy latents, under every class.

    Args:
        place: The pipeline, of a class-conditional model, and the processes; its batch size bounds the pairs of image
            and class in a pass.
        images: The images.
        noise: The noise on them, the same under every class; log-densities are averaged over its draws.

    Returns:
        (images, num_classes) log-densities in nats.

    Example:
        >>> from tarflow_hf.metrics.small_example import digits_images, untrained_place
        >>> place, images = untrained_place(), digits_images(40)
        >>> class_likelihoods(place, images, Dequantization()).shape
        (40, 10)
    """
    settings = {"images": images.content(), **asdict(noise)}

    def compute(batch: range) -> Arrays:
        draws = flow_draws(place.pipe, images.read(batch).levels, batch, noise.num_draws, noise.seed)
        return {"log_prob": class_log_prob_mean(place.pipe.transformer, draws, place.batch_size)}

    files = place.open("classes", images.num_images, settings)
    files.run(compute, place.state, "class likelihoods")
    found = files.gather()["log_prob"]
    _check_finite(found, images)
    return found


def _check_finite(log_prob: np.ndarray, images: RealImages) -> None:
    for row in np.flatnonzero(~np.isfinite(log_prob).all(axis=1)):
        raise ValueError(f"the log-density of image {row} of {images.images.data.name!r} is not finite")


def samples(place: Workplace, num_samples: int, settings: SampleSettings) -> BatchFiles:
    """Samples of the pipeline, each from its own seed; what was drawn before is kept.

    Args:
        place: The pipeline and the processes.
        num_samples: How many.
        settings: How they are drawn.

    Returns:
        Files of the samples, a batch in each, see [`samples.draw_samples`].

    Raises:
        NonFiniteSamplesError: If the model gives numbers that are not finite.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> place = untrained_place()
        >>> from tarflow_hf.metrics.samples import SampleSettings
        >>> files = samples(place, 30, SampleSettings(seed=1, labels="balanced", denoising_strength=0.0))
        >>> files.gather()["class_labels"][:12]
        array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    """
    settings = settings.resolved(place.pipe)
    files = place.open("samples", num_samples, asdict(settings))
    files.run(lambda batch: draw_samples(place.pipe, batch, settings), place.state, "samples")
    wrong = sum(int((~arrays["finite"]).sum()) for arrays in files)
    if wrong:
        raise NonFiniteSamplesError(f"{wrong} of {num_samples} samples are not finite with {settings}")
    return files


def reconstruction_errors(place: Workplace, num_samples: int, settings: SampleSettings) -> np.ndarray:
    """How far one pass is from the exact image of each sample; what was computed before is kept.

    Args:
        place: The pipeline, with a trained inverse, and the processes.
        num_samples: How many.
        settings: How they are drawn.

    Returns:
        (samples,) errors, see the pipeline's `reconstruction_error`.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> from tarflow_hf.metrics.samples import SampleSettings
        >>> place = untrained_place()
        >>> flow = place.pipe.transformer.config
        >>> config = TarFlowInverseConfig(flow=flow, hidden_size=64, num_layers=5, num_training_steps=1)
        >>> place.pipe.register_modules(inverse=TarFlowInverseModel(config).eval())
        >>> reconstruction_errors(place, 30, SampleSettings(decoder="one_pass")).shape
        (30,)
    """
    settings = settings.resolved(place.pipe)
    files = place.open("errors", num_samples, asdict(settings))
    files.run(lambda batch: sample_errors(place.pipe, batch, settings), place.state, "reconstruction errors")
    return files.gather()["error"]


def sample_summary(place: Workplace, files: BatchFiles, extractor: FeatureExtractor) -> FeatureSummary:
    """Statistics of the features of samples.

    Args:
        place: The processes.
        files: The samples.
        extractor: The network, on the device of this process.

    Returns:
        The statistics of all samples.

    Example:
        >>> from tarflow_hf.metrics.small_example import untrained_place
        >>> place = untrained_place()
        >>> from tarflow_hf.metrics.features import FeatureExtractor
        >>> from tarflow_hf.metrics.samples import SampleSettings
        >>> files = samples(place, 30, SampleSettings(denoising_strength=0.0))
        >>> sample_summary(place, files, FeatureExtractor.of_module(torch.nn.Flatten(), "pixels")).num_samples
        30
    """

    def read(batch: range) -> torch.Tensor:
        return to_channels_first(files.read(batch)["images"])

    return summary_over_processes(files.batches, read, extractor, place.state, "sample features")


__all__ = [
    "Dequantization",
    "Workplace",
    "class_likelihoods",
    "labels_content",
    "likelihoods",
    "reconstruction_errors",
    "sample_summary",
    "samples",
    "start_processes",
]

"""The model's input from 8-bit images: mirrored, noisy, some unlabelled, as their place in the run decides."""

import numpy as np
import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.noise import augment, noise_levels
from tarflow_hf.images.arguments import LatentSource
from tarflow_hf.images.batches import ImageBatch
from tarflow_hf.images.latent_data import LatentBatch
from tarflow_hf.training.arguments import OptimizationArguments

MicroBatch = tuple[torch.Tensor | None, ...]
"""What the model's forward takes: pixel_values (n, channels, height, width) with noise on, class_labels (n,) or None;
for a model with noise conditioning the noise_level (n,) of each image; and for one with a condition that, or None in
its place, then condition (n, condition_dim) and condition_mask (n,)."""

AUGMENTATION_STREAM = 1  # tells the random numbers of the augmentation from those of the order of the images


class Augmenter:
    """Turns 8-bit images into the model's input on its device: flipped, noisy, some without their label.

    All random choices are drawn from (seed, step, position in the batch over all processes).

    Args:
        config: The model's configuration, with the kind and level of the noise.
        settings: Size of the batch, seed, label dropping, and how noise levels are drawn.
        horizontal_flip: Whether half of the images are mirrored.
        device: Where the images go.
        latent_source: Whether the latent of an image is the posterior's mean or a draw from it.

    Example:
        >>> from tarflow_hf.images.batches import ImageBatch
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, num_classes=10)
        >>> settings = OptimizationArguments(batch_size=4, max_steps=100)
        >>> augment = Augmenter(config, settings, horizontal_flip=False, device=torch.device("cpu"))
        >>> batch = ImageBatch(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 3]))
        >>> pixel_values, class_labels = augment(batch, step=17, positions=slice(0, 4))
        >>> pixel_values.equal(augment(batch, step=17, positions=slice(0, 4))[0])  # decided by seed, step and position
        True
    """

    def __init__(
        self,
        config: TarFlowConfig,
        settings: OptimizationArguments,
        *,
        horizontal_flip: bool,
        device: torch.device,
        latent_source: LatentSource = "mean",
    ) -> None:
        self.config = config
        self.settings = settings
        self.horizontal_flip = horizontal_flip
        self.latent_source = latent_source
        self.device = device

    def __call__(self, batch: ImageBatch | LatentBatch, step: int, positions: slice) -> MicroBatch:
        """The model's input for some images of a step.

        Args:
            batch: The images, or their latents.
            step: Number of the step.
            positions: Which of the step's images they are.
        """
        settings, size = self.settings, self.settings.batch_size
        random = np.random.default_rng([settings.seed, AUGMENTATION_STREAM, step])
        flipped = torch.from_numpy(random.random(size)[positions] < 0.5)
        dropped = torch.from_numpy(random.random(size)[positions] < settings.label_drop)
        noise_seeds = random.integers(2**32, size=size)[positions].tolist()
        fractions = (random.integers(2**32, size=size)[positions] + 0.5) / 2**32  # never 0 or 1

        pixel_values, spread = batch.select(flipped & self.horizontal_flip, self.device)
        spread = spread if self.latent_source == "posterior" else None
        unlabelled = unconditioned = dropped
        if self.config.condition_dim and self.config.num_classes:  # each alone now and then, so that both are learned
            unlabelled = dropped | torch.from_numpy(random.random(size)[positions] < settings.label_drop)
            unconditioned = dropped | torch.from_numpy(random.random(size)[positions] < settings.label_drop)
        labels = levels = None
        if self.config.num_classes:
            labels = batch.class_labels.masked_fill(unlabelled, -1).to(self.device, non_blocking=True)
        if self.config.noise_conditioning:
            low, high = self.config.noise_range
            levels = noise_levels(torch.from_numpy(fractions), settings.noise_level_sampling, (low, high)).float()
        pixel_values = add_training_noise(pixel_values, self.config, noise_seeds, levels, spread=spread)
        levels = None if levels is None else levels.to(self.device, non_blocking=True)
        if batch.condition is None:
            return (pixel_values, labels) if levels is None else (pixel_values, labels, levels)
        condition = batch.condition.to(self.device, non_blocking=True)
        return pixel_values, labels, levels, condition, (~unconditioned).to(self.device, non_blocking=True)


def add_training_noise(
    pixel_values: torch.Tensor,
    config: TarFlowConfig,
    seeds: list[int],
    noise_level: torch.Tensor | None = None,
    *,
    spread: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds the model's kind of noise, each image's drawn from its own seed and so independent of its batch.

    Args:
        pixel_values: (batch, channels, height, width) images in [-1, 1].
        config: The model's configuration.
        seeds: A seed for each image.
        noise_level: (batch,) standard deviation of the Gaussian noise; None: the model's own.
        spread: (batch, channels, rows, columns) standard deviation of a distribution whose mean `pixel_values` are: a
            draw from it gets the noise. Variances add up, so that one draw serves for both.

    Returns:
        Noisy images of the same shape.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, noise_std=0.1)
        >>> noisy = add_training_noise(torch.zeros(3, 1, 8, 8), config, seeds=[5, 6, 5])
        >>> noisy[0].equal(noisy[2]), noisy[0].equal(noisy[1])
        (True, False)
    """
    generator = torch.Generator(pixel_values.device)
    stds = [float(config.noise_std)] * len(seeds) if noise_level is None else noise_level.tolist()
    noisy = []
    for row, (image, seed, std) in enumerate(zip(pixel_values.split(1), seeds, stds, strict=True)):
        generator.manual_seed(seed)
        if spread is None:
            noisy.append(augment(image, config.noise_type, std, generator=generator))
        else:
            noisy.append(
                image + (spread[row].square() + std**2).sqrt() * torch.empty_like(image).normal_(generator=generator)
            )
    return torch.cat(noisy)


__all__ = ["Augmenter", "MicroBatch", "add_training_noise"]

"""What a sampling call makes of its arguments before the first block: labels, conditions and latents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from tarflow_hf.flow.inputs import (
    ClassLabel,
    check_generator,
    check_latents,
    class_ids,
    condition_vectors,
    is_whole,
)
from tarflow_hf.flow.sampling.settings import check_temperature

Condition = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | torch.Tensor
Generators = torch.Generator | list[torch.Generator]


class Preparing:
    """The part of a pipeline that prepares labels, conditions and latents.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, num_classes=10)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> pipe.prepare_class_labels([7, None], num_images_per_label=2)
        tensor([ 7,  7, -1, -1])
        >>> pipe.prepare_latents(3, temperature=0.5).shape
        torch.Size([3, 16, 4])
    """

    transformer: Any  # a TarFlowModel
    _execution_device: Any

    def prepare_class_labels(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] | torch.Tensor | None,
        num_images_per_label: int = 1,
        num_images: int | None = None,
    ) -> torch.Tensor | None:
        """Class ids or names as (images,) int64 ids on the pipeline's device, or None.

        Args:
            class_labels: See [`__call__`].
            num_images_per_label: Images for each label, at least 1.
            num_images: How many images are there already, if any are: for none, the list of labels may be empty.

        Raises:
            ValueError: If the model is unconditional, the list is empty, or a class is unknown.
        """
        if not (is_whole(num_images_per_label) and num_images_per_label >= 1):
            raise ValueError(f"num_images_per_label must be at least 1, got {num_images_per_label!r}")
        if class_labels is None:
            return None
        ids = class_ids(class_labels, self.transformer.config, num_images)
        labels = torch.tensor(ids, dtype=torch.long, device=self._execution_device)
        return labels.repeat_interleave(num_images_per_label)

    def prepare_condition(
        self, condition: Condition | None, num_images_per_label: int = 1, num_labels: int | None = None
    ) -> torch.Tensor | None:
        """Conditions as (images, condition_dim) float32 numbers on the pipeline's device, or None.

        Raises:
            ValueError: If the model has no condition, or these have another length, a NaN, or another number than the
                labels.
        """
        if condition is None:
            return None
        vectors = condition_vectors(condition, self.transformer.config, num_labels)
        return vectors.repeat_interleave(num_images_per_label, 0).to(self._execution_device)

    def prepare_latents(
        self,
        batch: int,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """(batch, tokens, patch_dim) latents on the pipeline's device: those given, or z ~ N(0, t^2) in float32.

        Args:
            batch: How many.
            generator: Source of the latents, or one per image.
            latents: Those given, as they are.
            temperature: t, the standard deviation of what is drawn.

        Raises:
            ValueError: If the latents given have another shape or are not finite, if there is not one generator
                per image, or if the temperature is not above 0.
        """
        config = self.transformer.config
        check_generator(generator, batch)
        check_temperature(temperature)
        if latents is None:
            shape = (batch, config.num_tokens, config.patch_dim)
            drawn = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
            return temperature * drawn
        check_latents(latents, config, batch)
        return latents.to(self._execution_device)


__all__ = ["Condition", "Generators", "Preparing"]

"""What a training loop of somebody's own may get wrong without an error, said once: labels and pixel values."""

import torch
from transformers.utils import logging

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.inputs import is_traced

logger = logging.get_logger(__name__)
_FAR = 20.0  # no 8-bit image, nor its noise, comes near it; levels of 0 ... 255 are beyond


def hint_at_training(pixel_values: torch.Tensor, class_labels: torch.Tensor | None, config: TarFlowConfig) -> None:
    """Warns once where a model is trained without the labels it knows, or on images that are far outside of [-1, 1].

    Args:
        pixel_values: (batch, channels, height, width) images; looked at on the CPU alone.
        class_labels: (batch,) classes, or None.
        config: The model's configuration.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, num_classes=2)
        >>> hint_at_training(torch.zeros(1, 1, 8, 8), None, config)  # warns
    """
    if is_traced(pixel_values):
        return
    if class_labels is None and config.num_classes > 0:
        logger.warning_once(
            f"class_labels are missing: a model of {config.num_classes} classes trains without labels. The Trainer "
            "of transformers leaves out columns that are no numbers; -1 says that an image has no label"
        )
    if pixel_values.device.type == "cpu" and config.value_scale is None and pixel_values.numel():
        largest = pixel_values.detach().abs().max().item()
        if not largest <= _FAR:
            logger.warning_once(
                f"pixel_values must be in [-1, 1] (noise may leave them a little), got {largest:g}: "
                "`to_pixel_values` makes them from 0 ... 255"
            )


__all__ = ["hint_at_training"]

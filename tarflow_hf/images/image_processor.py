"""transformers' image processor for a TarFlow model: what training did to an image, saved beside the weights."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Self, cast

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils.generic import TensorType

from tarflow_hf.configuration_tarflow import TarFlowConfig, did_you_mean
from tarflow_hf.images.arguments import ResizeMethod
from tarflow_hf.images.processing import ImageFormat, preprocess_image, to_pixel_values

_OF_TRANSFORMERS = frozenset(
    {"_processor_class", "auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
)

ImageSource = Image.Image | np.ndarray | torch.Tensor | bytes | str | PathLike[str]


class TarFlowImageProcessorKwargs(ImagesKwargs, total=False):
    """What a call may set anew, by the names of [`TarFlowImageProcessor`]'s arguments."""

    image_size: int | list[int]
    num_channels: int
    resize: ResizeMethod


class TarFlowImageProcessor(BaseImageProcessor):
    """Turns images of any size and mode into the `pixel_values` that a [`TarFlowModel`] was trained with.

    x = k / 127.5 - 1, with k the 8-bit levels of the image made upright, laid over white where it is transparent,
    turned into grey or RGB, resized and cropped: [`preprocess_image`], as training does it.

    Args:
        image_size: Side of a square image in pixels, or (height, width).
        num_channels: 1 for grey or 3 for RGB.
        resize: How images are resized, see [`resize_and_crop`].
        **kwargs: What transformers writes into a processor's file.

    Example:
        >>> from PIL import Image
        >>> processor = TarFlowImageProcessor(image_size=8, num_channels=1)
        >>> processor(Image.new("RGB", (30, 20), "white"), return_tensors="pt").pixel_values.shape
        torch.Size([1, 1, 8, 8])
        >>> files = processor.save_pretrained("digits")
        >>> TarFlowImageProcessor.from_pretrained("digits").image_size
        8
    """

    valid_kwargs = TarFlowImageProcessorKwargs
    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        num_channels: int = 3,
        resize: ResizeMethod = "short_side",
        **kwargs: object,
    ) -> None:
        known = ("image_size", "num_channels", "resize")
        for name in kwargs.keys() - _OF_TRANSFORMERS:
            raise ValueError(f"TarFlowImageProcessor has no argument {name!r}{did_you_mean(name, known)}")
        super().__init__(**kwargs)  # type: ignore[arg-type]  # typed as the options of resizing, which are not used
        ImageFormat(image_size, num_channels, resize)  # checks them
        self.image_size = image_size
        self.num_channels = num_channels
        self.resize = resize

    @classmethod
    def of(cls, config: TarFlowConfig) -> Self:
        """The processor of a model with this configuration.

        Args:
            config: Sizes of the model, and how the images of its training were resized.

        Raises:
            ValueError: If the model's images are neither grey nor RGB.

        Example:
            >>> TarFlowImageProcessor.of(TarFlowConfig(image_size=32, resize="adm")).resize
            'adm'
        """
        return cls(config.image_size, config.num_channels, config.resize)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Self:  # noqa: ANN401  # as its base has it
        """The processor that a `preprocessor_config.json` describes; nothing in it is guessed or passed over.

        Args:
            image_processor_dict: The content of the file.
            **kwargs: Values in place of those, and what `BaseImageProcessor.from_dict` takes.

        Raises:
            OSError: If it lacks a size, or has an unknown setting.
        """
        if lacking := [
            name for name in ("image_size", "num_channels") if name not in {**image_processor_dict, **kwargs}
        ]:
            raise OSError(f"preprocessor_config.json is incomplete: it lacks {', '.join(lacking)}")
        known = ("image_size", "num_channels", "resize")
        for name in image_processor_dict.keys() - set(known) - _OF_TRANSFORMERS:
            raise OSError(f"preprocessor_config.json is damaged: unknown setting {name!r}{did_you_mean(name, known)}")
        return super().from_dict(image_processor_dict, **kwargs)

    def preprocess(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        return_tensors: str | TensorType | None = None,
        image_size: int | Sequence[int] | None = None,
        num_channels: int | None = None,
        resize: ResizeMethod | None = None,
    ) -> BatchFeature:
        """Images as `pixel_values`; calling the processor does the same.

        Args:
            images: One image or several: Pillow's, the path or the bytes of a file, or 8-bit levels as an array
                (height, width), (height, width, channels) or a tensor (channels, height, width).
            return_tensors: `"pt"` or `"np"`; None: a list of tensors.
            image_size: In place of the processor's own, as are the two after it.
            num_channels: 1 or 3.
            resize: The method.

        Returns:
            `BatchFeature` with `pixel_values`, (images, channels, height, width) float32 in [-1, 1].

        Raises:
            OSError: If a file cannot be read.
            ValueError: If an image cannot be converted.
        """
        image_format = ImageFormat(
            self.image_size if image_size is None else image_size,
            self.num_channels if num_channels is None else num_channels,
            self.resize if resize is None else resize,
        )
        pixel_values = [
            to_pixel_values(preprocess_image(_as_source(image), image_format)) for image in _as_list(images)
        ]
        if return_tensors is None:
            return BatchFeature({"pixel_values": pixel_values})
        return BatchFeature({"pixel_values": torch.stack(pixel_values)}, tensor_type=return_tensors)


def _as_list(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """One image or several as a list; a fourth axis of an array or tensor counts images."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Image.Image | bytes | str | PathLike):
        return [images]
    if not isinstance(images, Sequence):
        raise ValueError(f"images must be an image, a file, an array or a list of such, got {type(images).__name__}")
    images = list(cast(Sequence[ImageSource], images))
    if not images:
        raise ValueError("images must be at least one image, got an empty list")
    return images


def _as_source(image: ImageSource) -> Image.Image | bytes | str | PathLike[str]:
    """What `preprocess_image` takes: arrays and tensors of 8-bit levels become Pillow's images."""
    if isinstance(image, torch.Tensor):
        levels = image.cpu()
        image = (levels.movedim(0, -1) if levels.ndim == 3 else levels).numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(
                "images given as arrays or tensors must be uint8 levels 0 ... 255 of 2 or 3 axes, got "
                f"{image.dtype} of shape {image.shape}"
            )
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    return image


__all__ = ["ImageSource", "TarFlowImageProcessor"]

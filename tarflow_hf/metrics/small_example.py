"""What the examples in the docstrings of this room measure: the embedded digits, and an untrained pipeline of them."""

from pathlib import Path

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import ImageData, load_image_data
from tarflow_hf.metrics.images import RealImages
from tarflow_hf.metrics.measure import Workplace, start_processes
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline


def digits_data() -> ImageData:
    """The held-out digits of a clone of the repository, from its root.

    Example:
        >>> digits_data().class_names[:3]
        ('0', '1', '2')
    """
    return load_image_data(DataArguments(data="./examples/data/digits", train_split="test"), class_conditional=True)[0]


def digits_images(num_images: int) -> RealImages:
    """The first of the held-out digits, 8x8 and grey.

    Args:
        num_images: How many.

    Example:
        >>> digits_images(40).read(range(20)).levels.shape
        torch.Size([20, 1, 8, 8])
    """
    return RealImages.of(digits_data(), ImageFormat(image_size=8, num_channels=1), num_images=num_images)


def untrained_place() -> Workplace:
    """A workplace with an untrained class-conditional pipeline of 8x8 digits, in the folder `work`.

    Example:
        >>> untrained_place().pipe.transformer.config.num_classes
        10
    """
    config = TarFlowConfig(
        image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1, num_classes=10
    )
    pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
    pipe.set_progress_bar_config(disable=True)
    return Workplace(pipe, start_processes(), Path("work"), batch_size=20)


__all__ = ["digits_data", "digits_images", "untrained_place"]

"""Where images come from and how they are read: the options that recipes and commands have in common. No torch."""

from dataclasses import dataclass, field
from typing import Literal, TypeVar

ResizeMethod = Literal["short_side", "adm"]
T = TypeVar("T")


def option(default: T, text: str, *, may_change: bool = False) -> T:
    """A field of a frozen group of options, with its help.

    Args:
        default: Value where nothing is given.
        text: One line of help.
        may_change: Whether a resumed run may set it anew without changing its results.

    Example:
        >>> option(64, "side of the images, pixels").metadata["help"]
        'side of the images, pixels'
    """
    return field(default=default, metadata={"help": text, "may_change": may_change})


def require(condition: bool, message: str) -> None:
    """Raises ValueError with a message unless a condition holds.

    Example:
        >>> require(2 > 3, "two must be above three")
        Traceback (most recent call last):
            ...
        ValueError: two must be above three
    """
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DataArguments:
    """Where the images come from and how they are read.

    Example:
        >>> DataArguments(data="huggan/AFHQ").train_split
        'train'
        >>> DataArguments(data="huggan/AFHQ", streaming=True, cache_images=True)
        Traceback (most recent call last):
            ...
        ValueError: streaming=true and cache_images=true contradict each other: a streamed data set is not kept
    """

    data: str = option("", "Hub data set, image folder, or parquet file, pattern or folder; ./ is the recipe's folder")
    data_config: str | None = option(None, "configuration of the Hub data set, for instance a resolution")
    eval_data: str | None = option(None, "held-out images, where they are not a split of data")
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(None, "split to evaluate on; none: no held-out evaluation")
    image_column: str | None = option(None, "column of the images; none: the only image column")
    label_column: str | None = option(None, "column of the labels; none: the only column of class labels")
    resize: ResizeMethod = option("short_side", "short_side (bilinear, the authors') or adm (box, then bicubic)")
    horizontal_flip: bool = option(True, "mirror half of the training images at random")
    streaming: bool = option(False, "read the data set while training instead of storing it first")
    shuffle_buffer: int = option(10_000, "images that a streamed data set is shuffled over")
    skip_bad_images: bool = option(False, "let the next readable image stand in for an unreadable one")
    cache_images: bool = option(False, "keep all prepared images in memory, one byte a sub-pixel", may_change=True)
    num_workers: int = option(4, "processes that read images, for each training process", may_change=True)

    def __post_init__(self) -> None:
        require(bool(self.data), "data must name a data set: a Hub name, an image folder or parquet files")
        require(self.shuffle_buffer >= 1, f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        require(self.num_workers >= 0, f"num_workers must be at least 0, got {self.num_workers}")
        require(
            not (self.streaming and self.cache_images),
            "streaming=true and cache_images=true contradict each other: a streamed data set is not kept",
        )


__all__ = ["DataArguments", "ResizeMethod", "option", "require"]

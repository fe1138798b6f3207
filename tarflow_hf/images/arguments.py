"""Where images come from and how they are read: the options that recipes and commands have in common. No torch."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

ResizeMethod = Literal["short_side", "adm"]
ArrayLayout = Literal["chw", "hwc", "hw"]
LatentSource = Literal["mean", "posterior"]
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


def without_credentials(text: str) -> str:
    """A text whose web addresses have lost user, password and query (which may be a signature or a token).

    Example:
        >>> without_credentials("cannot read https://me:secret@host.org/a.parquet?token=1 today")
        'cannot read https://host.org/a.parquet today'
    """
    text = re.sub(r"(?<=://)[^/\s'\"@]*(?:@[^/\s'\"@]*)*@", "", text)
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)


@contextmanager
def credentials_hidden(*places: str | None) -> Iterator[None]:
    """Around what reads from web addresses: an error does not repeat their user, password and query.

    Args:
        places: The addresses; None and other places are passed over.

    Example:
        >>> with credentials_hidden("https://me:secret@host.org/a.parquet"):
        ...     raise FileNotFoundError("nothing at /tmp/https:/me:secret@host.org/a.parquet")
        Traceback (most recent call last):
            ...
        FileNotFoundError: nothing at /tmp/https:/host.org/a.parquet
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        for place in filter(None, places):
            address = re.search(r"://([^/\s]*@)?[^?\s]*(\?\S+)?", place)
            for secret in filter(None, address.groups() if address else ()):
                text = text.replace(secret, "")
        if text == str(error):
            raise
        raise (type(error) if type(error) in (FileNotFoundError, ValueError) else OSError)(text) from None


def public_place(place: str, seen_from: Path | None = None) -> str:
    """Where data or a run are, as it may be given away: without credentials, and without a path of this machine.

    Args:
        place: A name on the Hub, a web address, or a path.
        seen_from: The folder that a path is made relative to, where they have more in common than the root of the
            file system; else its last name is left. Without it a relative path stays as it is.

    Example:
        >>> public_place("huggan/AFHQ"), public_place("https://me:secret@host.org/a.parquet")
        ('huggan/AFHQ', 'https://host.org/a.parquet')
        >>> from pathlib import Path
        >>> public_place("/home/me/pictures/cats"), public_place("/runs/data/cats", Path("/runs/mine"))
        ('cats', './../data/cats')
    """
    if "://" in place:
        return without_credentials(place)
    if seen_from is not None and Path(place).exists():
        place = str(Path(place).absolute())
    if not os.path.isabs(place):
        return place
    if seen_from is not None and len(Path(os.path.commonpath([place, seen_from.resolve()])).parts) > 1:
        return f"./{Path(os.path.relpath(place, seen_from.resolve())).as_posix()}"
    return Path(place).name


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
    condition_columns: tuple[str, ...] = option((), "columns of numbers, or of lists of numbers, to condition on")
    class_names: tuple[str, ...] = option((), "names of the classes, for text labels of a streamed data set")
    resize: ResizeMethod = option("short_side", "short_side (bilinear, the authors') or adm (box, then bicubic)")
    array_layout: ArrayLayout | None = option(None, "axes of each array (numbers, not 8-bit images); none: images")
    value_mean: tuple[float, ...] = option((), "arrays: what to subtract from each channel; none: its mean")
    value_scale: tuple[float, ...] = option((), "arrays: what to divide each channel by; none: its deviation")
    horizontal_flip: bool = option(True, "mirror half of the training images at random")
    streaming: bool = option(False, "read the data set while training instead of storing it first")
    shuffle_buffer: int = option(10_000, "images that a streamed data set is shuffled over")
    skip_bad_images: bool = option(False, "let the next readable image stand in for an unreadable one")
    cache_images: bool = option(False, "keep all prepared images in memory, one byte a sub-pixel", may_change=True)
    vae: str | None = option(None, "train on the latents of this autoencoder: folder or Hub name; ./ as in data")
    latents_dir: str | None = option(None, "folder of the encoded data; none: latents/ in output_dir", may_change=True)
    latent_source: LatentSource = option("mean", "latent of an image: mean, or a draw from the posterior")
    num_workers: int = option(4, "processes that read images, for each training process", may_change=True)

    def __post_init__(self) -> None:
        require(bool(self.data), "data must name a data set: a Hub name, an image folder or parquet files")
        require(self.shuffle_buffer >= 1, f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        require(
            0 <= self.num_workers <= 1024, f"num_workers must be at least 0 and at most 1024, got {self.num_workers}"
        )
        require(
            len(set(self.class_names)) == len(self.class_names),
            f"class_names must differ, got {self.class_names[:10]}",
        )
        require(
            not (self.streaming and self.cache_images),
            "streaming=true and cache_images=true contradict each other: a streamed data set is not kept",
        )
        require(
            self.vae is None or not self.streaming,
            "vae and streaming=true contradict each other: the latents of a data set are stored",
        )
        require(
            (self.array_layout is not None or not self.value_mean) and bool(self.value_mean) == bool(self.value_scale),
            "value_mean and value_scale go together, with array_layout",
        )
        require(
            all(0 < scale < float("inf") for scale in self.value_scale),
            f"value_scale must be finite and above 0, got {self.value_scale}",
        )
        require(
            self.array_layout is None or not self.horizontal_flip,
            "array_layout needs horizontal_flip=false: nothing says that mirrored arrays are data too",
        )
        require(
            self.array_layout is None or self.vae is None,
            "array_layout and vae contradict each other: an autoencoder encodes images",
        )
        require(
            self.vae is not None or (self.latents_dir is None and self.latent_source == "mean"),
            "latents_dir and latent_source need vae, the autoencoder",
        )


__all__ = [
    "ArrayLayout",
    "DataArguments",
    "LatentSource",
    "ResizeMethod",
    "credentials_hidden",
    "option",
    "public_place",
    "require",
    "without_credentials",
]

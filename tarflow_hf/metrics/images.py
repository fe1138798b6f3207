"""Real images that a model is measured on: read in order, their labels in the model's numbering, their statistics."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import PIL
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.noise import augment
from tarflow_hf.images import processing, reading
from tarflow_hf.images.arguments import ArrayLayout, DataArguments
from tarflow_hf.images.arrays import format_of
from tarflow_hf.images.batches import ImageBatch, StoredImages, UnreadableImageError, collate
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import NO_LABEL, ImageData, load_image_data
from tarflow_hf.metrics.features import FeatureExtractor
from tarflow_hf.metrics.resumable import bar_disabled
from tarflow_hf.metrics.statistics import DEFAULT_CAPACITY, FeatureStatistics, FeatureSummary


@dataclass(frozen=True)
class RealImages:
    """The first `num_images` images of a data set without the rows `bad_rows`, read by `num_workers` threads.

    Example:
        >>> from tarflow_hf.metrics.small_example import digits_images
        >>> images = digits_images(100)
        >>> images.read(range(20)).levels.shape, images.labels()[:3]
        (torch.Size([20, 1, 8, 8]), [1, 4, 8])
    """

    images: StoredImages
    num_images: int
    num_workers: int = 4
    bad_rows: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        data: ImageData,
        image_format: ImageFormat,
        *,
        num_images: int | None = None,
        num_workers: int = 4,
        skip_bad_images: bool = False,
    ) -> "RealImages":
        """The images of a stored data set, all of them where `num_images` is None.

        Args:
            data: The data set, stored.
            image_format: What every image is turned into.
            num_images: Images used, from the first.
            num_workers: Threads that read, at least 0; one reads then.
            skip_bad_images: Whether unreadable images are looked for now and left out; else one is an error when it
                is read. `bad_rows` are those left out.

        Raises:
            ValueError: If there are fewer than `num_images`, or none; or fewer than no threads.
        """
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        images = StoredImages(data, image_format)
        bad_rows: tuple[int, ...] = ()
        if skip_bad_images:
            bad_rows = _unreadable(images, num_workers)
            kept = sorted(set(range(len(images))) - set(bad_rows))
            images = StoredImages(replace(data, rows=data.rows.select(kept)), image_format)
        if len(images) == 0:
            raise ValueError(f"data set {data.name!r} has no image that can be read")
        if num_images is not None and not 1 <= num_images <= len(images):
            raise ValueError(f"num_images must be 1 ... {len(images)} for data set {data.name!r}, got {num_images}")
        return cls(images, num_images or len(images), num_workers, bad_rows)

    def read(self, batch: range) -> ImageBatch:
        """The images and labels of a range of rows."""
        with ThreadPoolExecutor(max(self.num_workers, 1)) as readers:
            return collate(list(readers.map(self.images.__getitem__, batch)))

    def content(self) -> str:
        """A hash of what is read: the bytes of the image files in their order, and how they are prepared."""
        data = self.images.data
        digest = hashlib.sha256(repr(self.images.image_format).encode())
        if data.arrays is not None:
            digest.update(repr(data.arrays).encode())
        for row in data.rows.select(range(self.num_images)).select_columns([data.image_column]):
            digest.update(hashlib.sha256(data.content_of(row)).digest())
        return digest.hexdigest()

    def labels(self) -> list[int]:
        """The label of each image in the data set's numbering, -1 for none."""
        data = self.images.data
        if data.label_column is None:
            return [NO_LABEL] * self.num_images
        return [data.label_id(label) for label in data.rows.select(range(self.num_images))[data.label_column]]

    def names(self) -> list[str]:
        """The file name of each image, or its row where it has none."""
        data = self.images.data
        rows = data.rows.select(range(self.num_images))
        numbers = (number for number in range(len(data.rows) + len(self.bad_rows)) if number not in self.bad_rows)
        images = (row[data.image_column] for row in rows)
        paths = (image["path"] if isinstance(image, dict) else None for image in images)
        return [path or f"row {number}" for number, path in zip(numbers, paths, strict=False)]


def _unreadable(images: StoredImages, num_workers: int) -> tuple[int, ...]:
    def fails(row: int) -> bool:
        try:
            images[row]
        except UnreadableImageError:
            return True
        return False

    with ThreadPoolExecutor(max(num_workers, 1)) as readers:
        return tuple(row for row, bad in enumerate(readers.map(fails, range(len(images)))) if bad)


def _code_of_reading() -> str:
    """A hash of the code that turns image files into levels."""
    return hashlib.sha256(
        b"".join(Path(str(part.__file__)).read_bytes() for part in (processing, reading))
    ).hexdigest()


def check_layout(config: TarFlowConfig, array_layout: ArrayLayout | None) -> None:
    """Raises ValueError unless the axes of arrays are named for a model of arrays, and for no other.

    Example:
        >>> check_layout(TarFlowConfig(), "chw")
        Traceback (most recent call last):
            ...
        ValueError: this is a model of images: leave array_layout out
    """
    if (config.value_scale is None) != (array_layout is None):
        kind = "images: leave array_layout out" if array_layout else "arrays: it needs array_layout"
        raise ValueError(f"this is a model of {kind}")


def noisy_images(
    config: TarFlowConfig,
    data: str,
    split: str,
    *,
    num_images: int,
    seed: int,
    array_layout: ArrayLayout | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Images with the noise that a model was trained with, their labels, and their conditions by the model's names.

    Args:
        config: The model's configuration.
        data: The data set.
        split: Its split.
        num_images: Images, drawn evenly from all classes, always the same.
        seed: Seed of the noise.
        array_layout: Axes of the arrays, of a model of arrays.

    Returns:
        (images, channels, height, width); (images,) labels, None without classes; (images, condition_dim) conditions,
        None without them.

    Raises:
        ValueError: If the data do not fit the model.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_classes=10)
        >>> images, labels, _ = noisy_images(config, "./examples/data/digits", "test", num_images=20, seed=0)
        >>> images.shape, labels.shape
        (torch.Size([20, 1, 8, 8]), torch.Size([20]))
    """
    check_layout(config, array_layout)
    where = DataArguments(
        data=data,
        train_split=split,
        eval_split=split,
        condition_columns=tuple(config.condition_names or ()),
        array_layout=array_layout,
        value_mean=tuple(config.value_mean or ()),
        value_scale=tuple(config.value_scale or ()),
        horizontal_flip=False,
        resize=config.resize,
    )
    _, found = load_image_data(where, class_conditional=config.num_classes > 0, eval_images=num_images)
    assert found is not None  # eval_split is named
    image_format = format_of(config.image_size, config.num_channels, where)
    batch = RealImages.of(found, image_format, num_images=num_images).read(range(num_images))
    images, _ = batch.select(torch.zeros(num_images, dtype=torch.bool), torch.device("cpu"))
    level = config.noise_range[0] if config.noise_conditioning else config.noise_std  # the lowest that the model knows
    noisy = augment(images, config.noise_type, level, generator=torch.Generator().manual_seed(seed))
    return noisy, batch.class_labels if config.num_classes else None, batch.condition


def feature_statistics(
    batches: Iterable[tuple[int, torch.Tensor]], extractor: FeatureExtractor, capacity: int = DEFAULT_CAPACITY
) -> FeatureStatistics | None:
    """Statistics of the features of images, batch by batch; None without any batch.

    Args:
        batches: Index of the first image, and (batch, channels, height, width) uint8 levels on the extractor's device.
        extractor: The network.
        capacity: Features kept, see [`FeatureStatistics.of`].

    Returns:
        The merged statistics.

    Example:
        >>> from tarflow_hf.metrics.features import FeatureExtractor
        >>> extractor = FeatureExtractor.of_module(torch.nn.Flatten(), "pixels")
        >>> batches = [(0, torch.zeros(3, 1, 2, 2, dtype=torch.uint8)), (3, torch.ones(3, 1, 2, 2, dtype=torch.uint8))]
        >>> feature_statistics(batches, extractor).moments.mean
        array([0.5, 0.5, 0.5, 0.5])
    """
    parts = (FeatureStatistics.of(extractor(levels), first, capacity) for first, levels in batches)
    first = next(parts, None)
    return None if first is None else reduce(FeatureStatistics.merge, parts, first)


def summary_over_processes(
    batches: list[range],
    read: Callable[[range], torch.Tensor],
    extractor: FeatureExtractor,
    state: PartialState,
    description: str,
    capacity: int = DEFAULT_CAPACITY,
) -> FeatureSummary:
    """Statistics of the features of all images, each process having seen its share. All processes call it.

    Args:
        batches: The images of each batch, by index.
        read: Gives the (batch, channels, height, width) uint8 levels of a batch.
        extractor: The network, on the device of this process.
        state: The processes.
        description: What the progress bar says.
        capacity: Features kept, see [`FeatureStatistics.of`].

    Returns:
        The statistics of all processes together, the same on each.

    Example:
        >>> from accelerate import PartialState
        >>> from tarflow_hf.metrics.features import FeatureExtractor
        >>> extractor = FeatureExtractor.of_module(torch.nn.Flatten(), "pixels")
        >>> levels = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2)
        >>> batches = [range(0, 4), range(4, 6)]
        >>> state = PartialState(cpu=True)
        >>> summary = summary_over_processes(batches, lambda batch: levels[list(batch)], extractor, state, "features")
        >>> summary.num_samples, summary.mean
        (6, array([10., 11., 12., 13.]))
    """
    mine = batches[state.process_index :: state.num_processes]

    def levels() -> Iterator[tuple[int, torch.Tensor]]:
        total = sum(map(len, mine))
        with tqdm(total=total, desc=description, unit="image", disable=bar_disabled(state)) as progress:
            for batch in mine:
                yield batch.start, read(batch).to(state.device)
                progress.update(len(batch))

    statistics = feature_statistics(levels(), extractor, capacity)
    shards = gather_object([b"" if statistics is None else statistics.to_bytes()])
    merged = reduce(FeatureStatistics.merge, [FeatureStatistics.from_bytes(shard) for shard in shards if shard])
    return merged.summary(extractor.frechet_name)


def reference_summary(
    images: RealImages, extractor: FeatureExtractor, state: PartialState, *, batch_size: int, cache_dir: Path
) -> FeatureSummary:
    """Statistics of real images, computed once and kept in `cache_dir` under a hash of all that decides them.

    That is the image files, how they are prepared, the network with its source (see [`FeatureExtractor.fingerprint`]),
    and the versions of torch and Pillow.

    Args:
        images: The images.
        extractor: The network, on the device of this process.
        state: The processes.
        batch_size: Images of a batch.
        cache_dir: Where statistics are kept; shared by the processes.

    Returns:
        The statistics.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import PartialState
        >>> from tarflow_hf.metrics.features import FeatureExtractor
        >>> from tarflow_hf.metrics.small_example import digits_images
        >>> images = digits_images(100)
        >>> extractor = FeatureExtractor.of_module(torch.nn.Flatten(), "pixels")
        >>> state = PartialState(cpu=True)
        >>> summary = reference_summary(images, extractor, state, batch_size=50, cache_dir=Path("statistics"))
        >>> summary.extractor, summary.num_samples, len(list(Path("statistics").iterdir()))
        ('FD-pixels', 100, 1)
    """
    versions = f"pillow {PIL.__version__} {_code_of_reading()}"
    key = hashlib.sha256(f"{images.content()} {extractor.fingerprint()} {versions}".encode()).hexdigest()[:32]
    path = cache_dir / f"{key}.npz"
    found = path.exists()
    state.wait_for_everyone()  # all have looked before one of them writes
    if found:
        return FeatureSummary.load(path)
    batches = [
        range(start, min(start + batch_size, images.num_images)) for start in range(0, images.num_images, batch_size)
    ]
    summary = summary_over_processes(
        batches, lambda batch: images.read(batch).levels, extractor, state, "reference features"
    )
    if state.is_main_process:
        cache_dir.mkdir(parents=True, exist_ok=True)
        summary.save(path)
    return summary


__all__ = [
    "RealImages",
    "check_layout",
    "feature_statistics",
    "noisy_images",
    "reference_summary",
    "summary_over_processes",
]

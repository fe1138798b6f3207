"""Images in batches: read and resized in worker processes, in an order that can be taken up again at any step.

`order` says which images make a batch. A streamed data set gives some of that up, see [`StreamedImages`].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.extras import installed_by
from tarflow_hf.images.order import ORDER_STREAM, BatchLayout, StepSampler
from tarflow_hf.images.processing import ImageFormat, preprocess_image, to_pixel_values
from tarflow_hf.images.sources import NO_LABEL, ImageData

with installed_by("train", "eval"):
    import fsspec
    from datasets.distributed import split_dataset_by_node


class UnreadableImageError(ValueError):
    """An image of the data set is missing, damaged, or of a mode that cannot be converted."""


@dataclass(frozen=True)
class Sample:
    """One prepared image.

    Args:
        levels: (channels, height, width) uint8 levels; of arrays float32 values in the model's units.
        label: Class id, -1 where there is none.
        condition: Numbers that it is conditioned on.
        bad_rows: Unreadable rows that this image stands in for.

    Example:
        >>> sample = Sample(torch.zeros(1, 8, 8, dtype=torch.uint8), label=7)
        >>> sample.label, sample.bad_rows
        (7, ())
    """

    levels: torch.Tensor
    label: int
    bad_rows: tuple[int, ...] = ()
    condition: tuple[float, ...] = ()


@dataclass(frozen=True)
class ImageBatch:
    """Prepared images on their way to the device.

    Args:
        levels: (batch, channels, height, width) uint8 levels 0 ... 255, or float32 values of arrays.
        class_labels: (batch,) int64 class ids, -1 where there is none.
        bad_rows: Unreadable rows that images of this batch stand in for.
        condition: (batch, condition_dim) float32 numbers; None where there are none.

    Example:
        >>> batch = ImageBatch(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([7, -1]), bad_rows=(3,))
        >>> batch.class_labels
        tensor([ 7, -1])
    """

    levels: torch.Tensor
    class_labels: torch.Tensor
    bad_rows: tuple[int, ...] = ()
    condition: torch.Tensor | None = None

    def select(self, mirrored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, None]:
        """The images on a device as the model takes them, mirrored where (batch,) `mirrored` says; no spread.

        What [`LatentBatch.select`] gives for latents.
        """
        levels = self.levels.to(device, non_blocking=True)
        pixel_values = levels if levels.is_floating_point() else to_pixel_values(levels)
        if mirrored.any():
            chosen = mirrored.to(device, non_blocking=True)[:, None, None, None]
            pixel_values = torch.where(chosen, pixel_values.flip(3), pixel_values)
        return pixel_values, None

    def pin_memory(self) -> "ImageBatch":
        """Called by the data loader so that copies to a GPU need not wait."""
        condition = None if self.condition is None else self.condition.pin_memory()
        return replace(
            self, levels=self.levels.pin_memory(), class_labels=self.class_labels.pin_memory(), condition=condition
        )


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stacks samples into a batch.

    Example:
        >>> levels = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> batch = collate([Sample(levels, 7), Sample(levels, -1, bad_rows=(3,))])
        >>> batch.levels.shape, batch.class_labels, batch.bad_rows
        (torch.Size([2, 1, 8, 8]), tensor([ 7, -1]), (3,))
    """
    bad_rows = tuple(row for sample in samples for row in sample.bad_rows)
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    condition = torch.tensor([sample.condition for sample in samples]) if samples[0].condition else None
    return ImageBatch(torch.stack([sample.levels for sample in samples]), labels, bad_rows, condition)


class StoredImages(Dataset[Sample]):
    """Prepared images of a stored data set by row, decoded and resized by whoever asks (a worker process).

    Args:
        data: The rows.
        image_format: What every image is turned into.
        skip_bad_images: Whether the next readable row stands in for an unreadable one. Otherwise that is an error.
        cached: Whether all images are prepared now and kept.

    Example:
        >>> from tarflow_hf.images.sources import load_image_data
        >>> from tarflow_hf.images.processing import ImageFormat
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> data, _ = load_image_data(DataArguments(data="./examples/data/digits"), class_conditional=True)
        >>> images = StoredImages(data, ImageFormat(image_size=8, num_channels=1))
        >>> len(images), images[0].levels.shape, images[0].label
        (1500, torch.Size([1, 8, 8]), 0)
    """

    def __init__(
        self, data: ImageData, image_format: ImageFormat, *, skip_bad_images: bool = False, cached: bool = False
    ) -> None:
        self.data = data
        self.image_format = image_format
        self.skip_bad_images = skip_bad_images
        self.samples: list[Sample] = []
        if data.arrays is not None:
            data.arrays.check(image_format)
        if cached:
            self.samples = [self[row] for row in range(len(self))]

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, row: int) -> Sample:
        """Raises UnreadableImageError if the image cannot be read and none may stand in for it."""
        if self.samples:
            return self.samples[row]
        bad_rows: list[int] = []
        while len(bad_rows) < len(self):
            try:
                sample = _prepare(self.data.rows[row], row, self.data, self.image_format)
            except UnreadableImageError:
                if not self.skip_bad_images:
                    raise
                bad_rows.append(row)
                row = (row + 1) % len(self)
            else:
                return replace(sample, bad_rows=tuple(bad_rows))
        raise UnreadableImageError(f"no image of data set {self.data.name!r} can be read")


def _prepare(row: dict[str, Any], index: int, data: ImageData, image_format: ImageFormat) -> Sample:
    """Decodes and resizes the image of one row.

    Raises:
        UnreadableImageError: If the image cannot be read; the message names the row.
        ValueError: If the label is none of the classes.
    """
    image = row[data.image_column]
    try:
        if image is None:
            raise ValueError("the row has no image")
        if data.arrays is not None:
            levels = data.arrays.values(image)
        else:
            levels = preprocess_image(_source_of(image), image_format)
    except (OSError, ValueError) as error:
        raise UnreadableImageError(
            f"cannot read the image in row {index} of data set {data.name!r}: {error} "
            "(skip_bad_images lets the next readable image stand in for it)"
        ) from error
    label = data.label_id(row[data.label_column]) if data.label_column else NO_LABEL
    return Sample(levels, label, condition=data.condition_of(row))


def _source_of(image: dict[str, Any]) -> str | bytes:
    """The bytes of an image, or its path on this machine; what lies in an archive or on the Hub is read."""
    path: str = image["path"]
    if image["bytes"] is not None:
        return cast(bytes, image["bytes"])
    if "://" not in path:
        return path
    with fsspec.open(path, "rb") as file:
        return cast(bytes, file.read())


class StreamedImages(IterableDataset[ImageBatch]):
    """Endless prepared batches of one process from a streamed data set.

    Every process, and in it every worker, reads its own part of the stream, shuffled over a buffer, in another order
    in each pass; the order is a function of the seed and of these parts. A run that is taken up again finds its place
    by reading past what it has had, undecoded: two passes at most. That is the very place where all shards are of one
    size (each pass deals them out anew), and near it elsewhere. What that gives up against a stored data set: the
    order depends on the number of processes and workers, images far apart in the stream are never neighbours, and a
    process or worker whose part has fewer rows begins its next pass sooner: every row is seen once an epoch where the
    shards are of one size and divide evenly.

    Args:
        data: The streamed rows.
        image_format: What every image is turned into.
        batch_size: Images of a batch.
        process_index: This process.
        num_processes: All processes.
        taken: Batches of this process that an interrupted run has had already. With W workers, taken // W of each are
            left out; the rest of the division is the loader's to leave out.
        seed: Of the order.
        shuffle_buffer: Images that are shuffled at a time.
        skip_bad_images: Whether unreadable images are left out. Otherwise one is an error.

    Example:
        >>> from tarflow_hf.images.sources import load_image_data
        >>> from tarflow_hf.images.processing import ImageFormat
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> where = DataArguments(data="./examples/data/digits", streaming=True)
        >>> data, _ = load_image_data(where, class_conditional=True)
        >>> options = {"process_index": 0, "num_processes": 1, "taken": 0, "seed": 0, "shuffle_buffer": 100}
        >>> stream = StreamedImages(data, ImageFormat(8, 1), batch_size=16, skip_bad_images=False, **options)
        >>> next(iter(stream)).levels.shape
        torch.Size([16, 1, 8, 8])
    """

    def __init__(
        self,
        data: ImageData,
        image_format: ImageFormat,
        *,
        batch_size: int,
        process_index: int,
        num_processes: int,
        taken: int,
        seed: int,
        shuffle_buffer: int,
        skip_bad_images: bool,
    ) -> None:
        if data.arrays is not None:
            data.arrays.check(image_format)
        self.data = data
        self.rows = split_dataset_by_node(data.rows, rank=process_index, world_size=num_processes)
        self.image_format = image_format
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.taken = taken
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.skip_bad_images = skip_bad_images

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()  # the loader takes a batch from each worker in turn
        samples: list[Sample] = []
        for sample in self._samples(self.batch_size * (self.taken // (worker.num_workers if worker else 1))):
            samples.append(sample)
            if len(samples) == self.batch_size:
                yield collate(samples)
                samples = []

    def _samples(self, taken: int) -> Iterator[Sample]:
        """Samples of pass after pass over this worker's part, but for the first ones."""
        rows = self.rows.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        epoch, bad_rows = 0, tuple[int, ...]()
        while True:
            rows.set_epoch(epoch)
            readable = 0
            for index, row in enumerate(rows):  # in a worker, `datasets` reads that worker's share of the shards
                if taken and not self.skip_bad_images:
                    taken, readable = taken - 1, readable + 1
                    continue
                try:
                    sample = _prepare(row, index, self.data, self.image_format)
                except UnreadableImageError:
                    if not self.skip_bad_images:
                        raise
                    bad_rows += (index,)
                    continue
                readable += 1
                if taken:
                    taken -= 1
                else:
                    yield replace(sample, bad_rows=bad_rows)
                bad_rows = ()
            if not readable:
                raise ValueError(
                    f"data set {self.data.name!r} is too small to be streamed by {self.num_processes} processes, "
                    "or none of its images can be read"
                )
            passes, taken = divmod(taken, readable)
            epoch += 1 + passes


class _Resumed(DataLoader[Any]):
    """A loader of ready batches that leaves out the first ones."""

    def __init__(self, batches: Dataset[Any], *, left_out: int, num_workers: int, pin_memory: bool) -> None:
        super().__init__(batches, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)
        self.left_out = left_out

    def __iter__(self) -> _BaseDataLoaderIter:
        batches = super().__iter__()
        for _ in range(self.left_out):
            next(batches)
        return batches


def make_loader(
    data: ImageData,
    arguments: DataArguments,
    image_format: ImageFormat,
    layout: BatchLayout,
    *,
    seed: int,
    steps: range,
    pin_memory: bool = False,
    encoded: tuple[Dataset[Any], Callable[..., Any]] | None = None,
) -> DataLoader[Any]:
    """Micro-batches of this process for the given steps, in order; endless for a streamed data set.

    Args:
        data: The training data.
        arguments: How to read it.
        image_format: What every image is turned into.
        layout: Which part of each batch is this process's.
        seed: Of the order of the images.
        steps: Steps to read for; a resumed run starts where it stopped.
        pin_memory: Whether batches are put where a GPU can fetch them.
        encoded: What is read in place of the images, row by row, and how its samples make a batch.

    Example:
        >>> from tarflow_hf.images.sources import load_image_data
        >>> from tarflow_hf.images.processing import ImageFormat
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> from tarflow_hf.images.order import BatchLayout
        >>> arguments = DataArguments(data="./examples/data/digits", num_workers=0)
        >>> data, _ = load_image_data(arguments, class_conditional=True)
        >>> loader = make_loader(data, arguments, ImageFormat(8, 1), BatchLayout(32), seed=0, steps=range(2))
        >>> [batch.levels.shape for batch in loader]
        [torch.Size([32, 1, 8, 8]), torch.Size([32, 1, 8, 8])]
    """
    workers: dict[str, Any] = {"num_workers": arguments.num_workers, "pin_memory": pin_memory}
    if arguments.streaming:
        stream = StreamedImages(
            data,
            image_format,
            batch_size=layout.micro_batch_size,
            process_index=layout.process_index,
            num_processes=layout.num_processes,
            taken=steps.start * layout.micro_batches,
            seed=int(np.random.SeedSequence([seed, ORDER_STREAM]).generate_state(1)[0]),
            shuffle_buffer=arguments.shuffle_buffer,
            skip_bad_images=arguments.skip_bad_images,
        )
        workers["num_workers"] = min(arguments.num_workers, stream.rows.num_shards)  # more would have nothing to read
        left_out = stream.taken % max(workers["num_workers"], 1)
        return _Resumed(stream, left_out=left_out, **workers)
    sampler = StepSampler(len(data.rows), layout.batch_size, layout, seed, steps)
    if arguments.cache_images or encoded is not None:
        workers["num_workers"] = 0
    if encoded is not None:
        return DataLoader(encoded[0], batch_sampler=sampler, collate_fn=encoded[1], **workers)
    images = StoredImages(data, image_format, skip_bad_images=arguments.skip_bad_images, cached=arguments.cache_images)
    return DataLoader(images, batch_sampler=sampler, collate_fn=collate, **workers)


__all__ = [
    "ImageBatch",
    "Sample",
    "StoredImages",
    "StreamedImages",
    "UnreadableImageError",
    "collate",
    "make_loader",
]

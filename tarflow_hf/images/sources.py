"""Where training images and arrays come from: Hub data sets, folders, parquet and NumPy files, WebDataset tars."""

import glob
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_hf.images.arguments import DataArguments, credentials_hidden, without_credentials
from tarflow_hf.images.array_files import ARRAY_FILES, NO_LABEL, array_splits
from tarflow_hf.images.arrays import Arrays, describe
from tarflow_hf.images.columns import Rows, check_distinct, class_names_of, find_image_column, find_label_column
from tarflow_hf.images.extras import installed_by
from tarflow_hf.images.folders import folder_images

with installed_by("train", "eval"):
    import datasets

_FILES = {".parquet": "parquet", ".tar": "webdataset"}  # what `datasets` calls their format
_MAX_SHARDS = 128  # of a folder of images that is read as a stream: bounds what workers can share
_DESCRIBED = 10_000  # rows of a stream whose mean and deviation are taken for those of all
_DRAW_SEED = 3_000_017  # of the held-out images that are used


@dataclass(frozen=True)
class ImageData:
    """The rows of a data set and how to read them.

    Args:
        rows: Stored or streamed rows, images not yet decoded.
        name: What error messages call the data set.
        image_column: Name of the column of images.
        label_column: Name of the column of labels, or None.
        class_names: Name of each class in the order of the ids; empty without labels.
        condition_columns: Columns of numbers that images are conditioned on.
        condition: What the model's configuration says on them: their number, names, means and deviations.
        arrays: What the arrays have in common; None for images.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> data, _ = load_image_data(DataArguments(data="./examples/data/digits"), class_conditional=True)
        >>> data.image_column, data.label_column, data.label_id("7")
        ('image', 'label', 7)
    """

    rows: Rows
    name: str
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    condition_columns: tuple[str, ...] = ()
    condition: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays | None = None

    @property
    def described(self) -> dict[str, Any]:
        """What the model's configuration says of condition and arrays."""
        return self.condition | ({} if self.arrays is None else self.arrays.config)

    def content_of(self, row: dict[str, Any]) -> bytes:
        """The bytes of a row's image file, or of its array; none where it is not there, which reading will say."""
        image = row[self.image_column]
        if not isinstance(image, dict):
            return b"" if image is None else np.asarray(image, dtype=np.float64).tobytes()
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        path = Path(image["path"])
        return path.read_bytes() if path.is_file() else b""

    def condition_of(self, row: dict[str, Any]) -> tuple[float, ...]:
        """The numbers of the condition columns of a row, one column after the other.

        Raises:
            ValueError: If a value is missing, is no finite number, or a list has another length.
        """
        numbers = tuple(number for column in self.condition_columns for number in _numbers(column, row[column]))
        if self.condition and len(numbers) != self.condition["condition_dim"]:
            size = self.condition["condition_dim"]
            raise ValueError(f"condition_columns must hold {size} numbers in every row, got {len(numbers)}")
        return numbers

    def label_id(self, label: int | str | None) -> int:
        """The class id of a value of the label column; -1 where there is none.

        Raises:
            ValueError: If the value is no class of the data set.
        """
        if label is None or label == NO_LABEL:
            return NO_LABEL
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, int) and 0 <= label < len(self.class_names):
            return label
        raise ValueError(f"label {label!r} is not one of the {len(self.class_names)} classes {self.class_names[:10]}")


def load_image_data(
    arguments: DataArguments, *, class_conditional: bool, eval_images: int | None = None
) -> tuple[ImageData, ImageData | None]:
    """Loads the rows to train on and, where a split for it is named, those to evaluate on.

    Args:
        arguments: Where they are and which columns they are in.
        class_conditional: Whether labels are needed.
        eval_images: Held-out images to use, drawn evenly from all classes and the same in every run; None for all.

    Returns:
        Training data and held-out data or None; both number the classes alike. Held-out rows are always stored: those
        of a streamed data set are read into memory now, undecoded.

    Raises:
        FileNotFoundError: If a local data set is not there.
        ValueError: If a split or a column is missing or ambiguous, or labels cannot be numbered.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> arguments = DataArguments(data="./examples/data/digits", eval_split="test")
        >>> train, held_out = load_image_data(arguments, class_conditional=True, eval_images=100)
        >>> len(train.rows), len(held_out.rows), train.class_names[:3]
        (1500, 100, ('0', '1', '2'))
    """
    with credentials_hidden(arguments.data, arguments.eval_data):
        return _load(arguments, class_conditional=class_conditional, eval_images=eval_images)


def _load(
    arguments: DataArguments, *, class_conditional: bool, eval_images: int | None
) -> tuple[ImageData, ImageData | None]:
    splits = _load_splits(arguments.data, arguments)
    train = _pick_split(splits, arguments.data, arguments.train_split)
    arrays = arguments.array_layout is not None
    image_column = find_image_column(train.features, arguments.image_column, arrays=arrays)
    label_column = find_label_column(train.features, arguments.label_column) if class_conditional else None
    check_distinct(image_column, label_column, arguments.condition_columns)
    class_names = class_names_of(train, label_column, arguments.class_names) if label_column else ()
    name = without_credentials(arguments.data)
    own = (image_column, label_column, class_names, arguments.condition_columns)
    data = _image_data(train, name, *own, arrays=arrays)
    data = replace(data, condition=_describe_condition(data))
    if arguments.array_layout is not None:
        given = arguments.value_mean, arguments.value_scale
        found = describe(_array_sources(data), arguments.array_layout, *given, skip_bad=arguments.skip_bad_images)
        data = replace(data, arrays=found)
    if arguments.eval_split is None:
        return data, None
    place = arguments.eval_data or arguments.data
    if place != arguments.data:
        splits = _load_splits(place, arguments)
    rows = _pick_split(splits, place, arguments.eval_split)
    held_out = _image_data(rows, without_credentials(place), *own, arrays=arrays)
    held_out = replace(held_out, rows=_drawn_rows(held_out.rows, label_column, eval_images))
    if data.arrays is not None:
        scaling = data.arrays.value_mean, data.arrays.value_scale
        found = describe(_array_sources(held_out), data.arrays.layout, *scaling, skip_bad=arguments.skip_bad_images)
        if found != data.arrays:
            raise ValueError(f"eval_split: arrays must have the shape {data.arrays.shape} as data, got {found.shape}")
    return data, replace(held_out, condition=data.condition, arrays=data.arrays)


def _array_sources(data: ImageData) -> Iterator[tuple[str, object]]:
    """Each array, of a stream the first 10,000, with what messages call it."""
    limit = _DESCRIBED if isinstance(data.rows, datasets.IterableDataset) else None
    for index, row in enumerate(islice(data.rows.select_columns([data.image_column]), limit)):
        yield f"row {index} of data set {data.name!r}", row[data.image_column]


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Names the data set in whatever its files, or the libraries that read them, say of damage."""
    try:
        yield
    except (FileNotFoundError, ConnectionError):
        raise
    except Exception as error:
        if type(error) in (ValueError, OSError, PermissionError) and place in str(error):
            raise
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        kind = ValueError if type(error) is ValueError else OSError
        raise kind(f"data set {place!r} cannot be read: {reason}") from error


def _load_splits(place: str, arguments: DataArguments) -> dict[str, Rows]:
    with _reading(place):
        splits = _found_splits(place, arguments)
        for name, rows in splits.items():
            if rows.features is None:  # a stream of a format that does not tell
                splits[name] = rows._resolve_features()
        return splits


def _found_splits(place: str, arguments: DataArguments) -> dict[str, Rows]:
    path = Path(place).expanduser()
    if arguments.array_layout is not None and (path.suffix in ARRAY_FILES or any(path.rglob("*.np[yz]"))):
        _check_no_configuration(place, arguments)
        return {split: _rows(rows, arguments.streaming) for split, rows in array_splits(path, arguments).items()}
    if arguments.array_layout is None and path.suffix in ARRAY_FILES:
        raise ValueError(f"{place!r} holds arrays: say by array_layout (chw, hwc or hw) what their axes are")
    kind = _FILES.get(Path(place).suffix)
    if kind is not None and not path.is_dir():
        if not path.is_file() and not glob.glob(str(path)):
            raise FileNotFoundError(f"no {Path(place).suffix[1:]} file matches {place!r}")
        _check_no_configuration(place, arguments)
        files = {"train": glob.escape(str(path)) if path.is_file() else str(path)}
        return dict(datasets.load_dataset(kind, data_files=files, streaming=arguments.streaming))
    if place.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise FileNotFoundError(
            f"{place!r} is no folder: expected one of images, of parquet files, of WebDataset tars or of NumPy files"
        )
    if not path.is_dir():
        return dict(datasets.load_dataset(place, arguments.data_config, streaming=arguments.streaming))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _check_no_configuration(place, arguments)
        return _saved_splits(path, streaming=arguments.streaming)
    images = folder_images(path) if arguments.data_config is None else None
    if images is not None:
        return {split: _rows(found.dataset(), arguments.streaming) for split, found in images.items()}
    if glob.escape(str(path)) == str(path):
        return dict(datasets.load_dataset(str(path), arguments.data_config, streaming=arguments.streaming))
    _check_no_configuration(place, arguments)
    kind = "parquet" if any(path.rglob("*.parquet")) else "imagefolder"  # brackets are patterns to `load_dataset`
    return dict(datasets.load_dataset(kind, data_dir=glob.escape(str(path)), streaming=arguments.streaming))


def _check_no_configuration(place: str, arguments: DataArguments) -> None:
    if arguments.data_config is not None:
        raise ValueError(f"data_config={arguments.data_config!r} must be left out: {place!r} has no configurations")


def _rows(rows: datasets.Dataset, streaming: bool) -> Rows:
    return rows.to_iterable_dataset(num_shards=min(len(rows), _MAX_SHARDS)) if streaming else rows


def _saved_splits(place: Path, *, streaming: bool) -> dict[str, Rows]:
    """The splits of a folder that `save_to_disk` wrote; rows without splits are those to train on."""
    saved = datasets.load_from_disk(place)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return {str(name): _rows(rows, streaming) for name, rows in splits.items()}


def _pick_split(splits: dict[str, Rows], place: str, name: str) -> Rows:
    if name not in splits:
        raise ValueError(f"data set {place!r} has no split {name!r}, found {', '.join(map(str, splits))}")
    return splits[name]


def _drawn_rows(rows: Rows, label_column: str | None, count: int | None) -> datasets.Dataset:
    """Rows as a stored data set: all, or some drawn class by class, always the same; more of them include fewer.

    Of a stream they are drawn from its first rows, ten times as many.
    """
    if not isinstance(rows, datasets.Dataset):
        first = rows if count is None else rows.take(10 * count)
        rows = datasets.Dataset.from_list(list(first), features=rows.features)
    if count is None or count >= len(rows):
        return rows
    order = np.random.default_rng(_DRAW_SEED).permutation(len(rows)).tolist()
    if label_column is not None:
        labels, seen = rows[label_column], Counter[object]()
        turns = []
        for row in order:
            turns.append(seen[labels[row]])
            seen[labels[row]] += 1
        order = [row for _, row in sorted(zip(turns, order, strict=True), key=lambda pair: pair[0])]
    return rows.select(sorted(order[:count]))


def _image_data(
    rows: Rows,
    place: str,
    image_column: str,
    label_column: str | None,
    class_names: tuple[str, ...],
    condition_columns: tuple[str, ...],
    *,
    arrays: bool,
) -> ImageData:
    """Keeps the columns that are used, with images undecoded. Nothing is copied or rewritten."""
    columns = [image_column] + ([label_column] if label_column else []) + list(condition_columns)
    for column in columns:
        if column not in rows.features:
            raise ValueError(f"data set {place!r} has no column {column!r}, found columns {list(rows.features)}")
    feature = rows.features[label_column] if label_column else None
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != class_names:
        raise ValueError(
            f"data set {place!r} names its classes {feature.names[:10]}, but the training data {class_names[:10]}"
        )
    rows = rows.select_columns(columns)
    if not arrays or isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    data = ImageData(rows, place, image_column, label_column, class_names, condition_columns)
    _check_labels(data)
    return data


def _check_labels(data: ImageData) -> None:
    """Raises ValueError unless each label of stored rows is one of the classes."""
    if data.label_column is None or not isinstance(data.rows, datasets.Dataset):
        return
    for label in data.rows.select_columns([data.label_column]).unique(data.label_column):
        try:
            data.label_id(label)
        except ValueError as error:
            raise ValueError(f"data set {data.name!r}, label_column={data.label_column!r}: {error}") from error


def _numbers(column: str, value: object) -> list[float]:
    """The numbers of one value of a condition column."""
    numbers = []
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not np.isfinite(number):
            raise ValueError(f"condition column {column!r} must hold finite numbers, got {number!r}")
        numbers.append(float(number))
    return numbers


def _describe_condition(data: ImageData) -> dict[str, Any]:
    """Number, names, means and deviations of the condition, over all rows, or the first 10,000 of a stream."""
    if not data.condition_columns:
        return {}
    columns = list(data.condition_columns)
    limit = _DESCRIBED if isinstance(data.rows, datasets.IterableDataset) else None
    rows = islice(data.rows.select_columns(columns), limit)
    values: list[tuple[float, ...]] = []
    names: list[str] = []
    for index, row in enumerate(rows):
        try:
            values.append(data.condition_of(row))
        except ValueError as error:
            raise ValueError(f"row {index} of data set {data.name!r}: {error}") from error
        if len(values[-1]) != len(values[0]):
            raise ValueError(
                f"row {index} of data set {data.name!r}: condition_columns must hold {len(values[0])} numbers as in "
                f"the first row, got {len(values[-1])}"
            )
        names = names or [
            column if not isinstance(row[column], list) else f"{column}[{place}]"
            for column in columns
            for place in range(len(_numbers(column, row[column])))
        ]
    mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    constant = [name for name, deviation in zip(names, std, strict=True) if not deviation > 0]
    if constant:
        raise ValueError(f"condition_columns: {', '.join(constant)} has the same value in every row")
    return {
        "condition_dim": len(names),
        "condition_names": names,
        "condition_mean": [float(value) for value in mean],
        "condition_std": [float(value) for value in std],
    }


__all__ = ["NO_LABEL", "ImageData", "load_image_data"]

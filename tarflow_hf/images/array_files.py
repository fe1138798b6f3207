"""Files of arrays as rows of `datasets`: `.npy` and `.npz`, whose objects are never unpickled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.arrays import UNREADABLE, check_numbers
from tarflow_hf.images.extras import installed_by
from tarflow_hf.images.folders import folder_images

with installed_by("train", "eval"):
    import datasets

ARRAY_FILES = (".npy", ".npz")
NO_LABEL = -1


@dataclass(frozen=True)
class FileArrays:
    """What a NumPy file holds.

    Args:
        name: What its arrays are called.
        arrays: The arrays, counted by the first axis.
        label_name: What its labels are called; empty where there are none.
        labels: (number,) integers or text, or None.
        condition: (number,) or (number, some) numbers by name.

    Example:
        >>> import numpy as np
        >>> FileArrays("waves", np.ones((3, 4, 8))).labels is None
        True
    """

    name: str
    arrays: np.ndarray
    label_name: str = ""
    labels: np.ndarray | None = None
    condition: dict[str, np.ndarray] = field(default_factory=dict)


def array_splits(path: Path, arguments: DataArguments) -> dict[str, datasets.Dataset]:
    """The arrays of a NumPy file, of a folder with such a file for each split, or of one with a file for each array.

    Args:
        path: A `.npy` or `.npz` file of all arrays; or a folder: with such files that are called like the splits,
            among them the one to train on, or with a `.npy` file for each array, in folders of classes if there are
            any.
        arguments: How the data are read.

    Returns:
        Rows by the name of the split.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file holds anything else.

    Example:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> np.save("waves.npy", np.ones((3, 4, 8)))
        >>> arguments = DataArguments(data="waves.npy", array_layout="hw", horizontal_flip=False)
        >>> array_splits(Path("waves.npy"), arguments)["train"].features
        {'array': Array2D(shape=(4, 8), dtype='float64')}
    """
    found = [file for ending in ARRAY_FILES for file in sorted(path.glob(f"*{ending}"))]
    files = {file.stem: file for file in found}
    if arguments.train_split in files:
        if len(files) < len(found):
            raise ValueError(f"{str(path)!r} must hold one file for each split, got {[file.name for file in found]}")
        return _rows_by_split({split: _content(file, arguments) for split, file in files.items()})
    if path.is_dir():
        images = folder_images(path, endings=frozenset({".npy"}))
        if images is None:
            raise ValueError(
                f"{str(path)!r} must hold .npy files, one for each array, without files of `datasets` beside them; or "
                f"a file {arguments.train_split}.npy or {arguments.train_split}.npz of all arrays"
            )
        return {split: part.dataset() for split, part in images.items()}
    if not path.is_file():
        raise FileNotFoundError(f"no {path.suffix[1:]} file {str(path)!r}")
    return _rows_by_split({"train": _content(path, arguments)})


def _content(path: Path, arguments: DataArguments) -> FileArrays:
    """What a NumPy file holds; its arrays have the axes of `array_layout`."""
    found = file_arrays(str(path), arguments.image_column, arguments.label_column, arguments.condition_columns)
    assert arguments.array_layout is not None
    if found.arrays.ndim != 1 + len(arguments.array_layout):
        raise ValueError(
            f"{str(path)!r} must hold arrays (number, {', '.join(arguments.array_layout)}) by array_layout, got the "
            f"shape {found.arrays.shape}"
        )
    return found


def _rows_by_split(splits: dict[str, FileArrays]) -> dict[str, datasets.Dataset]:
    """The rows of each split; a class is one that any of them has, and has the same number in all."""
    labels = [label for found in splits.values() if found.labels is not None for label in found.labels.tolist()]
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"labels must be all integers or all text in {', '.join(splits)}, got both")
    classes = [label for label in sorted(set(labels)) if label != NO_LABEL]
    return {split: _rows(found, classes) for split, found in splits.items()}


def _rows(found: FileArrays, classes: list[object]) -> datasets.Dataset:
    array = found.arrays
    kind = datasets.Array2D if array.ndim == 3 else datasets.Array3D
    dtype = "int64" if array.dtype.kind in "iu" else "float64" if array.dtype.itemsize >= 8 else "float32"
    features: dict[str, Any] = {found.name: kind(shape=array.shape[1:], dtype=dtype)}
    content: dict[str, Any] = {found.name: list(array.astype(dtype))}
    if found.labels is not None:
        number = {label: index for index, label in enumerate(classes)} | {NO_LABEL: NO_LABEL}
        features[found.label_name] = datasets.ClassLabel(names=[str(label) for label in classes])
        content[found.label_name] = [number[label] for label in found.labels.tolist()]
    for name, numbers in found.condition.items():
        features[name] = datasets.Value("float64") if numbers.ndim == 1 else datasets.List(datasets.Value("float64"))
        content[name] = numbers.astype(np.float64).tolist()
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def file_arrays(
    path: str, array_key: str | None = None, label_key: str | None = None, condition_keys: Sequence[str] = ()
) -> FileArrays:
    """What a file of all arrays holds.

    Args:
        path: A `.npz` file, or a `.npy` file, whose arrays are called `array`; their first axis counts them.
        array_key: Name of the arrays in a `.npz` file; None: the only one beside labels and condition.
        label_key: Name of the labels in a `.npz` file; None: `labels`, where there are some. They are integers, -1 for
            none, or text.
        condition_keys: Names of the numbers in a `.npz` file that arrays are conditioned on, one or a row for each.

    Raises:
        ValueError: If the file holds several arrays, or anything but real numbers, or labels of another kind.

    Example:
        >>> import numpy as np
        >>> np.savez("waves.npz", waves=np.ones((3, 2, 2)), labels=np.array([0, 1, 0]), wind=np.array([0.5, 2.0, 1.0]))
        >>> found = file_arrays("waves.npz", condition_keys=["wind"])
        >>> found.name, found.arrays.shape, found.labels.tolist(), list(found.condition)
        ('waves', (3, 2, 2), [0, 1, 0], ['wind'])
    """
    try:
        with open(path, "rb") as file:
            found = _file_content(np.load(file, allow_pickle=False), array_key, label_key, condition_keys)
        check_numbers(found.arrays)
    except UNREADABLE as error:
        raise ValueError(f"{path} must be one array of numbers (objects are never unpickled): {error}") from error
    count = found.arrays.shape[:1]
    if not count or (found.labels is not None and found.labels.shape != count):
        raise ValueError(
            f"{path} must have a label for each array, got the shapes {found.arrays.shape} and "
            f"{() if found.labels is None else found.labels.shape}"
        )
    for name, numbers in found.condition.items():
        if numbers.dtype.kind not in "fiu" or numbers.ndim not in (1, 2) or numbers.shape[:1] != count:
            raise ValueError(
                f"{path}: condition_columns {name} must hold a number, or a row of them, for each of {count[0]} "
                f"arrays, got the shape {numbers.shape} of {numbers.dtype}"
            )
    return found


def _file_content(
    loaded: Any,  # noqa: ANN401  # of NumPy
    array_key: str | None,
    label_key: str | None,
    condition_keys: Sequence[str],
) -> FileArrays:
    """The parts of what `np.load` gives, by name."""
    if isinstance(loaded, np.ndarray):
        return FileArrays("array", loaded)
    label_key = label_key or ("labels" if "labels" in loaded else None)
    rest = [key for key in loaded.files if key != label_key and key not in condition_keys]
    found = [array_key] if array_key else rest
    wanted = {*found, *condition_keys, *([label_key] if label_key else [])}
    if len(found) != 1 or not wanted <= set(loaded.files):
        raise ValueError(
            f"it holds {loaded.files}: name the one to use with image_column, and what is beside it with label_column "
            "and condition_columns"
        )
    labels = None if label_key is None else loaded[label_key]
    if labels is not None and labels.dtype.kind not in "iuUS":
        raise ValueError(f"label_column {label_key} must hold integers (-1: none) or text, got {labels.dtype}")
    if labels is not None and labels.dtype.kind == "i" and (labels < NO_LABEL).any():
        raise ValueError(f"label_column {label_key} must hold integers from 0 (-1: none), got {labels.min()}")
    if labels is not None and labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    return FileArrays(
        found[0], loaded[found[0]], label_key or "", labels, {key: loaded[key] for key in condition_keys}
    )


__all__ = ["ARRAY_FILES", "FileArrays", "array_splits", "file_arrays"]

"""Files of arrays as rows of `datasets`: `.npy` and `.npz`, whose objects are never unpickled."""

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


def array_splits(path: Path, arguments: DataArguments) -> dict[str, datasets.Dataset]:
    """The arrays of a NumPy file, of a folder with such a file for each split, or of one with a file for each array.

    Args:
        path: A `.npy` or `.npz` file of all arrays; or a folder: with such files that are called like the splits,
            among them the one to train on, or with a `.npy` file for
            each array, in folders of classes if there are any.
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
    files = {file.stem: file for ending in ARRAY_FILES for file in sorted(path.glob(f"*{ending}"))}
    if arguments.train_split in files:
        return {split: _file_rows(file, arguments) for split, file in files.items()}
    if path.is_dir():
        found = folder_images(path, endings=frozenset({".npy"}))
        if found is None:
            raise ValueError(f"{str(path)!r} must hold .npy files alone, and files of `datasets` are beside them")
        return {split: files.dataset() for split, files in found.items()}
    if not path.is_file():
        raise FileNotFoundError(f"no {path.suffix[1:]} file {str(path)!r}")
    return {"train": _file_rows(path, arguments)}


def _file_rows(path: Path, arguments: DataArguments) -> datasets.Dataset:
    """The arrays of a NumPy file."""
    columns = file_arrays(str(path), arguments.image_column, arguments.label_column)
    (name, array), *others = columns.items()
    assert arguments.array_layout is not None
    if array.ndim != 1 + len(arguments.array_layout):
        raise ValueError(
            f"{str(path)!r} must hold arrays (number, {', '.join(arguments.array_layout)}) by array_layout, got the "
            f"shape {array.shape}"
        )
    kind = datasets.Array2D if array.ndim == 3 else datasets.Array3D
    dtype = "int64" if array.dtype.kind in "iu" else "float64" if array.dtype.itemsize == 8 else "float32"
    features = {name: kind(shape=array.shape[1:], dtype=dtype)}
    content: dict[str, Any] = {name: list(array.astype(dtype))}
    for column, labels in others:
        names, numbers = np.unique(labels, return_inverse=True)
        features[column] = datasets.ClassLabel(names=[str(label) for label in names])
        content[column] = numbers.tolist()
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def file_arrays(path: str, array_key: str | None = None, label_key: str | None = None) -> dict[str, Any]:
    """The columns of a file of all arrays, by their names in it: first the arrays, then labels where it has some.

    Args:
        path: A `.npz` file, or a `.npy` file, whose arrays are called `array`; their first axis counts them.
        array_key: Name of the arrays in a `.npz` file; None: the only one beside the labels.
        label_key: Name of the labels in a `.npz` file; None: `labels`, where there are some.

    Raises:
        ValueError: If the file holds several arrays, or anything but real numbers.

    Example:
        >>> import numpy as np
        >>> np.savez("waves.npz", waves=np.ones((3, 2, 2)), labels=np.array([0, 1, 0]))
        >>> columns = file_arrays("waves.npz")
        >>> columns["waves"].shape, columns["labels"].tolist()
        ((3, 2, 2), [0, 1, 0])
    """
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            columns = _columns(loaded, array_key, label_key)
        array, *labels = columns.values()
        check_numbers(array)
    except UNREADABLE as error:
        raise ValueError(f"{path} must be one array of numbers (objects are never unpickled): {error}") from error
    if array.ndim == 0 or (labels and labels[0].shape != (len(array),)):
        raise ValueError(
            f"{path} must have a label for each array, got the shapes {array.shape} and "
            f"{labels[0].shape if labels else ()}"
        )
    return columns


def _columns(loaded: Any, array_key: str | None, label_key: str | None) -> dict[str, Any]:  # noqa: ANN401  # of NumPy
    """The arrays and labels of what `np.load` gives, by name."""
    if isinstance(loaded, np.ndarray):
        return {"array": loaded}
    label_key = label_key or ("labels" if "labels" in loaded else None)
    found = [array_key] if array_key else [key for key in loaded.files if key != label_key]
    if len(found) != 1 or not {found[0], label_key or found[0]} <= set(loaded.files):
        raise ValueError(f"arrays {loaded.files}: name the one to use with image_column")
    return {name: loaded[name] for name in (found[0], label_key) if name is not None}


__all__ = ["ARRAY_FILES", "array_splits", "file_arrays"]

"""Which columns of a data set hold images and labels, and which classes there are."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from tarflow_hf.images.array_files import NO_LABEL
from tarflow_hf.images.extras import installed_by

with installed_by("train", "eval"):
    import datasets

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
_TEXT_OR_BYTES = ("string", "large_string", "binary", "large_binary")  # of a file's path, or of its content


def find_image_column(features: datasets.Features, named: str | None, *, arrays: bool) -> str:
    """The column of the images or arrays: the one that is named, or the only one.

    Args:
        features: Of the data set.
        named: Its name, or None.
        arrays: Whether arrays are looked for, which may be in lists as well.

    Raises:
        ValueError: If there is none, or several, or the one that is named can hold none.

    Example:
        >>> import datasets
        >>> find_image_column(datasets.Features({"picture": datasets.Image()}), None, arrays=False)
        'picture'
    """
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D) if arrays else datasets.Image
    found = [name for name, feature in features.items() if isinstance(feature, kinds)]
    if named is not None:
        feature = features[_existing_column(features, named)]
        if not (arrays or isinstance(feature, datasets.Image) or _may_be_files(feature)):
            raise ValueError(
                f"image_column={named!r} must hold images, or their files, it holds {str(feature)[:80]}: numbers need "
                "array_layout"
            )
        return named
    if not found:
        raise ValueError(
            f"data set has no image column, found columns {list(features)}; name the one to use with image_column"
        )
    if len(found) > 1:
        raise ValueError(f"data set has several image columns, {found}; choose one with image_column")
    return found[0]


def _may_be_files(feature: Any) -> bool:  # noqa: ANN401  # a feature of datasets, or a dictionary of some
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in _TEXT_OR_BYTES


def find_label_column(features: datasets.Features, named: str | None) -> str:
    """The column of the labels: the one that is named, or the only one of class labels.

    Args:
        features: Of the data set.
        named: Its name, or None.

    Raises:
        ValueError: If there is none or several.

    Example:
        >>> import datasets
        >>> find_label_column(datasets.Features({"kind": datasets.ClassLabel(names=["cat", "dog"])}), None)
        'kind'
    """
    if named is not None:
        return _existing_column(features, named)
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) != 1:
        raise ValueError(
            f"data set has {len(found)} columns of class labels {found} among {list(features)}; "
            "name one with label_column, make class folders, or do without: class_conditional: false in a recipe, "
            "--ignore_labels where a model is measured"
        )
    return found[0]


def check_distinct(image_column: str, label_column: str | None, condition_columns: Sequence[str]) -> None:
    """Raises ValueError if one column is to be two things.

    Args:
        image_column: The column of the images.
        label_column: That of the labels.
        condition_columns: Those of the numbers to condition on.

    Example:
        >>> check_distinct("image", "label", ["image"])
        Traceback (most recent call last):
            ...
        ValueError: condition_columns must be columns of their own, each named once, got 'image' among ...
    """
    if image_column == label_column:
        raise ValueError(f"image_column and label_column must differ, both are {label_column!r}")
    columns = [image_column, *filter(None, [label_column]), *condition_columns]
    for place, column in enumerate(columns):
        if column in columns[:place]:
            raise ValueError(
                f"condition_columns must be columns of their own, each named once, got {column!r} among {columns}"
            )


def class_names_of(rows: Rows, column: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The name of each class, in the order of the ids.

    Args:
        rows: Of the training data.
        column: That of the labels.
        given: What the recipe says; empty: nothing.

    Raises:
        ValueError: If the column has no classes, or others than are given.

    Example:
        >>> import datasets
        >>> class_names_of(datasets.Dataset.from_dict({"kind": ["dog", "cat", "dog"]}), "kind", ())
        ('cat', 'dog')
    """
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        if given and given != tuple(feature.names):
            raise ValueError(f"class_names must be those of the data set, {feature.names[:10]}, got {given[:10]}")
        if not feature.names:
            raise ValueError(f"label_column={column!r} must name a class, got {NO_LABEL} (none) in every row")
        return tuple(feature.names)
    if not isinstance(feature, datasets.Value):
        raise ValueError(f"label_column={column!r} must hold a class name or id in each row, it holds {feature!s:.80}")
    if given:
        return given
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError(
            f"a streamed data set needs class labels with names, label_column={column!r} is {feature}: name the "
            "classes with class_names"
        )
    values = set(rows.unique(column)) - {None}
    if values and all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    integers = sorted(value for value in values if type(value) is int and value != NO_LABEL)
    if not integers or integers != list(range(len(integers))):
        raise ValueError(
            f"label_column={column!r} must hold class names, or integers 0 ... n - 1 (-1: no label), "
            f"got {sorted(map(repr, values))[:10]}"
        )
    return tuple(map(str, integers))


def _existing_column(features: datasets.Features, name: str) -> str:
    if name not in features:
        raise ValueError(f"data set has no column {name!r}, found columns {list(features)}")
    return name


__all__ = ["Rows", "check_distinct", "class_names_of", "find_image_column", "find_label_column"]

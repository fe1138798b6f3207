"""Numerical arrays in place of images: read without unpickling, brought to (channels, height, width), scaled and back.

The model sees x = (v - value_mean) / value_scale, channel by channel; both stand in its configuration.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from zipfile import BadZipFile

import numpy as np
import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig, height_and_width
from tarflow_hf.images.arguments import ArrayLayout, DataArguments
from tarflow_hf.images.processing import ImageFormat, in_float64

_LARGEST_INTEGER = 2**53  # larger ones have no exact floating-point number
UNREADABLE = (  # what NumPy raises on files that are none, or whose headers lie
    *(ValueError, TypeError, OverflowError, KeyError, EOFError, SyntaxError, RecursionError, MemoryError),
    *(BadZipFile, zlib.error, NotImplementedError),
)
SHOWN_DEVIATIONS = 3.0
"""Where pictures of arrays are white; as far below the mean they are black."""


@dataclass(frozen=True)
class ArrayFormat(ImageFormat):
    """The size that arrays must have, of any number of channels: nothing is resized or converted.

    Example:
        >>> ArrayFormat(image_size=(16, 32), num_channels=5).num_channels
        5
    """

    def __post_init__(self) -> None:
        height_and_width(self.image_size)  # checks it
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")


def format_of(image_size: int | Sequence[int], num_channels: int, data: DataArguments) -> ImageFormat:
    """What images are turned into, or what arrays must be.

    Args:
        image_size: Side, or (height, width).
        num_channels: Channels.
        data: How images are resized, and whether these are arrays, which never are.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> arrays = DataArguments(data="fields.npy", array_layout="chw", horizontal_flip=False)
        >>> type(format_of(8, 5, arrays)).__name__
        'ArrayFormat'
    """
    return (ImageFormat if data.array_layout is None else ArrayFormat)(image_size, num_channels, data.resize)


@dataclass(frozen=True)
class Arrays:
    """What the arrays of a data set have in common.

    Args:
        layout: Order of the axes as they are stored.
        shape: Channels, height and width.
        value_mean: What is subtracted from each channel.
        value_scale: What it is then divided by.

    Example:
        >>> arrays = Arrays("hw", (1, 2, 2), value_mean=(100.0,), value_scale=(50.0,))
        >>> arrays.values([[0, 100], [150, 200]])
        tensor([[[-2.,  0.],
                 [ 1.,  2.]]])
    """

    layout: ArrayLayout
    shape: tuple[int, int, int]
    value_mean: tuple[float, ...]
    value_scale: tuple[float, ...]

    @property
    def config(self) -> dict[str, list[float]]:
        """The fields of [`TarFlowConfig`] that describe them."""
        return {"value_mean": list(self.value_mean), "value_scale": list(self.value_scale)}

    @property
    def format(self) -> ArrayFormat:
        """The size and channels of a model that takes them."""
        return ArrayFormat(self.shape[1:], self.shape[0])

    def values(self, source: object) -> torch.Tensor:
        """One array as the model sees it, (channels, height, width) float32.

        Args:
            source: As in [`read_array`].

        Raises:
            ValueError: As [`read_array`] does, or if float32 cannot hold what the scaling gives.
        """
        array = read_array(source, self.layout)
        if array.shape != self.shape:
            raise ValueError(f"arrays must all have the shape {self.shape} of the first one, got {array.shape}")
        return self.scaled(array)

    def scaled(self, array: np.ndarray) -> torch.Tensor:
        """Values as the model sees them, in float32.

        Args:
            array: (channels, height, width) float64 in the units of the data.

        Raises:
            ValueError: If float32 cannot hold them.
        """
        mean, scale = (np.reshape(numbers, (-1, 1, 1)) for numbers in (self.value_mean, self.value_scale))
        with np.errstate(over="ignore"):
            scaled = ((array - mean) / scale).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise ValueError(
                "arrays must be in the range of float32 by (value - value_mean) / value_scale, got "
                f"{array.flat[np.abs(array).argmax()]} with value_scale {self.value_scale}"
            )
        return torch.from_numpy(scaled)

    def check(self, image_format: ImageFormat) -> None:
        """Raises ValueError unless the arrays have the size and channels that a model takes.

        Args:
            image_format: Size and channels of the model.
        """
        wanted = (image_format.num_channels, *height_and_width(image_format.image_size))
        if wanted != self.shape:
            raise ValueError(
                f"num_channels and image_size must be those of the arrays, {self.shape[0]} and {self.shape[1:]}, "
                f"got {wanted[0]} and {wanted[1:]}"
            )


def load_array(source: bytes | str | PathLike[str]) -> np.ndarray:
    """The array of a `.npy` file, given by its path or its bytes; Python objects are never unpickled.

    Raises:
        ValueError: If this is no `.npy` file, or one of Python objects.

    Example:
        >>> import numpy as np
        >>> np.save("wave.npy", np.ones((2, 4)))
        >>> load_array("wave.npy").shape
        (2, 4)
    """
    name = "the bytes" if isinstance(source, bytes) else str(source)
    try:
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except UNREADABLE as error:
        raise ValueError(f"{name} must be a .npy file of numbers; objects are never unpickled: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be a .npy file of one array, got a .npz file")
    return array


def check_numbers(array: np.ndarray) -> None:
    """Raises ValueError unless an array has real numbers that are finite, and integers that float64 holds exactly.

    Example:
        >>> import numpy as np
        >>> check_numbers(np.array([1.0, np.nan]))
        Traceback (most recent call last):
            ...
        ValueError: arrays must be finite, got nan at (1,)
    """
    if array.dtype.kind not in "fiu":
        raise ValueError(f"arrays must hold real numbers, got {array.dtype}")
    wrong = ~np.isfinite(array) if array.dtype.kind == "f" else np.zeros(array.shape, dtype=bool)
    if array.dtype.kind != "f" and array.dtype.itemsize == 8:
        wrong = (array > _LARGEST_INTEGER) | (array < -_LARGEST_INTEGER if array.dtype.kind == "i" else False)
    if wrong.any():
        place = tuple(map(int, np.argwhere(wrong)[0]))
        kind = "finite" if array.dtype.kind == "f" else "at most 2^53 in size, as float64 holds them"
        raise ValueError(f"arrays must be {kind}, got {array[place]} at {place}")


def read_array(source: object, layout: ArrayLayout) -> np.ndarray:
    """One array of a data set in the model's order of axes.

    Args:
        source: A row's value: nested lists, or `{"path": ..., "bytes": ...}` of a `.npy` file.
        layout: Order of its axes: `"chw"`, `"hwc"`, or `"hw"` for one channel without an axis of its own.

    Returns:
        (channels, height, width) float64.

    Raises:
        ValueError: If it has other axes, or holds anything but finite real numbers.

    Example:
        >>> read_array([[[1, 2, 3]]], "hwc").shape
        (3, 1, 1)
    """
    if isinstance(source, dict):
        content = source.get("bytes")
        array = load_array(source["path"] if content is None else content)
    else:
        try:
            array = np.asarray(source)
        except ValueError as error:
            raise ValueError("an array must be nested lists of one length each") from error
    check_numbers(array)
    if array.ndim != len(layout) or array.size == 0:
        raise ValueError(f"array_layout={layout!r} needs arrays of {len(layout)} axes, got the shape {array.shape}")
    array = array.astype(np.float64)
    return array[None] if layout == "hw" else array if layout == "chw" else array.transpose(2, 0, 1)


def describe(
    sources: Iterable[tuple[str, object]],
    layout: ArrayLayout,
    value_mean: Sequence[float] = (),
    value_scale: Sequence[float] = (),
    *,
    skip_bad: bool = False,
) -> Arrays:
    """Reads all arrays once: their shape and, where not given, mean and standard deviation of each channel.

    Args:
        sources: Each with its name for messages.
        layout: Order of their axes.
        value_mean: What to subtract from each channel; empty: the mean.
        value_scale: What to divide it by; empty: the standard deviation.
        skip_bad: Whether one that cannot be read, or has not the shape of the first, is left out; else it is an error.

    Raises:
        ValueError: If there is none, one cannot be read or differs in shape, or a channel has one value everywhere.

    Example:
        >>> describe([("first", [[0.0, 2.0]]), ("second", [[4.0, 6.0]])], "hw").value_mean
        (3.0,)
    """
    shape: tuple[int, ...] | None = None
    moments: list[tuple[np.ndarray, np.ndarray]] = []
    lowest, highest = np.array(np.inf), np.array(-np.inf)  # of each channel
    for name, source in sources:
        try:
            array = read_array(source, layout)
            if shape is not None and array.shape != shape:
                raise ValueError(f"arrays must all have the shape {shape} of the first one, got {array.shape}")
        except (OSError, ValueError) as error:
            if skip_bad:
                continue
            raise ValueError(f"{name}: {error}") from error
        shape = array.shape
        if not value_scale:
            with np.errstate(over="ignore", invalid="ignore"):
                moments.append((array.mean((1, 2)), array.var((1, 2))))
        lowest, highest = np.minimum(lowest, array.min((1, 2))), np.maximum(highest, array.max((1, 2)))
    if shape is None:
        raise ValueError("data must have at least one array" + " that can be read" * skip_bad)
    mean, scale = list(value_mean), list(value_scale)
    if not value_scale:
        constant = np.flatnonzero(np.broadcast_to(lowest == highest, shape[0])).tolist()
        if constant:
            raise ValueError(
                f"channel {constant[0]} of the arrays has the same value everywhere: leave it out, or give value_scale"
            )
        mean, scale = _mean_and_deviation(moments)
    if len(mean) != shape[0] or len(scale) != shape[0]:
        raise ValueError(
            f"value_mean and value_scale must have a number for each of {shape[0]} channels, got {len(mean)} and "
            f"{len(scale)}"
        )
    arrays = Arrays(layout, (shape[0], shape[1], shape[2]), tuple(mean), tuple(scale))
    arrays.scaled(np.stack((lowest, highest), axis=1)[..., None])  # raises where these leave float32
    return arrays


def _mean_and_deviation(moments: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[float], list[float]]:
    """Those of each channel over all arrays, from the mean and the variance of each channel of each array."""
    means, variances = (np.stack(numbers) for numbers in zip(*moments, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        mean, scale = means.mean(0), np.sqrt(variances.mean(0) + means.var(0))
    lost = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(scale) & (scale > 0)))
    if lost.size:
        raise ValueError(
            f"channel {lost[0]} of the arrays has squares that float64 does not hold (mean {mean[lost[0]]}, deviation "
            f"{scale[lost[0]]}): give value_mean and value_scale"
        )
    return mean.tolist(), scale.tolist()


def to_data_units(values: torch.Tensor, config: TarFlowConfig) -> torch.Tensor:
    """What a model of arrays gives, in the units of its data: v = x value_scale + value_mean.

    Args:
        values: (arrays, channels, height, width) in the model's units.
        config: The configuration of a model of arrays.

    Returns:
        The same shape in float64, as a narrower number would lose what is small beside `value_mean`; on the CPU where
        the device has no float64 (MPS).

    Example:
        >>> config = TarFlowConfig(image_size=2, num_channels=1, value_mean=[100.0], value_scale=[50.0])
        >>> to_data_units(torch.zeros(1, 1, 2, 2), config).unique()
        tensor([100.], dtype=torch.float64)
    """
    values, mean, scale = _scaling(values, config)
    return values * scale + mean


def to_model_units(values: torch.Tensor, config: TarFlowConfig) -> torch.Tensor:
    """Data as a model of arrays takes them, x = (v - value_mean) / value_scale; undoes [`to_data_units`].

    Args:
        values: (arrays, channels, height, width) in the units of the data.
        config: The configuration of a model of arrays.

    Returns:
        The same shape and dtype, computed in float64.

    Example:
        >>> config = TarFlowConfig(image_size=2, num_channels=1, value_mean=[100.0], value_scale=[50.0])
        >>> to_model_units(torch.full((1, 1, 2, 2), 150.0), config).unique()
        tensor([1.])
    """
    exact, mean, scale = _scaling(values, config)
    return ((exact - mean) / scale).to(values)


def _scaling(values: torch.Tensor, config: TarFlowConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, mean and scale in float64, on one device."""
    if config.value_mean is None or config.value_scale is None:
        raise ValueError("the model has no value_mean and value_scale: it is one of images")
    if not values.is_floating_point() or values.ndim != 4 or values.shape[1] != config.num_channels:
        raise ValueError(
            f"arrays must be (arrays, channels={config.num_channels}, height, width) of floating point, "
            f"got {tuple(values.shape)} of {values.dtype}"
        )
    exact = in_float64(values)
    mean, scale = (exact.new_tensor(numbers).view(-1, 1, 1) for numbers in (config.value_mean, config.value_scale))
    return exact, mean, scale


def shown(values: torch.Tensor) -> torch.Tensor:
    """What arrays look like as pixel values: black to white is three deviations below the mean to three above.

    Three channels are shown as red, green and blue; of any other number the first one as grey.

    Args:
        values: (arrays, channels, height, width) in the model's units.

    Returns:
        (arrays, 1 or 3, height, width), about [-1, 1].

    Raises:
        ValueError: If the values have other axes.

    Example:
        >>> shown(torch.full((2, 5, 8, 8), 3.0)).unique(), shown(torch.zeros(2, 5, 8, 8)).shape
        (tensor([1.]), torch.Size([2, 1, 8, 8]))
    """
    if values.ndim != 4:
        raise ValueError(f"arrays must be (arrays, channels, height, width) to be shown, got {tuple(values.shape)}")
    return (values if values.shape[1] == 3 else values[:, :1]) / SHOWN_DEVIATIONS


__all__ = [
    "SHOWN_DEVIATIONS",
    "ArrayFormat",
    "Arrays",
    "check_numbers",
    "describe",
    "format_of",
    "load_array",
    "read_array",
    "shown",
    "to_data_units",
    "to_model_units",
]

"""Pictures of a training run: grids of images and curves of metrics, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

_DPI = 100
_LABEL_WIDTH = 100  # pixels for the row labels
_GAP = 2  # pixels between images


def save_image_grid(
    images: Sequence[Image.Image],
    path: str | Path,
    *,
    columns: int,
    row_labels: Sequence[str] | None = None,
    min_side: int = 64,
) -> None:
    """Writes images row by row as one PNG, every pixel a square of whole screen pixels.

    Args:
        images: Images of one size, filling row after row from the left; the last row may be shorter.
        path: PNG file to write.
        columns: Images in a row.
        row_labels: Text left of each row.
        min_side: Small images are enlarged by a whole factor until they have this side, in pixels.

    Raises:
        ValueError: If there is no image, or the images or row labels do not fit the grid.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs at least one image and one column, got {len(images)} and columns={columns}")
    rows = -(-len(images) // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"row_labels must name {rows} rows, got {len(row_labels)}")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"images must have one size, got {sorted({image.size for image in images})}")
    factor = max(1, -(-min_side // images[0].width))
    width, height = images[0].width * factor + _GAP, images[0].height * factor + _GAP
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        enlarged = image.resize((width - _GAP, height - _GAP), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % columns * width, index // columns * height))
    if row_labels is None:
        sheet.save(path, format="PNG")
    else:
        _save_labelled(sheet, path, row_labels)


def _save_labelled(sheet: Image.Image, path: str | Path, row_labels: Sequence[str]) -> None:
    width = sheet.width + _LABEL_WIDTH
    figure = Figure(figsize=(width / _DPI, sheet.height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.figimage(np.array(sheet), xo=_LABEL_WIDTH, yo=0)
    for row, label in enumerate(row_labels):
        height = 1 - (row + 0.5) / len(row_labels)
        x = (_LABEL_WIDTH - 8) / width
        text = label if len(label) <= 14 else f"{label[:13]}…"
        figure.text(x, height, text, ha="right", va="center", fontsize=9, parse_math=False)
    figure.savefig(path, format="png", dpi=_DPI)


def save_curve(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, *, ylabel: str, title: str
) -> None:
    """Writes curves over optimizer steps as one PNG.

    The vertical range leaves out what is far above the rest, such as the first steps of a training.

    Args:
        curves: By the name in the legend, steps and values; non-finite values leave a gap.
        path: PNG file to write.
        ylabel: Quantity and unit of the values.
        title: Title of the picture.

    Raises:
        ValueError: If no curve has a finite value.
    """
    values = np.concatenate([np.asarray(curve[1], dtype=float) for curve in curves.values()] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("a curve needs at least one finite value")
    figure = Figure(figsize=(8, 5), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (steps, curve) in curves.items():
        axes.plot(steps, curve, label=name, marker="o" if len(steps) < 30 else None, markersize=3)
    low, high = values.min(), np.quantile(values, 0.95)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="optimizer steps", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


__all__ = ["save_curve", "save_image_grid"]

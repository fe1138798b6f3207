"""Pictures as PNG files, by matplotlib: grids of images, the way of samples through the blocks, curves of metrics."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tarflow_hf.configuration_tarflow import NoiseType
from tarflow_hf.images.extras import installed_by
from tarflow_hf.images.processing import as_shown, to_levels

with installed_by("train", "eval"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import IdentityTransform

_DPI = 100
_GAP = 2  # pixels between images
_MARGIN = 8  # pixels on both sides of the row labels
_LINE = 1.2  # height of a line of text, in font sizes
_LETTER = 0.6  # width of a letter, roughly, in font sizes
_ROW_LETTERS = 24  # a longer row label goes on in the next line

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""By the name in the legend, horizontal and vertical coordinates; non-finite values leave a gap."""


def save_image_grid(
    images: Sequence[Image.Image],
    path: str | Path,
    *,
    columns: int,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    min_side: int = 64,
) -> None:
    """Writes images row by row as one PNG, every pixel a square of whole screen pixels.

    Labels grow with the images. What does not fit into a cell's height or width is cut, with an ellipsis.

    Args:
        images: Images of one size, filling row after row from the left; the last row may be shorter.
        path: PNG file to write.
        columns: Images in a row.
        row_labels: Text left of each row.
        column_labels: Text above each column.
        min_side: Small images are enlarged by a whole factor until their shorter side is this, in pixels.

    Raises:
        ValueError: If there is no image, or the images or labels do not fit the grid.

    Example:
        >>> from PIL import Image
        >>> greys = [Image.new("L", (8, 8), 40 * level) for level in range(6)]
        >>> save_image_grid(greys, "grid.png", columns=3, row_labels=["dark", "light"])
        >>> with Image.open("grid.png") as grid:
        ...     print(grid.format, grid.height)
        PNG 132
    """
    if not (isinstance(images, list | tuple) and all(isinstance(image, Image.Image) for image in images)):
        raise ValueError(f"images must be a list of Pillow's, as a pipeline gives them, got {type(images).__name__}")
    if not images or columns < 1:
        raise ValueError(f"a grid needs at least one image and one column, got {len(images)} and columns={columns}")
    rows = -(-len(images) // columns)
    for name, labels, count in [("row", row_labels, rows), ("column", column_labels, columns)]:
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name}_labels must name {count} {name}s, got {len(labels)}")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"images must have one size, got {sorted({image.size for image in images})}")
    factor = max(1, -(-min_side // min(images[0].size)))
    width, height = images[0].width * factor + _GAP, images[0].height * factor + _GAP
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        enlarged = image.resize((width - _GAP, height - _GAP), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % columns * width, index // columns * height))
    if row_labels is None and column_labels is None:
        sheet.save(path, format="PNG")
    else:
        _save_labelled(sheet, path, (width, height), row_labels or [], column_labels or [])


def _save_labelled(
    sheet: Image.Image,
    path: str | Path,
    cell: tuple[int, int],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> None:
    """Writes a sheet of cells with text left of its rows and above its columns."""
    width, height = cell
    font = max(12.0, height / 10)  # pixels
    figure = Figure(dpi=_DPI)
    canvas = FigureCanvasAgg(figure)

    def write(label: str, letters: int, lines: int) -> Text:
        text = Text(text=_wrapped(label, letters, lines), fontsize=font * 72 / _DPI, linespacing=_LINE)
        text.set_parse_math(False)
        figure.add_artist(text)
        text.set_transform(IdentityTransform())
        return text

    rows = [write(label, _ROW_LETTERS, max(1, int(height / (_LINE * font)))) for label in row_labels]
    heads = [write(label, max(1, int(width / (_LETTER * font))), 3) for label in column_labels]
    sizes = [text.get_window_extent(canvas.get_renderer()) for text in rows + heads]
    left = max((round(size.width) + 2 * _MARGIN for size in sizes[: len(rows)]), default=0)
    top = max((round(size.height + font / 2) for size in sizes[len(rows) :]), default=0)
    for index, text in enumerate(rows):
        text.set(ha="right", va="center")
        text.set_position((left - _MARGIN, sheet.height - (index + 0.5) * height + _GAP / 2))
    for index, text in enumerate(heads):
        text.set(ha="center", va="baseline")
        text.set_position((left + (index + 0.5) * width - _GAP / 2, sheet.height + 0.4 * font))
    figure.set_size_inches((left + sheet.width) / _DPI, (top + sheet.height) / _DPI)
    figure.figimage(np.array(sheet), xo=left, yo=0)
    figure.savefig(path, format="png", dpi=_DPI)


def _wrapped(text: str, letters: int, lines: int) -> str:
    """Text in lines of at most so many letters; line breaks of its own stay, what is beyond the last line is cut."""
    broken = [line for part in text.splitlines() for line in textwrap.wrap(part, letters)]
    if len(broken) > lines:
        broken = [*broken[: lines - 1], f"{broken[lines - 1][: letters - 1]}…"]
    return "\n".join(broken)


def save_trace(
    states: Sequence[torch.Tensor],
    path: str | Path,
    *,
    num_blocks: int,
    row_labels: Sequence[str] | None = None,
    min_side: int = 96,
    noise_type: NoiseType = "gaussian",
    unit: float = 1.0,
) -> None:
    """Writes the way of samples from noise to image: a row for each sample, a column for each state.

    Before the last block values are on the scale of latents: 0 is shown as middle grey, and black and white stand for
    -r and r, where r, written above the column, is the size that 99 % of its values stay below. The image that the
    last block makes and the denoised one are shown as they are saved, clipped to [-1, 1].

    Args:
        states: Noise, what each block makes of it, and what each denoising step makes of that, all (samples, channels,
            height, width), as `model.unpatchify` gives them. Of the denoising steps the last one is shown.
        path: PNG file to write.
        num_blocks: Blocks of the model, at least 1.
        row_labels: Text left of each sample.
        min_side: As in [`save_image_grid`].
        noise_type: Noise that the model was trained with, by which its images are read.
        unit: What 1 in the states stands for, by which ranges are told: `SHOWN_DEVIATIONS` for pictures of arrays.

    Raises:
        ValueError: If states are too few for the blocks, or of other shapes than images, or labels do not fit.

    Reference: arXiv 2412.06329 (sampling trajectories).

    Example:
        >>> from pathlib import Path
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model, latents = TarFlowModel(config).eval(), torch.randn(1, config.num_tokens, config.patch_dim)
        >>> states = [latents, *(patches for patches, _ in model.decode_blocks(latents))]
        >>> save_trace([model.unpatchify(state) for state in states], "trace.png", num_blocks=config.num_blocks)
        >>> Path("trace.png").exists()
        True
    """
    shapes = {tuple(state.shape) for state in states}
    if num_blocks < 1 or len(states) <= num_blocks:
        raise ValueError(f"states must be noise and the result of num_blocks={num_blocks} blocks, got {len(states)}")
    if len(shapes) > 1 or any(len(shape) != 4 or shape[1] not in (1, 3) for shape in shapes):
        raise ValueError(f"states must have one shape (samples, 1 or 3, height, width), got {sorted(shapes)}")
    columns = []
    names = ["noise", *(f"after block {block}" for block in range(num_blocks - 1, 0, -1))]
    for name, state in zip(names, states, strict=False):
        limit = float(np.quantile(state.detach().abs().float().cpu().numpy(), 0.99)) or 1.0
        columns.append((f"{name}\n±{limit * unit:.1f}", state / limit))
    columns.append((f"image\n±{unit:g}", as_shown(states[num_blocks], noise_type)))
    columns += [(f"denoised\n±{unit:g}", state) for state in states[num_blocks + 1 :][-1:]]
    save_image_grid(
        [picture for row in zip(*(_pictures(state) for _, state in columns), strict=True) for picture in row],
        path,
        columns=len(columns),
        row_labels=row_labels,
        column_labels=[name for name, _ in columns],
        min_side=min_side,
    )


def _pictures(pixel_values: torch.Tensor) -> list[Image.Image]:
    """(batch, 1 or 3, height, width) pixels in [-1, 1] as images."""
    levels = to_levels(pixel_values.detach().cpu()).movedim(1, 3).squeeze(3).numpy()
    return [Image.fromarray(image) for image in levels]


def save_curve(
    curves: Curves,
    path: str | Path,
    *,
    ylabel: str,
    title: str,
    xlabel: str = "optimizer steps",
    shown_share: float = 1.0,
    logarithmic: bool = False,
) -> None:
    """Writes curves as one PNG, with a marker at each point where the points are few.

    Args:
        curves: See [`Curves`].
        path: PNG file to write.
        ylabel: Quantity and unit of the values.
        title: Title of the picture.
        xlabel: Quantity and unit of the horizontal axis.
        shown_share: Share of the values that the vertical range is made for, from the lowest, in (0, 1]; below 1 it
            leaves out what is far above the rest, such as the first steps of a training.
        logarithmic: Whether both axes are, so that powers are straight lines; all coordinates are positive then.

    Raises:
        ValueError: If no curve has a finite value, or one that is not positive and `logarithmic`.

    Example:
        >>> from pathlib import Path
        >>> loss = {"training": ([10, 20, 30], [0.9, 0.7, 0.6]), "held out": ([10, 30], [0.9, 0.7])}
        >>> save_curve(loss, "curve.png", ylabel="loss, nats per dimension", title="digits")
        >>> Path("curve.png").exists()
        True
    """
    values = np.concatenate([np.asarray(curve[1], dtype=float) for curve in curves.values()] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("a curve needs at least one finite value")
    if logarithmic and values.min() <= 0:
        raise ValueError(f"logarithmic axes need positive values, got {values.min()}")
    figure = Figure(figsize=(8, 5), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=4)
    low, high = values.min(), np.quantile(values, shown_share)
    if logarithmic:
        axes.set(xscale="log", yscale="log", ylim=(low / 1.2, high * 1.2))
    else:
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def save_reliability(
    confidence: Sequence[float], accuracy: Sequence[float], count: Sequence[int], path: str | Path, *, title: str
) -> None:
    """Writes a reliability diagram: share of right predictions against the probability they were given.

    Args:
        confidence: Mean probability of the predicted class in each bin.
        accuracy: Share of right predictions in it.
        count: Predictions in it, written beside the point; bins without any are left out.
        path: PNG file to write.
        title: Title of the picture.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.metrics.posterior import calibration
        >>> found = calibration(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]), num_bins=4)
        >>> bins = (found.bin_confidence, found.bin_accuracy, found.bin_count)
        >>> save_reliability(*bins, "calibration.png", title="two images")
        >>> Path("calibration.png").exists()
        True
    """
    figure = Figure(figsize=(5, 5), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    filled = [point for point in zip(confidence, accuracy, count, strict=True) if point[2]]
    axes.plot([x for x, _, _ in filled], [y for _, y, _ in filled], marker="o", label="model")
    for x, y, number in filled:
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set(xlabel="probability of the predicted class", ylabel="share of right predictions")
    axes.set_title(title, parse_math=False)
    axes.set(xlim=(0, 1.05), ylim=(0, 1.1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


__all__ = ["Curves", "save_curve", "save_image_grid", "save_reliability", "save_trace"]

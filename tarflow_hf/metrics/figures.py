"""Figures of measurements, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tarflow_hf.posterior import Calibration


def save_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Writes lines with a marker at each point.

    Args:
        lines: By the name in the legend, horizontal and vertical coordinates; non-finite ones leave a gap.
        path: PNG file to write.
        xlabel: Quantity and unit of the horizontal axis.
        ylabel: Quantity and unit of the vertical axis.
        title: Title of the picture.
    """
    figure = Figure(figsize=(7, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (x, y) in lines.items():
        axes.plot(x, y, marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def save_reliability(calibration: Calibration, path: str | Path, *, title: str) -> None:
    """Writes a reliability diagram: share of right predictions against the probability they were given.

    Args:
        calibration: What was measured.
        path: PNG file to write.
        title: Title of the picture.
    """
    figure = Figure(figsize=(5, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    bins = zip(calibration.bin_confidence, calibration.bin_accuracy, calibration.bin_count, strict=True)
    filled = [(confidence, accuracy, count) for confidence, accuracy, count in bins if count]
    confidence, accuracy, count = zip(*filled, strict=True)
    axes.plot(confidence, accuracy, marker="o", label="model")
    for x, y, number in filled:
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set(xlabel="probability of the predicted class", ylabel="share of right predictions", title=title)
    axes.set(xlim=(0, 1.05), ylim=(0, 1.1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


__all__ = ["save_lines", "save_reliability"]

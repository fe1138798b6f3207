"""Grids show every image where it belongs; curves are written and refuse to show nothing."""

import math

import numpy as np
import pytest
from PIL import Image

from tarflow_hf.plotting import save_curve, save_image_grid


def grey(level, side=2):
    return Image.new("L", (side, side), level)


def test_images_fill_row_after_row(tmp_path):
    save_image_grid([grey(0), grey(100), grey(200)], tmp_path / "grid.png", columns=2, min_side=4)
    sheet = np.array(Image.open(tmp_path / "grid.png").convert("L"))
    assert sheet.shape == (12, 12)  # two images of 4 pixels and their gaps each way
    assert (sheet[:4, :4] == 0).all()
    assert (sheet[:4, 6:10] == 100).all()
    assert (sheet[6:10, :4] == 200).all()
    assert (sheet[6:10, 6:] == 255).all()


def test_row_labels_stand_left_of_their_row_and_leave_the_images_exact(tmp_path):
    images = [grey(level, 64) for level in (10, 20, 30, 40)]
    save_image_grid(images, tmp_path / "plain.png", columns=2)
    save_image_grid(images, tmp_path / "labelled.png", columns=2, row_labels=["$no math$", "a very long class name"])
    plain = np.array(Image.open(tmp_path / "plain.png").convert("L"))
    labelled = np.array(Image.open(tmp_path / "labelled.png").convert("L"))
    margin = labelled.shape[1] - plain.shape[1]
    assert np.array_equal(labelled[:, margin:], plain)
    upper, lower = labelled[:66, :margin], labelled[66:, :margin]
    assert upper.min() < 100
    assert lower.min() < 100


def test_the_same_grid_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        save_image_grid([grey(7)], tmp_path / name, columns=1, row_labels=["x"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {"columns": 1}, "at least one image"),
        ([grey(0)], {"columns": 0}, "columns=0"),
        ([grey(0), grey(0, 3)], {"columns": 2}, "must have one size"),
        ([grey(0)], {"columns": 1, "row_labels": ["a", "b"]}, "must name 1 rows, got 2"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(tmp_path, images, options, message):
    with pytest.raises(ValueError, match=message):
        save_image_grid(images, tmp_path / "grid.png", **options)


def test_curves_are_drawn_around_gaps(tmp_path):
    curves = {"train": ([1, 2, 3], [9.0, math.nan, 7.0]), "held out": ([3], [7.5])}
    save_curve(curves, tmp_path / "curve.png", ylabel="bits per dimension", title="digits")
    drawn = np.array(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert drawn.shape == (500, 800, 3)
    assert drawn.std() > 5


def test_a_curve_without_values_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finite value"):
        save_curve({"train": ([1], [math.nan])}, tmp_path / "curve.png", ylabel="y", title="t")

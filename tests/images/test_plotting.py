"""Grids and traces show every image where it belongs; curves are written and refuse to show nothing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_hf.images.plotting import save_curve, save_image_grid, save_reliability, save_trace
from tarflow_hf.images.processing import to_levels


def grey(level, side=2):
    return Image.new("L", (side, side), level)


def levels_of(path):
    return np.array(Image.open(path).convert("L"))


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


def test_column_labels_stand_above_their_column_and_leave_the_images_exact(tmp_path):
    images = [grey(level, 64) for level in (10, 20)]
    save_image_grid(images, tmp_path / "plain.png", columns=2)
    save_image_grid(images, tmp_path / "labelled.png", columns=2, column_labels=["guidance 1", "2"], row_labels=["a"])
    plain, labelled = (levels_of(tmp_path / f"{name}.png") for name in ("plain", "labelled"))
    head, margin = (large - small for large, small in zip(labelled.shape, plain.shape, strict=True))
    assert np.array_equal(labelled[head:, margin:], plain)
    left, right = labelled[:head, margin : margin + 64], labelled[:head, margin + 66 :]
    assert left.min() < 100
    assert right.min() < 100
    assert (left < 100).sum() > 3 * (right < 100).sum()  # the longer text


@pytest.mark.parametrize("side", [8, 64, 256])
def test_no_label_is_cut_off_by_the_border_of_the_picture(tmp_path, side):
    names = ["dishwasher, dish washer, dishwashing machine", "face_with_tears_of_joy_" * 20]
    save_image_grid(
        [grey(0, side)] * 2, tmp_path / "grid.png", columns=1, row_labels=names, column_labels=["a long " * 9]
    )
    sheet = levels_of(tmp_path / "grid.png")
    size = max(side, 64)
    assert sheet.shape[1] < 3 * 64 + 3 * size  # long names take more lines, not all of the width
    assert (sheet[0] == 255).all()
    assert (sheet[:, 0] == 255).all()


def test_labels_grow_with_the_images(tmp_path):
    for side in (64, 320):
        save_image_grid([grey(0, side)], tmp_path / f"{side}.png", columns=1, row_labels=["tabby"])
    small, large = (levels_of(tmp_path / f"{side}.png").shape[1] - side - 2 - 16 for side in (64, 320))
    assert large == pytest.approx(32 / 12 * small, abs=3)


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
        ([grey(0)], {"columns": 1, "row_labels": ["a", "b"]}, "row_labels must name 1 rows, got 2"),
        ([grey(0)], {"columns": 1, "column_labels": []}, "column_labels must name 1 columns, got 0"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(tmp_path, images, options, message):
    with pytest.raises(ValueError, match=message):
        save_image_grid(images, tmp_path / "grid.png", **options)


def states(count, channels=1, side=4, samples=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, channels, side, side, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_trace_shows_latents_on_their_own_scale_and_images_as_they_are_saved(tmp_path, channels):
    noise, middle, image, first_step, denoised = given = states(5, channels)
    save_trace(given, tmp_path / "trace.png", num_blocks=2, min_side=4)
    sheet = np.array(Image.open(tmp_path / "trace.png").convert("RGB"))
    cells = sheet[sheet.shape[0] - 2 * 6 :]
    assert cells.shape == (12, 24, 3)  # the first of the denoising steps is left out
    scaled = [state / np.quantile(state.abs().numpy(), 0.99) for state in (noise, middle)]
    for column, state in enumerate([*scaled, image, denoised]):
        for row in range(2):
            expected = to_levels(state[row]).expand(3, 4, 4).movedim(0, 2).numpy()
            assert np.array_equal(cells[row * 6 :][:4, column * 6 :][:, :4], expected)


def test_a_trace_tells_ranges_in_its_unit(tmp_path):
    given = [torch.full((1, 1, 4, 4), 6.0), torch.zeros(1, 1, 4, 4)]
    for name, states_of_it, unit in (("a", given, 1.0), ("b", [state / 3 for state in given], 3.0), ("c", given, 3.0)):
        save_trace(states_of_it, tmp_path / f"{name}.png", num_blocks=1, unit=unit)
    heads = {name: levels_of(tmp_path / f"{name}.png")[:-100] for name in "abc"}
    half = heads["a"].shape[1] // 2
    assert np.array_equal(heads["a"][:, :half], heads["b"][:, :half])  # 6.0 in both
    assert not np.array_equal(heads["a"][:, :half], heads["c"][:, :half])  # 18.0
    assert not np.array_equal(heads["a"][:, half:], heads["b"][:, half:])  # the image: 1 and 3


def test_a_trace_without_denoising_ends_with_the_image(tmp_path):
    given = states(3)
    save_trace(given, tmp_path / "trace.png", num_blocks=2, row_labels=["a", "b"], min_side=4)
    cells = levels_of(tmp_path / "trace.png")[-12:, -18:]
    assert np.array_equal(cells[:4, 12:16], to_levels(given[2])[0, 0].numpy())


def test_a_trace_of_zeros_is_grey(tmp_path):
    save_trace([torch.zeros(1, 1, 4, 4)] * 2, tmp_path / "trace.png", num_blocks=1, min_side=4)
    assert (levels_of(tmp_path / "trace.png")[-6:-2, :4] == 128).all()


@pytest.mark.parametrize(
    ("given", "num_blocks", "message"),
    [
        ([], 1, "num_blocks=1 blocks, got 0"),
        (states(2), 2, "num_blocks=2 blocks, got 2"),
        (states(2), 0, "num_blocks=0"),
        ([*states(1), *states(1, side=2)], 1, "must have one shape"),
        (states(2, channels=2), 1, "1 or 3"),
        ([state[0] for state in states(2)], 1, "must have one shape"),
    ],
)
def test_states_that_make_no_trace_are_refused(tmp_path, given, num_blocks, message):
    with pytest.raises(ValueError, match=message):
        save_trace(given, tmp_path / "trace.png", num_blocks=num_blocks)
    assert not (tmp_path / "trace.png").exists()


def test_curves_are_drawn_around_gaps(tmp_path):
    curves = {"train": ([1, 2, 3], [9.0, math.nan, 7.0]), "held out": ([3], [7.5])}
    save_curve(curves, tmp_path / "curve.png", ylabel="bits per dimension", title="digits")
    drawn = np.array(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert drawn.shape == (500, 800, 3)
    assert drawn.std() > 5


def test_the_range_of_a_curve_may_leave_out_its_highest_values(tmp_path):
    curve = {"train": (range(100), [1000.0, 900.0, *np.linspace(3, 2, 98)])}
    for share in (1.0, 0.9):
        save_curve(curve, tmp_path / f"{share}.png", ylabel="y", title="t", shown_share=share)
    blue = [
        (np.array(Image.open(tmp_path / f"{share}.png").convert("RGB")) == (31, 119, 180)).all(-1)
        for share in (1.0, 0.9)
    ]
    rows = [np.flatnonzero(drawn[:, 300:700].any(1)) for drawn in blue]  # of the falling part
    assert np.ptp(rows[0]) < 10
    assert np.ptp(rows[1]) > 100


def test_a_curve_without_values_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finite value"):
        save_curve({"train": ([1], [math.nan])}, tmp_path / "curve.png", ylabel="y", title="t")
    with pytest.raises(ValueError, match=r"logarithmic axes need positive values, got -1\.0"):
        save_curve({"a": ([1, 2], [-1, 2])}, tmp_path / "curve.png", ylabel="y", title="t", logarithmic=True)


def test_a_power_is_a_straight_line_on_logarithmic_axes(tmp_path):
    lengths = [2**power for power in range(2, 9)]
    bends = {}
    for name, logarithmic in (("straight", True), ("bent", False)):
        squares = {"a": (lengths, [length**2 for length in lengths])}
        save_curve(squares, tmp_path / f"{name}.png", ylabel="y", title="t", logarithmic=logarithmic)
        levels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        blue = levels[..., 2] - levels[..., 0] > 90
        blue[: len(blue) // 5] = False  # the line beside its name
        columns = np.flatnonzero(blue.any(0))
        heights = np.array([np.flatnonzero(blue[:, column]).mean() for column in columns])
        slope, start = np.polyfit(columns, heights, 1)
        bends[name] = np.abs(heights - slope * columns - start).max()
    assert bends["straight"] < 8 < 30 < bends["bent"]  # pixels; a marker is some six high


def test_a_reliability_diagram_leaves_out_empty_bins(tmp_path):
    full = ([0.5, 0.9], [0.4, 1.0], [3, 7])
    with_empty = ([math.nan, 0.5, 0.9], [math.nan, 0.4, 1.0], [0, 3, 7])
    save_reliability(*full, tmp_path / "full.png", title="digits")
    save_reliability(*with_empty, tmp_path / "empty.png", title="digits")
    assert np.array_equal(levels_of(tmp_path / "full.png"), levels_of(tmp_path / "empty.png"))

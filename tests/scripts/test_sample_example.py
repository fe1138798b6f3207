"""examples/sample.py: the grid of samples and the trace of how they came about."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from inverse_models import tiny_inverse
from PIL import Image

from examples import sample
from tarflow_hf import TarFlowPipeline


@pytest.fixture
def folder(tmp_path, request):
    """A saved pipeline of three blocks on 8x8 pixels."""
    pipe = TarFlowPipeline(transformer=tiny_model(dtype=torch.float32, **getattr(request, "param", {})))
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def levels_of(path):
    return np.array(Image.open(path).convert("L"))


def last_column(sheet, side, rows):
    """The images in the last column of a sheet."""
    cells = sheet[-rows * (side + 2) :, -side - 2 : -2]
    return cells.reshape(rows, side + 2, side)[:, :side]


@pytest.mark.parametrize("strength", ["0", "1"])
def test_a_trace_ends_with_the_first_image_of_each_row(folder, tmp_path, strength):
    options = ["--num_images_per_label", "2", "--class_labels", "LABEL_1", "LABEL_3", "--denoising_strength", strength]
    sample.main([str(folder), *options, "--trace", str(tmp_path / "new" / "trace.png")])
    grid, trace = levels_of(folder / "samples.png"), levels_of(tmp_path / "new" / "trace.png")
    first = grid[:, -2 * 66 : -66 - 2].reshape(2, 66, 64)[:, :64:8, ::8]
    assert np.array_equal(last_column(trace, 96, 2)[:, ::12, ::12], first)
    columns = 4 + (strength == "1")  # noise, two blocks and the image
    assert columns * 98 < trace.shape[1] < (columns + 1) * 98


@pytest.mark.parametrize("folder", [{"num_classes": 0}], indirect=True)
def test_a_model_without_classes_has_rows_without_names(folder, tmp_path):
    output = tmp_path / "grid.png"
    sample.main(
        [str(folder), "--num_images_per_label", "1", "--output", str(output), "--trace", str(tmp_path / "t.png")]
    )
    assert levels_of(output).shape == (20 * 66, 66)
    assert levels_of(tmp_path / "t.png").shape[1] == 5 * 98
    assert not (folder / "samples.png").exists()


def test_a_trace_changes_nothing_about_the_samples(folder, tmp_path):
    for name, options in {"plain": [], "traced": ["--trace", str(tmp_path / "t.png")]}.items():
        sample.main([str(folder), "--num_images_per_label", "1", "--output", str(tmp_path / name), *options])
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "traced").read_bytes()


def test_the_temperature_scales_the_latents(folder, tmp_path):
    pictures = {}
    for temperature in ("1", "0.5", "1e-9"):
        output = tmp_path / f"{temperature}.png"
        options = ["--num_images_per_label", "2", "--class_labels", "LABEL_1", "--denoising_strength", "0"]
        sample.main([str(folder), *options, "--temperature", temperature, "--output", str(output)])
        pictures[temperature] = levels_of(output)
    first, second = (pictures["1e-9"][:, -2 * 66 + 66 * column : -66 + 66 * column or None] for column in (0, 1))
    assert np.array_equal(first[:, :-2], second[:, :-2])  # the latents of all seeds are 0
    assert not np.array_equal(pictures["1"], pictures["0.5"])
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0.0"):
        sample.main([str(folder), "--temperature", "0"])


def test_the_decoder_of_a_learned_inverse_is_an_option(tmp_path):
    flow = tiny_model(dtype=torch.float32)
    TarFlowPipeline(transformer=flow, inverse=tiny_inverse(flow)).save_pretrained(tmp_path)
    sample.main(
        [str(tmp_path), "--decoder", "one_pass", "--num_images_per_label", "2", "--output", str(tmp_path / "one.png")]
    )
    assert (tmp_path / "one.png").is_file()
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path), "--decoder", "one_pass", "--trace", str(tmp_path / "trace.png")])


@pytest.mark.parametrize(
    ("count", "ids"), [(0, None), (1, [0]), (20, [*range(20)]), (21, [*range(0, 21, 2)]), (60, [*range(0, 60, 3)])]
)
def test_rows_are_spread_over_the_classes(count, ids):
    config = tiny_model(num_classes=count).config
    assert sample.shown_classes(config) == (None if ids is None else [f"LABEL_{number}" for number in ids])


def test_classes_are_asked_for_by_name_or_id(folder, tmp_path):
    """Below the names of the rows, which are what was asked for."""
    for name, label in {"name": "LABEL_2", "id": "2"}.items():
        sample.main(
            [str(folder), "--num_images_per_label", "2", "--class_labels", label, "--output", str(tmp_path / name)]
        )
    one, other = (levels_of(tmp_path / name)[:, -2 * 66 :] for name in ("name", "id"))
    assert np.array_equal(one, other)

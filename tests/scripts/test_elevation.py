"""Tiles of a map: cut, held out, and compared with what a model draws."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from matplotlib.cbook import get_sample_data
from PIL import Image

from examples.data import elevation
from tarflow_hf import TarFlowPipeline
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elevation")
    elevation.main(["make", str(folder)])
    return folder


def test_tiles_are_parts_of_the_map_and_none_shares_a_point_with_a_held_out_one(folder):
    heights = get_sample_data("jacksboro_fault_dem.npz")["elevation"]
    marks = np.arange(heights.size).reshape(heights.shape)
    windows = np.lib.stride_tricks.sliding_window_view(heights, (16, 16))
    places = {window.tobytes(): index for index, window in enumerate(windows[::4, ::4].reshape(-1, 16, 16))}
    points = {}
    for split in ("train", "test"):
        tiles = np.load(folder / f"{split}.npy")
        found = [places[tile.tobytes()] for tile in tiles]
        of_map = np.lib.stride_tricks.sliding_window_view(marks, (16, 16))[::4, ::4].reshape(-1, 256)
        points[split] = set(of_map[found].ravel().tolist())
    assert points["train"].isdisjoint(points["test"])
    assert len(points["train"] | points["test"]) > 0.97 * heights.size


def test_the_folder_is_data_with_two_splits(folder):
    arguments = DataArguments(data=str(folder), eval_split="test", array_layout="hw", horizontal_flip=False)
    train, held_out = load_image_data(arguments, class_conditional=False)
    assert (len(train.rows), len(held_out.rows)) == (5395, 415)
    assert train.arrays.shape == (1, 16, 16)


def test_the_distance_of_two_distributions_is_that_of_kolmogorov_and_smirnov():
    assert elevation.largest_distance(np.array([1, 2, 3]), np.array([1, 2, 3])) == 0
    assert elevation.largest_distance(np.array([1, 2]), np.array([3, 4])) == 1
    assert elevation.largest_distance(np.array([1, 2, 3, 4]), np.array([3, 4])) == 0.5


def test_roughness_is_the_height_above_the_neighbours():
    tile = np.zeros((1, 4, 4))
    tile[0, 1, 1] = 4
    assert elevation.roughness(tile).tolist() == [[[4, -1], [-1, 0]]]
    assert elevation.relief(tile).tolist() == [4]


def test_samples_are_measured_beside_the_data(folder, tmp_path, capsys):
    model = tiny_model(dtype=torch.float32, image_size=16, num_classes=0, value_mean=[531], value_scale=[162])
    TarFlowPipeline(transformer=model).save_pretrained(tmp_path / "pipe")
    picture = tmp_path / "marginals.png"
    options = ["--data", str(folder), "--num_samples", "110", "--picture", str(picture)]
    elevation.main(["measure", str(tmp_path / "pipe"), *options])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == list(elevation.MARGINALS)
    with Image.open(picture) as drawn:
        assert drawn.width >= 900

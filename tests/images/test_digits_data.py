"""The embedded digits are scikit-learn's, each once, level for level; the script that made them makes them again."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Image
from sklearn.datasets import load_digits

from examples.data import make_digits, make_inverted_digits

FOLDER = Path(make_digits.__file__).parent / "digits"
SIZES = {"train": 1500, "test": 297}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {name: Dataset.from_parquet(str(FOLDER / f"{name}.parquet"), cache_dir=cache) for name in SIZES}


def source_rows(split):
    """The row of `load_digits()` that each image was made from: its file name."""
    return [int(Path(image["path"]).stem) for image in split.cast_column("image", Image(decode=False))["image"]]


def pixels(split):
    return np.stack([np.asarray(image) for image in split["image"]])


@pytest.mark.parametrize("name", SIZES)
def test_a_split_has_its_size_columns_and_image_format(splits, name):
    split = splits[name]
    assert len(split) == SIZES[name]
    assert split.features == {"image": Image(), "label": ClassLabel(names=list("0123456789"))}
    assert {(image.format, image.mode, image.size) for image in split["image"]} == {("PNG", "L", (8, 8))}


def test_every_digit_is_in_exactly_one_split(splits, digits):
    rows = source_rows(splits["train"]) + source_rows(splits["test"])
    assert sorted(rows) == list(range(len(digits.target)))


def test_no_image_is_in_both_splits(splits):
    train, test = ({image.tobytes() for image in splits[name]["image"]} for name in SIZES)
    assert train.isdisjoint(test)


@pytest.mark.parametrize("name", SIZES)
def test_levels_and_labels_are_recovered_exactly(splits, digits, name):
    rows = source_rows(splits[name])
    np.testing.assert_array_equal(make_digits.grey_to_levels(pixels(splits[name])), digits.images[rows])
    np.testing.assert_array_equal(splits[name]["label"], digits.target[rows])


def test_the_split_is_stratified(splits):
    counts = {name: np.bincount(split["label"], minlength=10) for name, split in splits.items()}
    expected = (counts["train"] + counts["test"]) * SIZES["test"] / sum(SIZES.values())
    assert np.abs(counts["test"] - expected).max() < 1


def test_levels_map_to_grey_and_back():
    levels = np.arange(make_digits.MAX_LEVEL + 1)
    grey = make_digits.levels_to_grey(levels)
    assert grey.tolist() == [round(level * 255 / 16) for level in range(17)]
    np.testing.assert_array_equal(make_digits.grey_to_levels(grey), levels)


def test_the_script_makes_the_same_data_again(splits, tmp_path):
    make_digits.main(tmp_path)
    for name, split in splits.items():
        again = Dataset.from_parquet(str(tmp_path / f"{name}.parquet"), cache_dir=str(tmp_path / "cache"))
        assert source_rows(again) == source_rows(split)
        np.testing.assert_array_equal(pixels(again), pixels(split))
        assert again["label"][:] == split["label"][:]


def test_inverted_digits_are_the_same_digits_black_on_white(splits, tmp_path):
    make_inverted_digits.main([str(tmp_path)])
    for name, split in splits.items():
        inverted = Dataset.from_parquet(str(tmp_path / f"{name}.parquet"), cache_dir=str(tmp_path / "cache"))
        np.testing.assert_array_equal(pixels(inverted), 255 - pixels(split))
        assert inverted["label"][:] == split["label"][:]
        assert inverted.features["label"] == split.features["label"]

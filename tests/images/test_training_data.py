"""Data sets of every kind are found, their columns too, and what is missing or ambiguous is named."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, UnreadableImageError
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data

FORMAT = ImageFormat(8, 1)


@pytest.fixture(autouse=True)
def short_shutdown(monkeypatch):
    """`datasets` rests 5 seconds whenever the reading of a stream ends; a tenth will do here."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def images(count, seed=0):
    return [
        Image.fromarray(levels)
        for levels in np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    ]


def write_parquet(path, columns, features):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


@pytest.fixture
def labelled(tmp_path):
    """A folder with train.parquet and test.parquet of 6 and 4 images in two classes."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    for split, count in (("train", 6), ("test", 4)):
        columns = {"image": images(count), "label": [index % 2 for index in range(count)]}
        write_parquet(tmp_path / "set" / f"{split}.parquet", columns, features)
    return tmp_path / "set"


def load(place, *, class_conditional=True, **options):
    return load_image_data(DataArguments(data=str(place), **options), class_conditional=class_conditional)


def levels(data, row, image_format=FORMAT):
    return StoredImages(data, image_format)[row].levels


def test_a_folder_of_parquet_files_gives_its_splits_and_classes(labelled):
    train, held_out = load(labelled, eval_split="test")
    assert (train.image_column, train.label_column, train.class_names) == ("image", "label", ("cat", "dog"))
    assert (len(train.rows), len(held_out.rows)) == (6, 4)
    assert np.array_equal(levels(train, 3)[0].numpy(), np.array(images(6)[3]))
    assert [StoredImages(train, FORMAT)[row].label for row in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_images_are_stored_and_drawn_across_classes(labelled, streaming):
    arguments = DataArguments(data=str(labelled), eval_split="test", streaming=streaming)
    for asked, found in ((None, 4), (3, 3), (10, 4)):
        _, held_out = load_image_data(arguments, class_conditional=True, eval_images=asked)
        images_of = StoredImages(held_out, FORMAT)
        assert len(images_of) == found
        rows = {np.array(image).tobytes(): row for row, image in enumerate(images(4))}
        drawn = [rows[images_of[row].levels[0].numpy().tobytes()] for row in range(found)]
        assert drawn == sorted(set(drawn))
        assert [images_of[row].label for row in range(found)] == [row % 2 for row in drawn]
        assert len(set(np.array(drawn) % 2)) == 2


def write_tar(path, levels):
    """A WebDataset shard: for every level an image full of it, and the class of its remainder by 3."""
    with tarfile.open(path, "w") as tar:
        for level in levels:
            png = io.BytesIO()
            Image.new("L", (8, 8), level).save(png, "PNG")
            for name, content in ((f"{level:06}.png", png.getvalue()), (f"{level:06}.cls", str(level % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_tars_are_read_by_folder_path_or_pattern(tmp_path, streaming):
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        write_tar(tmp_path / "shards" / f"{shard:04}.tar", range(4 * shard, 4 * shard + 4))
    options = {"streaming": streaming, "label_column": "cls", "class_names": ("a", "b", "c")}
    for place, count in (("shards", 12), ("shards/000[01].tar", 8), ("shards/0001.tar", 4)):
        data, _ = load(tmp_path / place, **options)
        samples = [(row["cls"], Image.open(io.BytesIO(row["png"]["bytes"])).getpixel((0, 0))) for row in data.rows]
        assert [level % 3 for _, level in samples] == [label for label, _ in samples]
        assert len({level for _, level in samples}) == len(samples) == count
    with pytest.raises(FileNotFoundError, match=r"no tar file matches"):
        load(tmp_path / "shards" / "0003.tar", **options)


def test_parquet_files_can_be_named_by_path_or_pattern(labelled):
    assert len(load(labelled / "train.parquet")[0].rows) == 6
    assert len(load(labelled / "t*.parquet")[0].rows) == 10
    train, held_out = load(labelled / "train.parquet", eval_data=str(labelled / "test.parquet"), eval_split="train")
    assert (len(train.rows), len(held_out.rows)) == (6, 4)


def test_an_image_folder_gives_its_subfolders_as_classes(tmp_path):
    for index, image in enumerate(images(6)):
        path = tmp_path / "folder" / ["bird", "ant"][index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    train, held_out = load(tmp_path / "folder")
    assert train.class_names == ("ant", "bird")
    assert held_out is None
    assert sorted(int(levels(train, row).sum()) for row in range(6)) == sorted(
        int(np.array(i).sum()) for i in images(6)
    )


def test_labels_are_left_aside_for_an_unconditional_model(labelled):
    train, _ = load(labelled, class_conditional=False)
    assert (train.label_column, train.class_names) == (None, ())
    assert StoredImages(train, FORMAT)[1].label == -1


@pytest.mark.parametrize(
    ("feature", "values", "names", "ids"),
    [
        (datasets.Value("int64"), [0, 2, 1, -1, None], ("0", "1", "2"), [0, 2, 1, -1, -1]),
        (datasets.Value("string"), ["b", "a", None, "b", "c"], ("a", "b", "c"), [1, 0, -1, 1, 2]),
    ],
)
def test_a_named_label_column_may_hold_numbers_or_names(tmp_path, feature, values, names, ids):
    features = {"picture": datasets.Image(), "kind": feature}
    path = write_parquet(tmp_path / "a.parquet", {"picture": images(5), "kind": values}, features)
    train, held_out = load(path, label_column="kind", eval_split="train")
    assert train.class_names == held_out.class_names == names
    assert [StoredImages(train, FORMAT)[row].label for row in range(5)] == ids


def test_what_is_missing_or_ambiguous_is_named(tmp_path, labelled):
    plain = write_parquet(tmp_path / "plain.parquet", {"text": ["a"]}, {"text": datasets.Value("string")})
    with pytest.raises(ValueError, match=r"no image column, found columns \['text'\]"):
        load(plain)
    two = {"a": datasets.Image(), "b": datasets.Image(), "y": datasets.Value("int64")}
    path = write_parquet(tmp_path / "two.parquet", {"a": images(1), "b": images(1), "y": [5]}, two)
    with pytest.raises(ValueError, match=r"several image columns, \['a', 'b'\]; choose one with image_column"):
        load(path)
    with pytest.raises(ValueError, match=r"0 columns of class labels .* name one with label_column"):
        load(path, image_column="a")
    with pytest.raises(ValueError, match=r"no column 'c', found columns \['a', 'b', 'y'\]"):
        load(path, image_column="c")
    with pytest.raises(ValueError, match=r"integers 0 ... n - 1 .*got \['5'\]"):
        load(path, image_column="a", label_column="y")
    with pytest.raises(ValueError, match="no split 'validation', found train, test"):
        load(labelled, eval_split="validation")
    with pytest.raises(FileNotFoundError, match=r"no parquet file matches"):
        load(tmp_path / "gone.parquet")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load(tmp_path / "gone")


def test_held_out_images_must_have_the_same_classes(tmp_path, labelled):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    other = write_parquet(tmp_path / "other.parquet", {"image": images(1), "label": [0]}, features)
    with pytest.raises(ValueError, match="names its classes"):
        load(labelled, eval_data=str(other), eval_split="train")
    without = write_parquet(tmp_path / "without.parquet", {"image": images(1)}, {"image": datasets.Image()})
    with pytest.raises(ValueError, match="has no column 'label'"):
        load(labelled, eval_data=str(without), eval_split="train")


@pytest.fixture
def damaged(tmp_path):
    """Five rows: a good image, a truncated one, bytes that are none, no image, and a good one."""
    good = images(2)
    (tmp_path / "whole.png").parent.mkdir(exist_ok=True)
    good[0].save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    cells = [{"bytes": data, "path": None} for data in (whole, whole[:40], b"nothing")] + [None, good[1]]
    return write_parquet(tmp_path / "damaged.parquet", {"image": cells}, {"image": datasets.Image()})


def test_an_unreadable_image_is_an_error_that_names_its_row(damaged):
    train, _ = load(damaged, class_conditional=False)
    rows = StoredImages(train, FORMAT)
    assert rows[0].levels.shape == (1, 8, 8)
    for row in (1, 2, 3):
        with pytest.raises(UnreadableImageError, match=f"image in row {row} of data set .*damaged.parquet"):
            rows[row]
    with pytest.raises(UnreadableImageError, match="row 1"):
        StoredImages(train, FORMAT, cached=True)


@pytest.mark.parametrize("cached", [False, True])
def test_the_next_readable_image_stands_in_and_is_counted(damaged, cached):
    train, _ = load(damaged, class_conditional=False)
    rows = StoredImages(train, FORMAT, skip_bad_images=True, cached=cached)
    assert [rows[row].bad_rows for row in range(5)] == [(), (1, 2, 3), (2, 3), (3,), ()]
    assert torch.equal(rows[1].levels, rows[4].levels)


def test_a_data_set_without_any_readable_image_is_an_error(tmp_path):
    cells = [{"bytes": b"nothing", "path": None}] * 2
    path = write_parquet(tmp_path / "bad.parquet", {"image": cells}, {"image": datasets.Image()})
    train, _ = load(path, class_conditional=False)
    with pytest.raises(UnreadableImageError, match="no image of data set"):
        StoredImages(train, FORMAT, skip_bad_images=True)[0]


def test_a_configuration_of_files_is_refused_also_in_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "a[b]"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": [1]}).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="data_config='small' must be left out: .* has no configurations"):
        load_image_data(DataArguments(data=str(folder), data_config="small"), class_conditional=False)

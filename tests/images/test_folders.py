"""Folders of images: classes, splits, links, odd names, and what is left out."""

import logging

import datasets
import pytest
from PIL import Image

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, make_loader
from tarflow_hf.images.folders import folder_images
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data

FORMAT = ImageFormat(2, 1)


@pytest.fixture(autouse=True)
def short_shutdown(monkeypatch):
    """`datasets` rests 5 seconds whenever the reading of a stream ends; a tenth will do here."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def paint(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2), level).save(path)


def load(place, *, class_conditional=True, **options):
    return load_image_data(DataArguments(data=str(place), **options), class_conditional=class_conditional)[0]


def test_class_folders_are_class_folders_whatever_the_files_are_called(tmp_path):
    for index in range(20):
        paint(tmp_path / "ab"[index % 2] / (f"scan_{index} train.png" if index < 5 else f"scan_{index}_test.png"))
    data = load(tmp_path)
    assert (len(data.rows), data.class_names) == (20, ("a", "b"))


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "ship"):
        paint(tmp_path / name / "0.png")
    assert load(tmp_path).class_names == ("ship", "train")


def test_folders_called_as_splits_are_splits(tmp_path):
    for place in ("train/a/0", "train/b/1", "test/b/2", "val/a/3", "Other/a/4"):
        paint(tmp_path / f"{place}.png")
    found = folder_images(tmp_path)
    assert {name: len(images.paths) for name, images in found.items()} == {"train": 2, "validation": 1, "test": 1}
    assert found["test"].class_names == ("a", "b")
    assert found["test"].labels == (1,)


def test_flat_files_are_splits_only_if_all_are_named_so(tmp_path):
    for name in ("train_0", "train_1", "test_0"):
        paint(tmp_path / f"{name}.png")
    assert {name: len(images.paths) for name, images in folder_images(tmp_path).items()} == {"train": 2, "test": 1}
    paint(tmp_path / "holiday.png")
    assert {name: len(images.paths) for name, images in folder_images(tmp_path).items()} == {"train": 4}
    with pytest.raises(ValueError, match="make class folders, or do without.*--ignore_labels"):
        load(tmp_path)
    assert len(load(tmp_path, class_conditional=False).rows) == 4


def test_classes_with_numbers_for_names_are_in_their_order(tmp_path):
    for number in range(12):
        paint(tmp_path / str(number) / "0.png", 20 * number)
    data = load(tmp_path)
    assert data.class_names == tuple(map(str, range(12)))
    stored = StoredImages(data, FORMAT)
    assert all(int(sample.levels[0, 0, 0]) == 20 * sample.label for sample in map(stored.__getitem__, range(12)))


@pytest.mark.parametrize("name", ["[set] 1", "a b", "what?*", "{x}", "ümlaut", "-dash", "per%20cent"])
def test_brackets_and_spaces_in_paths_work(tmp_path, name):
    for kind in "ab":
        paint(tmp_path / name / kind / "[0] 1.png")
    assert len(load(tmp_path / name).rows) == 2
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
    rows = datasets.Dataset.from_dict({"image": [Image.new("L", (2, 2))], "label": [0]}, features=features)
    folder = tmp_path / "parquet" / name
    folder.mkdir(parents=True)
    rows.to_parquet(folder / "train.parquet")
    assert len(load(folder).rows) == 1
    rows.to_parquet(tmp_path / f"{name}[1].parquet")
    assert len(load(tmp_path / f"{name}[1].parquet").rows) == 1


def test_links_are_followed_but_not_in_circles(tmp_path):
    for kind in "ab":
        paint(tmp_path / "there" / kind / "0.png")
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / kind).symlink_to(tmp_path / "there" / kind)
    (tmp_path / "there" / "a" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load(tmp_path / "here")
    assert data.class_names == ("a", "b")


def test_what_is_left_out_is_counted_in_one_line(tmp_path, caplog):
    for name in ("a/0.png", "b/1.PNG", "b/.hidden.png", ".cache/2.png"):
        paint(tmp_path / name)
    (tmp_path / "a" / "notes.docx").write_text("x")
    (tmp_path / "a" / "raw.cr2").write_text("x")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "README.md").write_text("# pictures")
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path).rows) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 images; 5 files are left out: 2 hidden, " in line
    assert all(kind in line for kind in ("1 .docx", "1 .cr2", "1 broken links"))


def test_avif_is_read_where_pillow_can_and_counted_elsewhere(tmp_path, monkeypatch, caplog):
    paint(tmp_path / "0.png")
    (tmp_path / "1.avif").write_bytes(b"a picture")
    monkeypatch.setattr("tarflow_hf.images.folders.features.check", lambda name: False)
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, class_conditional=False).rows) == 1
    assert "1 .avif" in caplog.text
    monkeypatch.setattr("tarflow_hf.images.folders.features.check", lambda name: True)
    assert len(load(tmp_path, class_conditional=False).rows) == 2


def test_a_folder_with_metadata_is_read_by_datasets(tmp_path):
    paint(tmp_path / "x" / "0.png")
    (tmp_path / "x" / "metadata.csv").write_text("file_name,kind\n0.png,a\n")
    assert folder_images(tmp_path / "x") is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_can_be_a_stream(tmp_path, num_workers):
    for index in range(8):
        paint(tmp_path / "ab"[index % 2] / f"{index}.png", 10 * index)
    options = DataArguments(data=str(tmp_path), streaming=True, num_workers=num_workers)
    data, _ = load_image_data(options, class_conditional=True)
    loader = iter(make_loader(data, options, FORMAT, BatchLayout(4), seed=0, steps=range(2)))
    levels = [level for _ in range(2) for level in next(loader).levels[:, 0, 0, 0].tolist()]
    assert sorted(levels) == [10 * index for index in range(8)]

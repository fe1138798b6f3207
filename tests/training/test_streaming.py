"""Two processes train on shards that are streamed, are killed and go on: every row is seen once in each epoch."""

import io
import json
import os
import tarfile
import zipfile

import datasets
import pytest
from PIL import Image
from training_runs import kill_and_restart, train

from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import ImageData
from tarflow_hf.training.augmentation import Augmenter

pytestmark = pytest.mark.xdist_group("runs")

SHARDS, ROWS_OF_A_SHARD, EPOCHS = 4, 12, 3
ROWS = SHARDS * ROWS_OF_A_SHARD
BATCH = 8


def picture(row):
    """An image whose levels are all the number of its row."""
    return Image.new("L", (8, 8), row)


def write_parquet(folder):
    features = datasets.Features({"image": datasets.Image()})
    for shard in range(SHARDS):
        rows = range(shard * ROWS_OF_A_SHARD, (shard + 1) * ROWS_OF_A_SHARD)
        columns = {"image": [picture(row) for row in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{shard}.parquet")


def write_tars(folder):
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(shard * ROWS_OF_A_SHARD, (shard + 1) * ROWS_OF_A_SHARD):
                content = io.BytesIO()
                picture(row).save(content, "PNG")
                member = tarfile.TarInfo(f"{row:04}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)


def train_and_note_rows(argv, output, file_limit, example):
    """A training process that also writes down which rows each of its steps gets."""
    get_input = Augmenter.__call__

    def noted(self, batch, step, positions):
        with open(f"{output}.rows.{os.environ['RANK']}", "a") as file:
            file.write(json.dumps([step, batch.levels[:, 0, 0, 0].tolist()]) + "\n")
        return get_input(self, batch, step, positions)

    Augmenter.__call__ = noted
    train(argv, output, file_limit, example)


def rows_of_steps(log, rank):
    """The rows that a process had in each step; a step that was taken again after a kill had the same ones."""
    found = {}
    for line in log.with_name(f"{log.name}.rows.{rank}").read_text().splitlines():
        step, rows = json.loads(line)
        assert found.setdefault(step, rows) == rows
    return found


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_every_row_is_seen_once_an_epoch_by_two_processes_that_are_killed(tmp_path, write):
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards")
    options = {"data": tmp_path / "shards", "eval_split": "null", "class_conditional": False, "streaming": True}
    options |= {"shuffle_buffer": 5, "num_workers": 2, "batch_size": BATCH, "warmup_epochs": "null"}
    options |= {"max_steps": EPOCHS * ROWS // BATCH, "sample_every": 100, "checkpoint_every": 2}
    run = kill_and_restart(tmp_path / "run", 2, seed=2, processes=2, train=train_and_note_rows, **options)
    steps = [rows_of_steps(run.log, rank) for rank in range(2)]
    history = [json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines()]
    resumed = [row["step"] for row in history if row["event"] == "start" and row["step"]]
    assert any(step % (ROWS // BATCH) for step in resumed), "no kill was in the middle of an epoch"
    orders = []
    for epoch in range(EPOCHS):
        numbers = range(epoch * ROWS // BATCH, (epoch + 1) * ROWS // BATCH)
        orders.append([row for step in numbers for rank in range(2) for row in steps[rank][step]])
        assert sorted(orders[-1]) == list(range(ROWS))
    assert orders[0] != orders[1] != orders[2]


def test_images_in_an_archive_are_read_where_they_lie(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "grey.png", "grey.png")
    rows = [{"image": {"path": f"zip://grey.png::{tmp_path / 'images.zip'}", "bytes": None}}]
    images = StoredImages(ImageData(rows, "images", "image", None, ()), ImageFormat(8, 1))
    assert images[0].levels.unique().tolist() == [77]

"""The order of the images depends on seed, epoch and batch size alone; streams are read in parts."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import make_loader
from tarflow_hf.images.order import BatchLayout, StepSampler
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data

FORMAT = ImageFormat(2, 1)


@pytest.fixture(autouse=True)
def short_shutdown(monkeypatch):
    """`datasets` rests 5 seconds whenever the reading of a stream ends; a tenth will do here."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def order(num_images, batch_size, steps, *, seed=0, micro_batches=1, processes=1):
    """Rows of every step, put together from the parts of all processes."""
    parts = []
    for process in range(processes):
        layout = BatchLayout(batch_size, micro_batches, process, processes)
        parts.append(list(StepSampler(num_images, batch_size, layout, seed, steps)))
    rows = [row for micro in zip(*parts, strict=True) for part in micro for row in part]
    return np.array(rows).reshape(len(steps), batch_size)


def test_every_epoch_reads_each_image_once_in_an_order_of_its_own():
    rows = order(12, 4, range(6))
    first, second = rows[:3].ravel(), rows[3:].ravel()
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second)
    assert not np.array_equal(rows, order(12, 4, range(6), seed=1))


def test_the_images_left_out_of_an_epoch_differ_from_epoch_to_epoch():
    left_out = [set(range(10)) - set(order(10, 4, range(2 * epoch, 2 * epoch + 2)).ravel()) for epoch in range(8)]
    assert all(len(rows) == 2 for rows in left_out)
    assert len({frozenset(rows) for rows in left_out}) > 1


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_processes_and_accumulation_divide_the_same_batches(micro_batches, processes):
    divided = order(20, 8, range(5), micro_batches=micro_batches, processes=processes)
    assert np.array_equal(divided, order(20, 8, range(5)))


def test_a_resumed_order_is_the_tail_of_the_whole_one():
    assert np.array_equal(order(10, 3, range(4, 9)), order(10, 3, range(9))[4:])


def test_a_batch_that_does_not_divide_or_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch_size=10 must be a multiple of gradient_accumulation_steps=2 times"):
        BatchLayout(10, 2, 0, 2)
    with pytest.raises(ValueError, match="batch_size=8 must not be larger than the data set of 7 images"):
        StepSampler(7, 8, BatchLayout(8), 0, range(1))


@pytest.fixture
def numbered(tmp_path):
    """24 images whose level is their row, in four parquet files."""
    for part in range(4):
        pictures = [Image.new("L", (2, 2), 6 * part + index) for index in range(6)]
        rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(tmp_path / f"{part}.parquet")
    return str(tmp_path / "*.parquet")


def read(place, steps, *, seed=0, batch_size=4, process=0, processes=1, **options):
    """Levels, that is rows, of the batches of one process."""
    arguments = DataArguments(data=place, **options)
    data, _ = load_image_data(arguments, class_conditional=False)
    layout = BatchLayout(batch_size, 1, process, processes)
    loader = iter(make_loader(data, arguments, FORMAT, layout, seed=seed, steps=steps))
    batches = [next(loader) for _ in steps]
    assert all(batch.levels.dtype == torch.uint8 for batch in batches)
    return [batch.levels[:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 2}, {"cache_images": True}])
def test_workers_and_caching_do_not_change_the_batches(numbered, options):
    expected = order(24, 4, range(3, 9)).tolist()
    assert read(numbered, range(3, 9), **options) == expected


def test_a_stream_is_read_completely_before_it_starts_anew(numbered):
    rows = read(numbered, range(12), streaming=True, shuffle_buffer=8, num_workers=0)
    first, second = sum(rows[:6], []), sum(rows[6:], [])
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))


def test_processes_share_a_stream(numbered):
    options = {"streaming": True, "shuffle_buffer": 8, "num_workers": 0, "processes": 2}
    rows = [sum(read(numbered, range(6), process=process, **options), []) for process in range(2)]
    assert sorted(rows[0] + rows[1]) == list(range(24))


def test_workers_share_a_stream(numbered):
    rows = read(numbered, range(6), streaming=True, shuffle_buffer=8, num_workers=2)
    assert sorted(sum(rows, [])) == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_taken_up_where_it_was_left(numbered, workers):
    options = {"streaming": True, "shuffle_buffer": 8, "num_workers": workers, "processes": 2, "batch_size": 6}
    whole = [read(numbered, range(20), process=process, **options) for process in range(2)]
    for passes in range(5):  # of 4 batches for each process
        rows = sum((sum(batches[4 * passes : 4 * passes + 4], []) for batches in whole), [])
        assert sorted(rows) == list(range(24))
    for start in (1, 15):
        assert read(numbered, range(start, 20), process=1, **options) == whole[1][start:]


def test_a_stream_with_unreadable_images_is_taken_up_where_it_was_left(tmp_path):
    cells = [
        Image.new("L", (2, 2), level) if level % 4 else {"bytes": b"nothing", "path": None} for level in range(16)
    ]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "a.parquet")
    options = {"streaming": True, "shuffle_buffer": 4, "num_workers": 0, "skip_bad_images": True, "batch_size": 3}
    whole = read(str(tmp_path / "a.parquet"), range(10), **options)
    assert sorted(sum(whole[:4], [])) == [level for level in range(16) if level % 4]
    for start in (1, 4, 9):
        assert read(str(tmp_path / "a.parquet"), range(start, 10), **options) == whole[start:]


def test_a_stream_without_a_readable_image_is_an_error(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": b"nothing", "path": None}] * 3
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="none of its images can be read"):
        read(str(tmp_path / "a.parquet"), range(1), batch_size=2, streaming=True, num_workers=0, skip_bad_images=True)


def test_unreadable_images_are_left_out_of_a_stream_and_counted(tmp_path):
    cells = [Image.new("L", (2, 2), 1), {"bytes": b"nothing", "path": None}, Image.new("L", (2, 2), 2)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "a.parquet")
    options = DataArguments(
        data=str(tmp_path / "a.parquet"), streaming=True, skip_bad_images=True, num_workers=0, shuffle_buffer=1
    )
    data, _ = load_image_data(options, class_conditional=False)
    loader = iter(make_loader(data, options, FORMAT, BatchLayout(2), seed=0, steps=range(1)))
    batch = next(loader)
    assert sorted(batch.levels[:, 0, 0, 0].tolist()) == [1, 2]
    assert len(batch.bad_rows) <= 1


def test_an_empty_part_of_a_stream_is_an_error(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": [Image.new("L", (2, 2))]}, features=features).to_parquet(path)
    with pytest.raises(ValueError, match="too small to be streamed by 2 processes"):
        read(str(path), range(1), batch_size=2, process=1, processes=2, streaming=True, num_workers=0)

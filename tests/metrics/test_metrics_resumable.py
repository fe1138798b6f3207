"""Work kept batch by batch: every item once, nothing computed twice, no half-written file."""

import numpy as np
import pytest
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st

from tarflow_hf.metrics.resumable import BatchFiles


@pytest.fixture
def state():
    return PartialState(cpu=True)


@given(num_items=st.integers(1, 200), batch_size=st.integers(1, 50), num_processes=st.integers(1, 7))
def test_every_item_is_in_one_batch_of_one_process(tmp_path_factory, num_items, batch_size, num_processes):
    batches = BatchFiles(tmp_path_factory.getbasetemp(), num_items, batch_size).batches
    shares = [batches[index::num_processes] for index in range(num_processes)]
    assert sorted(item for share in shares for batch in share for item in batch) == list(range(num_items))
    assert max(map(len, batches)) <= batch_size


def test_work_that_stopped_goes_on_without_computing_anything_twice(tmp_path, state):
    files = BatchFiles.open(tmp_path, 10, 3, {"seed": 0})
    computed = []

    def compute(batch):
        if batch.start == 6 and len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(batch)
        return {"square": np.array(batch) ** 2}

    with pytest.raises(KeyboardInterrupt):
        files.run(compute, state, "squares")
    again = BatchFiles.open(tmp_path, 10, 3, {"seed": 0})
    computed.append(None)
    again.run(compute, state, "squares")
    assert computed == [range(0, 3), range(3, 6), None, range(6, 9), range(9, 10)]
    np.testing.assert_array_equal(again.gather()["square"], np.arange(10) ** 2)


def test_more_items_keep_what_is_computed(tmp_path, state):
    computed = []

    def compute(batch):
        computed.append(batch)
        return {"index": np.array(batch)}

    BatchFiles.open(tmp_path, 5, 2, {}).run(compute, state, "few")
    more = BatchFiles.open(tmp_path, 7, 2, {})
    more.run(compute, state, "more")
    assert computed == [range(0, 2), range(2, 4), range(4, 5), range(4, 6), range(6, 7)]
    np.testing.assert_array_equal(more.gather()["index"], np.arange(7))


def test_other_settings_have_another_folder_that_says_what_they_are(tmp_path):
    first, second = (BatchFiles.open(tmp_path, 5, 2, {"guidance_scale": scale}) for scale in (1.0, 2.0))
    assert first.folder != second.folder
    assert '"guidance_scale": 2.0' in (second.folder / "settings.json").read_text()
    assert BatchFiles.open(tmp_path, 5, 3, {"guidance_scale": 1.0}).folder != first.folder


def test_a_failed_write_leaves_nothing(tmp_path, state):
    files = BatchFiles.open(tmp_path, 4, 2, {})
    with pytest.raises(ValueError, match=r"wrong must have 2 rows for the items range\(0, 2\), got 1"):
        files.run(lambda batch: {"wrong": np.zeros(1)}, state, "wrong")
    assert [path.name for path in files.folder.iterdir()] == ["settings.json"]
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 2"):
        BatchFiles.open(tmp_path, 0, 2, {})

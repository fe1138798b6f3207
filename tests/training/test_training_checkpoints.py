"""Checkpoints are complete or not there; a damaged or half-written one is never picked."""

import json
import os
import resource
import signal
import time

import pytest
import torch
from training_runs import environments, start_processes

from tarflow_hf.training import disk
from tarflow_hf.training.checkpoints import (
    CheckpointError,
    complete_checkpoints,
    latest_checkpoint,
    read_checkpoint,
    step_of,
    write_checkpoint,
)
from tarflow_hf.training.stopping import StopSignal

OPTIONS = {"learning_rate": 1e-3, "layers_per_block": [1, 2]}


def write(folder, step, *, size=1000, keep=2, options=OPTIONS):
    return write_checkpoint(folder, step, {"weights": torch.full((size,), float(step))}, options, keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    path = write(tmp_path, 12)
    assert latest_checkpoint(tmp_path) == path
    state = read_checkpoint(path, OPTIONS)
    assert torch.equal(state["weights"], torch.full((1000,), 12.0))


def test_old_checkpoints_are_removed(tmp_path):
    for step in (9, 10, 100_000_000, 11):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-00000011", "step-100000000"]


def test_there_is_nothing_to_go_on_from_at_first(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["truncated", "missing", "no description", "broken description"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    about = bad / "checkpoint.json"
    match damage:
        case "truncated":
            os.truncate(bad / "state.pt", 100)
        case "missing":
            (bad / "state.pt").unlink()
        case "no description":
            about.unlink()
        case "broken description":
            about.write_text(about.read_text()[:20])
    assert latest_checkpoint(tmp_path) == good
    assert latest_checkpoint(write(tmp_path, 2).parent).name == "step-00000002"  # it is replaced when written anew


def test_an_unfinished_checkpoint_is_not_picked_and_removed_by_the_next(tmp_path):
    good = write(tmp_path, 1)
    unfinished = tmp_path / ".unfinished-step-00000002"
    unfinished.mkdir()
    (unfinished / "state.pt").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == good
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_other_options_are_refused_with_every_difference(tmp_path):
    path = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"layers_per_block was \[1, 2\] and is now 2; learning_rate was 0.001"):
        read_checkpoint(path, {"learning_rate": 2e-3, "layers_per_block": 2})
    with pytest.raises(CheckpointError, match="seed was 'absent' and is now 0"):
        read_checkpoint(path, OPTIONS | {"seed": 0})


def test_a_full_disk_is_an_error_that_costs_nothing(tmp_path):
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"step 2 .* The last complete checkpoint is step-00000001"):
            write(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]


def _write_for_ever(folder):
    for step in range(1, 10_000):
        write(folder, step, size=200_000, keep=1)


def test_a_kill_while_writing_leaves_a_complete_checkpoint(tmp_path):
    """A process that does nothing but write checkpoints is killed wherever it happens to be."""
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        (process,) = start_processes(_write_for_ever, (folder,), environments(1))
        while latest_checkpoint(folder) is None:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        path = latest_checkpoint(folder)
        step = json.loads((path / "checkpoint.json").read_text())["step"]
        assert path.name == f"step-{step:08d}"
        assert (read_checkpoint(path, OPTIONS)["weights"] == step).all()
        write(folder, step + 1, keep=1)
        assert complete_checkpoints(folder)[0].name == f"step-{step + 1:08d}"


def test_a_stop_signal_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.hold()
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) == before


def test_checkpoints_that_are_links_or_files_make_room(tmp_path):
    elsewhere = write(tmp_path / "other", 10)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step-00000010").symlink_to(elsewhere)  # moved to another disk
    (folder / "step-00000020").write_text("no checkpoint")
    (folder / "step-00000030").symlink_to(tmp_path / "nowhere")
    assert latest_checkpoint(folder) == folder / "step-00000010"
    for step in (20, 30):
        write(folder, step)
    assert names(folder) == ["step-00000020", "step-00000030"]
    assert [path.name for path in complete_checkpoints(folder)] == names(folder)
    assert read_checkpoint(elsewhere, OPTIONS)["weights"].shape == (1000,)  # what a link leads to stays


def test_an_old_checkpoint_that_cannot_be_removed_stays_and_the_new_one_counts(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, {"weight": torch.ones(2)}, {"seed": 0}, keep=2)

    def refuse(path, *arguments, **options):
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "rmtree", refuse)
        write_checkpoint(tmp_path, 3, {"weight": torch.ones(2)}, {"seed": 0}, keep=1)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [1, 2, 3]
    assert "cannot remove" in caplog.text
    write_checkpoint(tmp_path, 4, {"weight": torch.ones(2)}, {"seed": 0}, keep=1)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [4]

"""An interrupted run ends with the very bits of an uninterrupted one, and never loses a complete checkpoint."""

import json
import shutil
import signal

import pytest
import torch
from training_runs import TINY, Run, kill_and_restart, outcome, weights

from tarflow_hf.training.checkpoints import complete_checkpoints, latest_checkpoint

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def uninterrupted(whole_run):
    return whole_run(1).folder


def assert_same_run(folder, expected):
    assert outcome(folder) == outcome(expected)
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder / "checkpoints")]


def test_kills_leave_no_trace(uninterrupted, tmp_path):
    run = kill_and_restart(tmp_path / "run", 6, seed=0)
    assert_same_run(run.folder, uninterrupted)


def test_a_run_leaves_metrics_grids_and_a_pipeline(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, TINY["max_steps"] + 1))
    assert [row["step"] for row in rows if "validation_bits_per_dim" in row] == [8, 16, 18]
    assert sorted(path.name for path in (uninterrupted / "grids").iterdir()) == [
        f"step-{step:08d}.png" for step in (8, 16, 18)
    ]
    for name in ("samples.png", "curve.png", "recipe.yaml", "model_index.json", "transformer/config.json"):
        assert (uninterrupted / name).is_file()
    assert steps(uninterrupted) == [16, 18]


def test_sigterm_saves_and_ends_well(uninterrupted, tmp_path):
    run = Run(tmp_path / "run", checkpoint_every=1000)
    assert run.wait_for(8)
    run.signal(signal.SIGTERM)
    assert run.join() == [143]
    (step,) = steps(run.folder)
    assert 8 <= step < TINY["max_steps"]
    assert f"stopped by SIGTERM after step {step}" in run.log.read_text()
    assert not (run.folder / "model_index.json").exists()
    again = Run(tmp_path / "run", checkpoint_every=1000).finish()
    assert_same_run(again.folder, uninterrupted)


def test_a_finished_run_started_again_changes_nothing(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "samples.png").unlink()
    Run(folder).finish()
    assert_same_run(folder, uninterrupted)


def test_a_full_disk_keeps_the_last_checkpoint(uninterrupted, tmp_path):
    """No file may grow beyond 20 kB, so that the next checkpoint fails as on a full disk."""
    folder = tmp_path / "run"
    first = Run(folder)
    assert first.wait_for(7)
    first.signal(signal.SIGKILL)
    first.join()
    kept = latest_checkpoint(folder / "checkpoints")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    full = Run(folder, file_limit=20_000)
    assert full.join() == [1]
    assert "cannot write the checkpoint of step" in full.log.read_text()
    assert f"The last complete checkpoint is {kept.name}" in full.log.read_text()
    assert latest_checkpoint(folder / "checkpoints") == kept
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert_same_run(Run(folder).finish().folder, uninterrupted)


def test_a_checkpoint_of_other_options_is_refused_with_the_difference(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = outcome(folder)
    run = Run(folder, learning_rate=2e-3, hidden_size=32, num_workers=1)
    assert run.join() == [1]
    message = run.log.read_text()
    assert "hidden_size was 16 and is now 32; learning_rate was 0.003 and is now 0.002" in message
    assert "Choose another output_dir" in message
    assert outcome(folder) == before

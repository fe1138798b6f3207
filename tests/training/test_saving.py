"""Checkpoints in shards and in the background: the same bits as those written whole and at once."""

import json
import signal
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from training.test_distributed import make_trainer, shard, shares
from training_runs import Run, environments, exit_codes, kill_and_restart, outcome, start_processes

from tarflow_hf.training.checkpoints import complete_checkpoints, read_state, write_checkpoint
from tarflow_hf.training.export import load_pipeline
from tarflow_hf.training.saving import Saver

pytestmark = pytest.mark.xdist_group("runs")
ASYNC = {"async_checkpoints": True, "checkpoint_format": "sharded", "checkpoint_every": 2}


def state(folder):
    return read_state(max((folder / "checkpoints").glob("step-*")))


def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), prefix)
    return {prefix: value}


def assert_same_state(found, wanted):
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


@pytest.fixture(scope="module")
def whole(whole_run):
    return whole_run(2).folder


@pytest.mark.parametrize("options", [{"checkpoint_format": "sharded"}, {"async_checkpoints": True}])
def test_every_way_of_saving_holds_the_same_state(whole, tmp_path, options):
    folder = Run(tmp_path / "run", processes=2, **options).finish().folder
    assert outcome(folder) == outcome(whole)
    assert_same_state(state(folder), state(whole))
    newest = complete_checkpoints(folder / "checkpoints")[-1]
    files = json.loads((newest / "checkpoint.json").read_text())["files"]
    shards = {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert set(files) == (shards if "checkpoint_format" in options else {"state.pt"})
    found, wanted = (
        load_pipeline(max(f.glob("checkpoints/step-*"))).transformer.state_dict() for f in (folder, whole)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_kills_while_shards_are_written_in_the_background_leave_no_trace(whole, tmp_path):
    run = kill_and_restart(tmp_path / "run", 3, seed=2, processes=2, **ASYNC)
    assert outcome(run.folder) == outcome(whole)
    assert_same_state(state(run.folder), state(whole))


def test_a_stop_waits_for_its_checkpoint(whole, tmp_path):
    run = Run(tmp_path / "run", processes=2, **(ASYNC | {"checkpoint_every": 1000}))
    assert run.wait_for(6)
    run.signal(signal.SIGTERM, rank=0)
    assert run.join() == [143, 143]
    (checkpoint,) = complete_checkpoints(run.folder / "checkpoints")
    again = Run(tmp_path / "run", processes=2).finish()  # goes on in the other format
    assert outcome(again.folder) == outcome(whole)
    assert_same_state(state(again.folder), state(whole))


def test_a_disk_that_is_full_in_the_background_is_an_error_of_all_processes(tmp_path):
    run = Run(tmp_path / "run", processes=2, file_limit=20_000, **ASYNC)
    assert run.join() == [1, 1]
    assert "cannot write the checkpoint of step 2" in run.log.read_text()
    assert complete_checkpoints(run.folder / "checkpoints") == []


def _save_a_sharded_model(folder):
    """In each of two processes: a step, the checkpoint begun, another step, and the state as of the first."""
    accelerator = shard(Accelerator(cpu=True))
    index, count = accelerator.process_index, accelerator.num_processes
    trainer = make_trainer(accelerator, posthoc_ema=(0.05, 0.1))
    trainer.step([shares(0, index, count)])
    expected = trainer.state()
    saver = Saver(accelerator, sharded=True, background=True)
    saver.start(folder, 1, trainer.state(whole=False), partial(write_checkpoint, folder, 1, configuration={}, keep=1))
    trainer.step([shares(1, index, count)])
    saver.wait()
    if accelerator.is_main_process:
        torch.save(expected, folder / "expected.pt")
    saver.close()
    trainer.release()
    accelerator.end_training()


def test_shards_of_fsdp_are_put_together_as_they_were_when_saving_began(tmp_path):
    processes = start_processes(_save_a_sharded_model, (tmp_path,), environments(2))
    assert exit_codes(processes) == [0, 0]
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert_same_state(read_state(tmp_path / "step-00000001"), expected)

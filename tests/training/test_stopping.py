"""A run that is asked to stop saves, says so in its exit status, and leaves nobody training; one writer a folder."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from training.signal_table import LONG, MOMENTS, SLOW_LOOK, rows, stop, wait_until
from training_runs import Run, command, outcome

from examples.train import main
from tarflow_hf import TarFlowModel
from tarflow_hf.training import lock
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.augmentation import Augmenter
from tarflow_hf.training.checkpoints import all_checkpoints, complete_checkpoints, step_of
from tarflow_hf.training.footprint import Footprint, readable_bytes
from tarflow_hf.training.launchers import check_launcher, missing_processes
from tarflow_hf.training.lock import RunLock, RunLockedError
from tarflow_hf.training.progress import NonFiniteTrainingError
from tarflow_hf.training.stopping import Interrupted, StopSignal, StopTogether


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "step"),
        (signal.SIGINT, "evaluation"),
        (signal.SIGUSR1, "grid"),
        (signal.SIGTERM, "saving"),
    ],
)
def test_a_signal_at_any_moment_saves_and_the_status_is_143(tmp_path, number, moment):
    options, reached = MOMENTS[moment]
    run = Run(tmp_path / "run", **options)
    wait_until(lambda: reached(run.folder) or not run.processes[0].is_alive())
    run.signal(number)
    run.signal(number)  # some launchers repeat themselves
    assert run.join() == [143], run.log.read_text()[-2000:]
    (newest,) = complete_checkpoints(run.folder / "checkpoints")[-1:]
    assert f"stopped by {signal.Signals(number).name} after step {step_of(newest)};" in run.log.read_text()
    if moment in ("evaluation", "grid"):
        assert step_of(newest) == 4
        assert rows(run.folder) == 4
        assert not list(run.folder.glob("grids/*"))
    assert not (run.folder / "run.lock").exists()
    events = [json.loads(line)["event"] for line in (run.folder / "history.jsonl").read_text().splitlines()]
    assert events == ["start", "stop"]


@pytest.mark.parametrize(
    ("way", "number", "addressee", "moment", "statuses"),
    [  # `python tests/training/signal_table.py` tries all combinations
        ("accelerate 1", signal.SIGTERM, "launcher", "step", {-signal.SIGTERM, 143}),  # it tells its process nothing
        ("accelerate 2", signal.SIGINT, "launcher", "evaluation", {1}),
        ("torchrun 2", signal.SIGUSR1, "worker", "saving", {1}),
    ],
)
def test_a_signal_through_a_launcher_saves_and_leaves_no_process(tmp_path, way, number, addressee, moment, statuses):
    stopped = stop(way, moment, number, addressee=addressee, folder=tmp_path / "run")
    assert stopped.status in statuses, stopped.log[-3000:]
    assert stopped.orphans == 0
    assert stopped.step == stopped.lines, stopped.log[-3000:]
    if moment == "evaluation":
        assert stopped.step == 4
    assert f"{way[-1]} process" in stopped.log
    if way == "accelerate 1":
        assert "stopped by the end of its launcher" in stopped.log
    assert f" after step {stopped.step}; the same command goes on from here" in stopped.log


def test_two_processes_break_an_evaluation_off_together(tmp_path):
    run = Run(tmp_path / "run", processes=2, **(LONG | SLOW_LOOK | {"eval_every": 4, "sample_every": 4}))
    assert run.wait_for(4)
    run.signal(signal.SIGUSR1, rank=1)
    assert run.join() == [143, 143]
    assert [step_of(path) for path in complete_checkpoints(run.folder / "checkpoints")] == [4]


class Late:
    """Two processes, of which this one is asked to stop after it has told the other that it is not."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, signal):
        self.signal = signal

    def reduce(self, asked, reduction):
        self.signal.request("SIGTERM")
        return asked


def test_no_process_stops_before_the_others_know():
    with StopSignal() as stop:
        together = StopTogether(stop, Late(stop))
        together.check_together()
        with pytest.raises(Interrupted, match="SIGTERM"):
            together.check_together()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs in this process, of the same options but for those given."""
    monkeypatch.chdir(tmp_path)
    return lambda folder="run", **options: main(command(tmp_path / folder, num_workers=0, **options))


def test_a_run_stops_by_itself_before_its_hours_are_over(tiny, tmp_path, capsys):
    assert tiny(max_hours=1e-9) == 143
    assert "stopped by max_hours after step 1;" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_hours must be above 0, got -1"):
        tiny(max_hours=-1)


def test_before_there_is_anything_to_save_a_signal_ends_at_once():
    with pytest.raises(SystemExit) as stopped, StopSignal():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopped.value.code == 143
    with StopSignal() as stop:
        stop.check()
        stop.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT"):
            stop.check()


def test_a_second_run_in_the_same_folder_is_refused_by_name(tmp_path):
    first = Run(tmp_path / "run", **LONG)
    assert first.wait_for(2)
    second = Run(tmp_path / "run", **LONG)
    assert second.join() == [1]
    assert f"is written by another run: process {first.processes[0].pid} on " in second.log.read_text()
    first.signal(signal.SIGKILL)
    first.join()
    assert (tmp_path / "run" / "run.lock").exists()
    third = Run(tmp_path / "run", **LONG)  # the dead one's lock is taken over
    wait_until(lambda: f"steps 0 to {LONG['max_steps']}" in third.log.read_text().split("another run")[-1])
    third.signal(signal.SIGTERM)
    assert third.join() == [143]


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_lock_of_another_machine_is_taken_over_when_its_heartbeat_is_stale(tmp_path, monkeypatch):
    held = RunLock(tmp_path / "run")
    held.acquire()
    change(held.path, machine="elsewhere", host="node-7")
    with pytest.raises(RunLockedError, match="process .* on node-7, since .*remove .*run.lock"):
        RunLock(tmp_path / "run").acquire()
    long_ago = time.time() - lock.STALE_SECONDS - 5
    os.utime(held.path, (long_ago, long_ago))
    with RunLock(tmp_path / "run") as other:
        assert json.loads(other.path.read_text())["token"] == other.owner["token"]
        held.release()  # it is no longer its own to remove
        assert other.path.exists()
    assert not other.path.exists()


def test_a_lock_of_an_ended_or_damaged_owner_is_taken_over(tmp_path):
    path = tmp_path / lock.LOCK_FILE
    for text in ("", "[]", "{"):
        path.write_text(text)
        with RunLock(tmp_path):
            pass
    with RunLock(tmp_path) as held:
        change(path, process_started=1.0)  # the same number, another process
        with RunLock(tmp_path):
            pass
        assert not path.exists()
        held.release()


def test_the_heartbeat_goes_on_and_tells_when_the_lock_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    lost = []
    with RunLock(tmp_path / "new", lost=lost.append) as held:
        os.utime(held.path, (1, 1))
        wait_until(lambda: held.path.stat().st_mtime > 1)
        change(held.path, token="another", host="node-7")
        wait_until(lambda: lost)
    assert "node-7, which took over the lock" in lost[0]


def settings(**options):
    return OptimizationArguments(max_steps=1, **options)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported: use version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            r"parallelism \(tp_size=2\) is not supported",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision=bf16 .* float32; give --precision bfloat16, or"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision=fp8 .*launch with --mixed_precision no"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=INDUCTOR: give --compile true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps=4"),
    ],
)
def test_what_a_launcher_promises_and_training_does_not_keep_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        check_launcher(settings(), environment)


def test_what_a_launcher_promises_and_training_keeps_is_let_through():
    check_launcher(settings(), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    check_launcher(settings(precision="bfloat16"), {"ACCELERATE_MIXED_PRECISION": "bf16"})
    check_launcher(settings(precision="float16"), {"ACCELERATE_MIXED_PRECISION": "fp16"})
    check_launcher(settings(), {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"})


def test_fewer_processes_than_asked_for_are_told(monkeypatch):
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["accelerate", "launch", "--num_processes", "2"])
    assert "asked for 2 processes and started 1" in missing_processes(Accelerator(cpu=True))


def test_the_estimate_of_activations_is_what_autograd_keeps():
    config = tiny_config(image_size=16, hidden_size=64, num_blocks=2, layers_per_block=3, mlp_ratio=4)
    torch.manual_seed(0)
    model = TarFlowModel(config).train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.rand(8, 1, 16, 16), torch.zeros(8, dtype=torch.int64))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    measured = sum(size for address, size in kept.items() if address not in weights)
    shape = {"num_parameters": model.num_parameters(), "micro_batch_size": 8, "shards": 1}
    estimate = Footprint.estimate(config, settings(), **shape)
    assert 0.75 < estimate.activations / measured < 1.25
    recomputed = Footprint.estimate(config, settings(activation_checkpointing=True, precision="bfloat16"), **shape)
    assert recomputed.activations < estimate.activations / 2
    assert readable_bytes(estimate.checkpoint) == f"{model.num_parameters() * 12 / 1e6:.3g} MB"
    assert readable_bytes(7) == "7 bytes"


def poison(monkeypatch, bad):
    """Makes the images of some data steps infinite, whatever the run's own step is."""
    prepare = Augmenter.__call__

    def poisoned(self, batch, step, positions):
        pixel_values, *rest = prepare(self, batch, step, positions)
        return (pixel_values * float("inf") if step in bad else pixel_values, *rest)

    monkeypatch.setattr(Augmenter, "__call__", poisoned)
    return poisoned


RESCUE = {"max_bad_steps": 2, "checkpoint_every": 3, "max_steps": 14, "eval_images": 8, "sample_columns": 1}


def test_a_run_that_diverges_rescues_itself_and_a_stop_changes_no_bit(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Augmenter, "__call__", Augmenter.__call__)
    poisoned = poison(monkeypatch, range(7, 9))
    assert tiny("whole", **RESCUE) == 0
    assert "steps up to 9 went wrong: back to step 6 (rollback 1 of at most 3)" in capsys.readouterr().out
    events = [json.loads(line)["event"] for line in (tmp_path / "whole/history.jsonl").read_text().splitlines()]
    assert events == ["start", "rollback", "finish"]
    stops = iter([8, 11])
    at = [next(stops)]

    def stopped(self, batch, step, positions):
        if at[0] is not None and step == at[0]:
            at[0] = next(stops, None)
            os.kill(os.getpid(), signal.SIGTERM)
        return poisoned(self, batch, step, positions)

    monkeypatch.setattr(Augmenter, "__call__", stopped)
    codes = [tiny("stopped", **RESCUE) for _ in range(3)]
    assert codes == [143, 143, 0]
    found, wanted = (
        torch.load(all_checkpoints(tmp_path / name / "checkpoints")[-1] / "state.pt", weights_only=True)
        for name in ("stopped", "whole")
    )
    assert found["progress"] == wanted["progress"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in wanted["model"].items())
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_run_that_cannot_be_rescued_says_what_is_then_obeyed(tiny, tmp_path, monkeypatch, capsys):
    bad = set(range(7, 12))
    poison(monkeypatch, bad)
    with pytest.raises(
        NonFiniteTrainingError, match=r"went back 1 times .*of step 3, .*--override learning_rate=0.0015"
    ):
        tiny(**RESCUE, max_rollbacks=1)
    assert [step_of(path) for path in all_checkpoints(tmp_path / "run/checkpoints")][-1] == 3
    bad.clear()  # as a lower learning rate does to what a high one makes
    assert tiny(**RESCUE, max_rollbacks=1, override="learning_rate=0.0015") == 0
    assert "changed from step 3 on: learning_rate 0.003 to 0.0015" in capsys.readouterr().out
    assert "learning_rate 0.003 to 0.0015" in (tmp_path / "run/README.md").read_text()


def test_a_run_that_diverges_before_its_first_checkpoint_says_to_start_anew(tiny, monkeypatch):
    poison(monkeypatch, range(0, 5))
    with pytest.raises(NonFiniteTrainingError, match="start anew in another output_dir, with --learning_rate 0.0015"):
        tiny(**RESCUE)


def test_a_finished_run_is_extended_and_keeps_its_best(tiny, tmp_path):
    options = {"eval_images": 8, "sample_columns": 1, "max_steps": 4, "checkpoint_every": 4, "eval_every": 1}
    assert tiny(**options, keep_best=1) == 0
    extended = options | {"max_steps": 7}
    assert tiny(**extended, keep_best=1, allow_changes=True) == 0
    assert rows(tmp_path / "run") == 14
    assert "max_steps 4 to 7" in (tmp_path / "run/README.md").read_text()
    with pytest.raises(ValueError, match="has taken 7 steps: max_steps .* must give at least as many, got 5"):
        tiny(**(options | {"max_steps": 5}), allow_changes=True)


def test_a_run_whose_folder_was_taken_over_ends_without_another_write(tmp_path):
    code = """
import json, sys, time
from tarflow_hf.training import lock
from accelerate import Accelerator
lock.HEARTBEAT_SECONDS = 0.05
with lock.one_writer(lock.Path(sys.argv[1]), Accelerator(cpu=True)):
    path = lock.Path(sys.argv[1], "run.lock")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another", "host": "node-7"}))
    time.sleep(60)
print("still there")
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "node-7, which took over the lock: it ends here" in ended.stderr
    assert "still there" not in ended.stdout
    assert json.loads((tmp_path / "run/run.lock").read_text())["token"] == "another"

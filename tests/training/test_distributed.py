"""Two processes do what one does: same losses, same resumption, one decision; also where FSDP shards the model."""

import json
import math
import signal

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from conftest import tiny_config
from training_runs import Run, environments, exit_codes, kill_and_restart, outcome, start_processes, weights

from tarflow_hf import TarFlowModel
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.lock import RunLock
from tarflow_hf.training.results import NOT_PUSHED
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.sharding import is_sharded, tensor_state
from tarflow_hf.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("runs")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close_runs(folder, expected):
    """The same up to the order in which floating-point numbers are added."""
    assert len(rows(folder)) == len(rows(expected))
    for found, wanted in zip(rows(folder), rows(expected), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert math.isclose(found[name], value, rel_tol=1e-3, abs_tol=1e-4), (wanted["step"], name)
    assert json.loads((folder / "transformer/config.json").read_text())["id2label"]["7"] == "7"


@pytest.fixture(scope="module")
def one(whole_run):
    return whole_run(1).folder


@pytest.fixture(scope="module")
def two(whole_run):
    return whole_run(2)


def test_two_processes_with_half_the_batch_follow_the_losses_of_one(one, two):
    assert "2 processes on cpu" in two.log.read_text()
    assert_close_runs(two.folder, one)


def test_kills_of_two_processes_leave_no_trace(two, tmp_path):
    run = kill_and_restart(tmp_path / "run", 3, seed=1, processes=2)
    assert outcome(run.folder) == outcome(two.folder)
    found, wanted = weights(run.folder), weights(two.folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_sigterm_to_one_process_ends_both_and_one_process_goes_on(one, tmp_path):
    run = Run(tmp_path / "run", processes=2)
    assert run.wait_for(5)
    run.signal(signal.SIGTERM, rank=1)
    assert run.join() == [143, 143]
    assert "stopped by a signal to another process" in run.log.read_text()
    assert_close_runs(Run(tmp_path / "run", gradient_accumulation_steps=2).finish().folder, one)


def test_one_process_that_is_refused_ends_all_and_one_of_them_says_why(tmp_path):
    run = Run(tmp_path / "run", processes=2, push_to_hub=True, hub_model_id="user/digits")  # the Hub is offline
    assert run.join() == [NOT_PUSHED, 1]
    assert run.log.read_text().count("user/digits cannot be written to") == 1
    assert not (tmp_path / "run").exists()
    with RunLock(tmp_path / "run"):
        locked = Run(tmp_path / "run", processes=2)
        assert locked.join() == [1, 1]
    assert locked.log.read_text().count("is written by another run") == 1


def test_data_that_cannot_be_read_ends_all_processes(tmp_path):
    run = Run(tmp_path / "run", processes=2, data=tmp_path / "nowhere")
    assert run.join() == [1, 1]
    assert f"'{tmp_path / 'nowhere'}' is no folder" in run.log.read_text()


def settings(**options):
    return OptimizationArguments(
        **({"max_steps": 8, "learning_rate": 1e-2, "ema_decay": 0.9, "max_grad_norm": 1.0, "seed": 0} | options)
    )


def make_trainer(accelerator, **options):
    torch.manual_seed(0)
    model = TarFlowModel(tiny_config(volume_preserving=options.pop("volume_preserving", False)))
    return Trainer(accelerator, model, settings(**options), Schedule(total_steps=8, warmup_steps=0))


def shares(seed, index, count):
    """The part of a batch of 8 that one of `count` processes gets."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (8,), generator=generator)
    size = 8 // count
    return to_pixel_values(levels)[index * size :][:size], labels[index * size :][:size]


def shard(accelerator):
    """Makes accelerate shard models on the CPU as it does on GPUs; by itself it offers that for GPUs alone."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["TarFlowLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def _take_steps(folder, sharded, volume_preserving):
    """In each of two processes: four steps, saved; four more; and the last four again from what was saved."""
    accelerator = Accelerator(cpu=True)
    if sharded:
        shard(accelerator)
    index, count = accelerator.process_index, accelerator.num_processes
    trainer = make_trainer(accelerator, volume_preserving=volume_preserving)
    results = [trainer.step([shares(seed, index, count)]) for seed in range(4)]
    saved = trainer.state()
    if accelerator.is_main_process:
        torch.save(saved, folder / "saved.pt")
    results += [trainer.step([shares(seed, index, count)]) for seed in range(4, 8)]
    with trainer.evaluation_model() as model:
        averaged = {name: tensor.clone() for name, tensor in tensor_state(model).items()}
    accelerator.wait_for_everyone()
    if sharded:
        shard(accelerator)
    resumed = make_trainer(accelerator, volume_preserving=volume_preserving)
    resumed.load_state(torch.load(folder / "saved.pt", weights_only=True))
    again = [resumed.step([shares(seed, index, count)]) for seed in range(4, 8)]
    report = {
        "processes": count,
        "sharded": is_sharded(trainer.model) and is_sharded(resumed.model),
        "losses": [result.loss for result in results],
        "resumed": again == results[4:],
        "norms": [result.grad_norm for result in results],
        "averaged": averaged,
        "state": trainer.state(),
    }
    torch.save(report, folder / f"{index}.pt")
    trainer.release()
    resumed.release()
    accelerator.end_training()


def assert_close(found, expected):
    """Key biases have no effect on attention: their gradient is rounding noise, which Adam takes whole steps along."""
    for name, tensor in expected.items():
        assert "qkv_proj.bias" in name or torch.allclose(found[name], tensor, atol=1e-3), name


@pytest.mark.parametrize(("sharded", "volume_preserving"), [(True, False), (True, True), (False, True)])
def test_two_processes_take_the_steps_of_one(tmp_path, sharded, volume_preserving):
    """The single process is the oracle for losses, gradient norms, averages and the whole saved state."""
    processes = start_processes(_take_steps, (tmp_path, sharded, volume_preserving), environments(2))
    trainer = make_trainer(Accelerator(cpu=True), volume_preserving=volume_preserving)
    expected = [trainer.step([shares(seed, 0, 1)]) for seed in range(8)]
    with trainer.evaluation_model() as model:
        averaged = {name: tensor.clone() for name, tensor in tensor_state(model).items()}
    assert exit_codes(processes) == [0, 0]
    for index in range(2):
        report = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert (report["processes"], report["sharded"], report["resumed"]) == (2, sharded, True)
        assert torch.allclose(torch.tensor(report["losses"]), torch.tensor([r.loss for r in expected]), atol=1e-4)
        norms = torch.tensor([result.grad_norm for result in expected])
        assert torch.allclose(torch.tensor(report["norms"]), norms, rtol=1e-3)
        assert_close(report["averaged"], averaged)
    state = torch.load(tmp_path / "0.pt", weights_only=True)["state"]
    assert_close(state["model"], trainer.state()["model"])
    goes_on = make_trainer(Accelerator(cpu=True), volume_preserving=volume_preserving)
    goes_on.load_state(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert math.isclose(goes_on.step([shares(4, 0, 1)]).loss, expected[4].loss, abs_tol=1e-4)


def _take_a_bad_step(folder):
    """One of two processes meets an image that is not finite."""
    accelerator = Accelerator(cpu=True)
    trainer = make_trainer(accelerator)
    pixel_values, labels = shares(0, accelerator.process_index, accelerator.num_processes)
    if accelerator.process_index == 1:
        pixel_values[0, 0, 0, 0] = math.inf
    before = {name: tensor.clone() for name, tensor in tensor_state(trainer.model).items()}
    result = trainer.step([(pixel_values, labels)], bad_images=accelerator.process_index, stop=False)
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in tensor_state(trainer.model).items())
    report = {"skipped": result.skipped, "unchanged": unchanged, "bad_images": trainer.progress.skipped_images}
    torch.save(report, folder / f"{accelerator.process_index}.pt")
    trainer.release()
    accelerator.end_training()


def test_a_bad_step_of_one_process_is_skipped_by_both(tmp_path):
    processes = start_processes(_take_a_bad_step, (tmp_path,), environments(2))
    assert exit_codes(processes) == [0, 0]
    for index in range(2):
        report = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert report == {"skipped": True, "unchanged": True, "bad_images": 1}

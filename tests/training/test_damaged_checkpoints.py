"""What is gone on from: a checkpoint as it was written, of this model, with changes that are meant."""

import json
import logging
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config

from tarflow_hf import TarFlowModel
from tarflow_hf.training.checkpoints import CheckpointError, all_checkpoints
from tarflow_hf.training.history import History
from tarflow_hf.training.log import MetricsFile
from tarflow_hf.training.progress import Progress
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.run_checkpoints import RunCheckpoints, proven
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.trainer import Trainer

BASE = {"data": "some/data", "max_steps": 10, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.9}


def make_run(folder, *, content="same", rows=100, classes=("a", "b"), **options):
    arguments = make_arguments(BASE | options)
    torch.manual_seed(0)
    trainer = Trainer(Accelerator(cpu=True), TarFlowModel(tiny_config()), arguments.optimization, Schedule(10, 0))
    configuration = arguments.fixed() | {"num_images": rows, "class_names": list(classes)}
    return RunCheckpoints(folder / "checkpoints", trainer, arguments, configuration, content)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1, torch.tensor([0, 1, 2, 3]))]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("two_steps"))
    for seed in range(2):
        run.trainer.step(images(seed))
        run.save()
    return run.folder


@pytest.fixture
def run(two_steps, tmp_path):
    """Checkpoints of the steps 1 and 2."""
    shutil.copytree(two_steps, tmp_path / "checkpoints")
    return make_run(tmp_path)


def rewrite(path, change):
    """A state of other content and the size that fits, as an old checkpoint without checksums."""
    state = torch.load(path / "state.pt", weights_only=True)
    change(state)
    torch.save(state, path / "state.pt")
    describe(path, lambda about: about["files"].update({"state.pt": (path / "state.pt").stat().st_size}))
    describe(path, lambda about: about.pop("checksums", None))


def describe(path, change):
    about = json.loads((path / "checkpoint.json").read_text())
    change(about)
    (path / "checkpoint.json").write_text(json.dumps(about))


def nan(tensor):
    tensor.view(-1)[0] = float("nan")


KEY = "blocks.0.proj_in.weight"
DAMAGES = {
    "moment of another shape": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        "exp_avg of parameter 0 must be torch.float32 of shape",
    ),
    "a missing weight": (lambda s: s["model"].pop(KEY), f"missing or of another model: {KEY}"),
    "a weight that would be broadcast": (lambda s: s["model"].update({KEY: torch.zeros(1)}), f"model {KEY} must be"),
    "a weight of another type": (lambda s: s["model"].update({KEY: s["model"][KEY].double()}), f"model {KEY} must be"),
    "a weight that is not finite": (lambda s: nan(s["model"][KEY]), f"model {KEY} has 1 values that are not finite"),
    "an average that is not finite": (lambda s: nan(s["ema"]["average"][KEY]), f"average {KEY} has 1 values"),
    "an average that would be broadcast": (lambda s: s["ema"]["average"].update({KEY: torch.zeros(1)}), "average"),
    "no average": (lambda s: s["ema"].pop("average"), "ema average must be a dict"),
    "updates below zero": (lambda s: s["ema"].update(num_updates=-1), "num_updates must be a whole number"),
    "a negative second moment": (lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].sub_(9), "at least 0"),
    "no moments of a parameter": (lambda s: s["optimizer"]["state"].pop(0), "optimizer state must be of"),
    "a moment too few": (lambda s: s["optimizer"]["state"][0].pop("step"), "must have"),
    "no optimizer": (lambda s: s.pop("optimizer"), "the state lacks optimizer"),
    "a step of the future": (lambda s: s["progress"].update(step=7), "progress must be of step 2, got 7"),
    "a negative count": (lambda s: s["progress"].update(bad_steps=-1), "bad_steps must be a whole number"),
    "a sum that is not finite": (
        lambda s: s["progress"].update(window_loss=float("nan")),
        "window_loss must be a finite",
    ),
    "more steps in a window than taken": (
        lambda s: s["progress"].update(window_steps=3),
        "window_steps must be at most 2",
    ),
    "an unknown count": (lambda s: s["progress"].update(steps=3), "no 'steps'"),
    "a scaler that is none": (lambda s: s.update(scaler={"scale": "big"}), "scaler scale must be a finite number"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_named_and_the_older_one_used(run, tmp_path, name, caplog):
    change, message = DAMAGES[name]
    old, new = all_checkpoints(run.folder)
    rewrite(new, change)
    again = make_run(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.resume()
    assert again.trainer.progress.step == 1
    assert new.name in caplog.text
    assert message in caplog.text
    assert f"going on from the older checkpoint {old.name}" in caplog.text
    rewrite(old, DAMAGES["a missing weight"][0])
    with pytest.raises(CheckpointError, match="none of the checkpoints in .* can be used .*Put an undamaged copy"):
        make_run(tmp_path).resume()


def flip(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (path / "state.pt").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "must have the checksum"),
        (lambda path: (path / "state.pt").write_bytes(b"PK" + (path / "state.pt").read_bytes()), "must have .* bytes"),
        (lambda path: (path / "state.pt").unlink(), "is missing"),
        (lambda path: (path / "checkpoint.json").write_text("null"), "must hold an object, got 'None'"),
        (lambda path: (path / "checkpoint.json").write_text("[]"), "must hold an object"),
        (lambda path: (path / "checkpoint.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "checkpoint.json").unlink(), "cannot be read"),
        (lambda path: describe(path, lambda about: about.update(files=None)), "must hold 'files', a dict, got None"),
        (lambda path: describe(path, lambda about: about.update(files={})), "state.pt"),
        (lambda path: describe(path, lambda about: about.update(step=9)), "of the step of its folder, got 9"),
        (lambda path: describe(path, lambda about: about.update(checksums=[])), "must hold 'checksums'"),
        (lambda path: rewrite(path, lambda state: state.clear()), "the state lacks"),
    ],
)
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(run, tmp_path, damage, message, caplog):
    damage(all_checkpoints(run.folder)[-1])
    again = make_run(tmp_path)
    again.resume()
    assert again.trainer.progress.step == 1
    assert re.search(message, caplog.text)
    again.trainer.step(images(1))
    again.save()  # replaces the damaged one, and pruning meets nothing it cannot read
    assert make_run(tmp_path).resume() == {}


def test_a_file_that_is_no_state_at_all_is_named(run, tmp_path, caplog):
    new = all_checkpoints(run.folder)[-1]
    rewrite(new, lambda state: None)
    for text in (b"", b"garbage" * 100):
        (new / "state.pt").write_bytes(text)
        describe(new, lambda about, text=text: about["files"].update({"state.pt": len(text)}))
        again = make_run(tmp_path)
        again.resume()
        assert again.trainer.progress.step == 1
        assert "cannot be read" in caplog.text


def test_a_kill_between_the_two_moves_of_a_replacement_costs_nothing(run):
    old, new = all_checkpoints(run.folder)
    new.rename(new.with_name(f".replaced-{new.name}"))
    assert all_checkpoints(run.folder) == [old, new]


def test_what_is_fixed_and_what_may_be_changed_knowingly(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"learning_rate was 0.001 .*--override learning_rate=0.0005 .*allow_ch"):
        make_run(tmp_path, learning_rate=5e-4).resume()
    wanted = {"learning_rate": [1e-3, 5e-4]}
    assert make_run(tmp_path, override=["learning_rate=5e-4"]).resume() == wanted
    assert make_run(tmp_path, learning_rate=5e-4, allow_changes=True).resume() == wanted
    assert make_run(tmp_path, override=["max_steps=30"]).resume() == {"max_steps": [10, 30]}
    assert make_run(tmp_path, override="weight_decay=0.5").trainer.settings.weight_decay == 0.5
    with pytest.raises(CheckpointError, match="seed cannot change within a run"):
        make_run(tmp_path, override=["seed=3"], allow_changes=True).resume()
    with pytest.raises(CheckpointError, match="class_names cannot change within a run"):
        make_run(tmp_path, classes=("a", "c"), allow_changes=True).resume()
    with pytest.raises(CheckpointError, match=r"ema_decay was 0.9 and is now None.*--override NAME=VALUE"):
        make_run(tmp_path, ema_decay=None).resume()
    assert make_run(tmp_path, override=["ema_decay=null"]).resume() == {"ema_decay": [0.9, None]}
    with pytest.raises(ValueError, match="override must be NAME=VALUE, got 'learning_rate'"):
        make_run(tmp_path, override=["learning_rate"])


def test_data_may_move_and_may_not_be_exchanged(run, tmp_path):
    assert make_run(tmp_path, data="else/where").resume() == {"data": ["some/data", "else/where"]}
    with pytest.raises(CheckpointError, match="data had other images"):
        make_run(tmp_path, content="other").resume()
    with pytest.raises(CheckpointError, match="num_images was 100 and is now 90"):
        make_run(tmp_path, rows=90).resume()
    assert "num_images" in make_run(tmp_path, rows=90, override=["data=new/data"]).resume()


def test_a_changed_setting_reaches_the_optimizer(run, tmp_path):
    again = make_run(tmp_path, override=["weight_decay=0.5", "adam_beta2=0.9"])
    again.resume()
    assert again.trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert again.trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    without = make_run(tmp_path / "none", ema_decay=None)
    without.trainer.step(images(0))
    without.save()
    with_average = make_run(tmp_path / "none", override=["ema_decay=0.9"])
    with_average.resume()
    name, average = next(iter(with_average.trainer.ema.average.items()))
    assert torch.equal(average, dict(with_average.trainer.model.named_parameters())[name])


def test_a_checkpoint_without_checksums_and_younger_options_is_gone_on_from(run, tmp_path):
    newest = all_checkpoints(run.folder)[-1]
    describe(newest, lambda about: [about.pop(name) for name in ("checksums", "content")])
    describe(newest, lambda about: about["configuration"].pop("weight_decay"))
    state = torch.load(newest / "state.pt", weights_only=True)
    for name in ("first_loss", "rollbacks", "skipped_data"):
        state["progress"].pop(name)
    del state["scaler"]
    torch.save(state, newest / "state.pt")
    describe(newest, lambda about: about["files"].update({"state.pt": (newest / "state.pt").stat().st_size}))
    again = make_run(tmp_path)
    assert again.resume() == {}
    assert again.trainer.progress.step == 2


def test_the_scale_of_half_precision_is_resumed(tmp_path):
    first, second = (make_run(tmp_path / "half", precision="float16") for _ in range(2))
    for seed in range(3):
        first.trainer.step(images(seed))
    first.save()
    second.resume()
    assert second.trainer.scaler.state_dict() == first.trainer.scaler.state_dict()
    for seed in range(3, 6):
        assert second.trainer.step(images(seed)) == first.trainer.step(images(seed))
    full = make_run(tmp_path / "full")
    expected = [full.trainer.step(images(seed)).loss for seed in range(3)]
    again = make_run(tmp_path / "other", precision="float16")
    losses = [again.trainer.step(images(seed)).loss for seed in range(3)]
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), atol=2e-2)


def test_overflow_of_half_precision_lowers_the_scale_and_is_no_bad_step(tmp_path):
    run = make_run(tmp_path, precision="float16")
    run.trainer.step(images(0))
    run.trainer.scaler.update(2.0**40)
    run.trainer.step(images(0))
    assert run.trainer.progress.skipped_steps == 1
    assert run.trainer.progress.bad_steps == 0
    assert run.trainer.scaler.get_scale() == 2.0**39


def test_milestones_and_the_best_are_kept_beside_the_newest(tmp_path):
    run = make_run(tmp_path, keep_every=3, keep_checkpoints=1)
    for seed in range(8):
        run.trainer.step(images(seed))
        run.save(best=[2])
    assert [path.name[-1] for path in all_checkpoints(run.folder)] == ["2", "3", "6", "7", "8"]  # 7 is proven sound


def test_bad_steps_never_evict_the_last_sound_checkpoint(tmp_path):
    run = make_run(tmp_path, keep_checkpoints=1)
    for seed in range(3):
        run.trainer.step(images(seed))
        run.save()
    pixel_values, labels = images(3)[0]
    for _ in range(4):
        run.trainer.step([(pixel_values * float("inf"), labels)])
        run.save()
    assert [path.name[-1] for path in all_checkpoints(run.folder)] == ["2", "7"]
    assert run.go_back() == 2
    assert [path.name[-1] for path in all_checkpoints(run.folder)] == ["2"]
    assert proven([], Progress(step=3)) is None


def test_a_foreign_or_damaged_metrics_file_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for text in ("garbage\n", "[1]\n", '{"loss": 1}\n', '{"step": "3"}\n', "[" * 100_000 + "\n"):
        path.write_text('{"step": 1, "loss": 0.5}\n' + text)
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, must be an object with a whole number 'step'"):
            metrics.rewind(5)
        assert path.read_text().endswith(text)
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2')
    assert metrics.rewind(1) == 0


def test_the_history_tells_the_changes_that_stand(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.append("start", 0, {})
    history.append("change", 20, {"max_steps": [10, 30]})
    history.append("start", 10, {})  # from an older checkpoint: the change of step 20 never was
    history.append("change", 10, {"max_steps": [10, 40]})
    assert history.changes() == {"step 10": "max_steps 10 to 40"}

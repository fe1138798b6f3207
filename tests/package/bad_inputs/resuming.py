"""Checkpoints and folders that a training run is started on."""

import json

import torch
from accelerate import Accelerator
from conftest import tiny_config

from bad_inputs import Bad
from tarflow_hf import TarFlowModel
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.checkpoints import DamagedCheckpointError, read_state, write_checkpoint
from tarflow_hf.training.inspection import check_state
from tarflow_hf.training.launchers import check_launcher
from tarflow_hf.training.lock import RunLock, RunLockedError
from tarflow_hf.training.log import MetricsFile
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.sharding import tensor_state
from tarflow_hf.training.trackers import run_id
from tarflow_hf.training.trainer import Trainer

WEIGHT = "blocks.0.proj_in.weight"


def sound(folder):
    """A checkpoint of step 10."""
    return write_checkpoint(folder / "checkpoints", 10, {"weight": torch.ones(100)}, {"seed": 0}, keep=2)


def file(name, damage, message):
    """A row: a file of a checkpoint is damaged."""

    def call(folder):
        path = sound(folder)
        damage(path)
        read_state(path)

    return Bad(name, call, DamagedCheckpointError, message)


def manifest(name, text, message):
    return file(name, lambda path: (path / "checkpoint.json").write_text(text), message)


def about(name, message, **values):
    def damage(path):
        said = json.loads((path / "checkpoint.json").read_text())
        (path / "checkpoint.json").write_text(json.dumps(said | values))

    return file(name, damage, message)


def state(name, damage, message):
    """A row: a state is damaged before it is checked."""

    def call(folder):
        settings = OptimizationArguments(max_steps=10, batch_size=2, ema_decay=0.9)
        trainer = Trainer(Accelerator(cpu=True), TarFlowModel(tiny_config()), settings, Schedule(10, 0))
        trainer.step([(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))])
        saved = trainer.state()
        damage(saved)
        parameters = trainer.optimizer.param_groups[0]["params"]
        check_state(saved, model=tensor_state(trainer.model), parameters=parameters, step=1)

    return Bad(name, call, ValueError, message)


def metrics(name, text):
    def call(folder):
        (folder / "metrics.jsonl").write_text(text)
        MetricsFile(folder / "metrics.jsonl").rewind(10)

    return Bad(name, call, ValueError, "metrics.jsonl, line 1, must be an object with a whole number 'step'")


def tracker(name, text, message):
    def call(folder):
        (folder / "trackers.json").write_text(text)
        run_id(folder / "trackers.json")

    return Bad(name, call, OSError, f"trackers.json {message}" if "wandb" not in message else message)


def flip(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[-300] ^= 1
    (path / "state.pt").write_bytes(data)


def two_writers(folder):
    with RunLock(folder / "run"):
        RunLock(folder / "run").acquire()


def launcher(name, message, **environment):
    settings = OptimizationArguments(max_steps=1)
    return Bad(name, lambda folder: check_launcher(settings, environment), ValueError, message)


ROWS = [
    manifest("checkpoint.json of null", "null", r"checkpoint.json must hold an object, got 'None'"),
    manifest("checkpoint.json of a list", "[]", r"checkpoint.json must hold an object, got '\[\]'"),
    manifest("checkpoint.json cut short", '{"step": 10, "conf', r"checkpoint.json cannot be read"),
    manifest("checkpoint.json deeply nested", "[" * 100_000, r"checkpoint.json cannot be read"),
    about("files of null", "must hold 'files', a dict, got None", files=None),
    about("a size that is text", "must hold the sizes of 'files'", files={"state.pt": "5"}),
    about("a file outside the folder", r"\.\./state.pt is missing", files={"../state.pt": 1, "state.pt": 1}),
    about("another step", "must be of the step of its folder, got 11", step=11),
    about("a step that is text", "must hold 'step', a int, got '10'", step="10"),
    file("a flipped bit", flip, "state.pt must have the checksum"),
    file("a truncated state", lambda path: (path / "state.pt").write_bytes(b"PK"), r"must have \d+ bytes, got 2"),
    file("no state", lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
    state("a missing weight", lambda s: s["model"].pop(WEIGHT), f"missing or of another model: {WEIGHT}"),
    state("a weight of one number", lambda s: s["model"].update({WEIGHT: torch.zeros(1)}), f"{WEIGHT} must be torch"),
    state("a weight of NaN", lambda s: s["model"][WEIGHT].fill_(float("nan")), f"{WEIGHT} has 64 values"),
    state("an average of inf", lambda s: s["ema"]["average"][WEIGHT].fill_(float("inf")), f"average {WEIGHT} has"),
    state(
        "a moment of one number",
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        "optimizer exp_avg of parameter 0 must be torch.float32 of shape",
    ),
    state(
        "a weight without values", lambda s: s["model"].update({WEIGHT: s["model"][WEIGHT].to("meta")}), "meta device"
    ),
    state(
        "a sparse weight", lambda s: s["model"].update({WEIGHT: s["model"][WEIGHT].to_sparse()}), "layout torch.spar"
    ),
    state("a weight of integers", lambda s: s["model"].update({WEIGHT: s["model"][WEIGHT].long()}), "got torch.int64"),
    state("a surplus weight", lambda s: s["model"].update(more=torch.ones(1)), "missing or of another model: more"),
    state("a moment missing", lambda s: s["optimizer"]["state"][0].pop("exp_avg"), "of parameter 0 must have"),
    state("a moment below 0", lambda s: s["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1), "must be at least 0"),
    state("a parameter untrained", lambda s: s["optimizer"]["state"].pop(0), "must be of 66 parameters, got 65"),
    state(
        "an optimizer ahead of the run",
        lambda s: s["optimizer"]["state"][0].update(step=torch.tensor(300.0)),
        "optimizer step of parameter 0 must be 0 ... 1, got 300",
    ),
    state(
        "an optimizer before the run",
        lambda s: s["optimizer"]["state"][0].update(step=torch.tensor(-3.0)),
        "optimizer step of parameter 0 must be 0 ... 1, got -3",
    ),
    state("truth for a count", lambda s: s["progress"].update(skipped_steps=True), "skipped_steps must be a whole"),
    state("progress of text", lambda s: s.update(progress="far"), "progress must be a dict, got str"),
    state("a step of the future", lambda s: s["progress"].update(step=5), "progress must be of step 1, got 5"),
    metrics("metrics of garbage", "garbage\n"),
    metrics("metrics of lists", "[1]\n"),
    metrics("metrics of half a step", '{"step": 1.5}\n'),
    metrics("metrics before the start", '{"step": -1}\n'),
    metrics("metrics with zeros behind", '{"step": 1}\0\0\n'),
    tracker("trackers of nothing", "", "is cut short or not JSON"),
    tracker("trackers in a list", "[]", "must hold a JSON object, got .*list"),
    tracker("trackers by number", '{"wandb": 3}', "wandb must be the id of a run, got 3"),
    metrics("metrics of something else", '{"epoch": 1}\n'),
    Bad("two writers", two_writers, RunLockedError, "run is written by another run: process .* on .*, since"),
    launcher("FSDP version 1", "FSDP version 1 is not supported: use version 2", ACCELERATE_USE_FSDP="true"),
    launcher("DeepSpeed", "DeepSpeed is not supported", ACCELERATE_USE_DEEPSPEED="true"),
    launcher("another precision", "mixed_precision=fp16 and the recipe", ACCELERATE_MIXED_PRECISION="fp16"),
]

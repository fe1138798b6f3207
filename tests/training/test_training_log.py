"""What a run reports: lines that survive and rewind, and reach the trackers; samples and held-out bits."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from conftest import tiny_config, tiny_model
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tarflow_hf import TarFlowModel, TarFlowPipeline
from tarflow_hf.images.batches import Sample, StoredImages
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.images.processing import ImageFormat, to_pixel_values
from tarflow_hf.images.reading import open_image
from tarflow_hf.images.sources import ImageData
from tarflow_hf.training.arguments import OptimizationArguments, OutputArguments
from tarflow_hf.training.augmentation import add_training_noise
from tarflow_hf.training.history import History
from tarflow_hf.training.launchers import make_accelerator
from tarflow_hf.training.log import MetricsFile, TrainingLog
from tarflow_hf.training.overview import overview
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.speed import training_flops
from tarflow_hf.training.trackers import run_id, start_trackers, track_picture
from tarflow_hf.training.trainer import Trainer
from tarflow_hf.training.validation import held_out_bits_per_dim, make_pipeline, sample_grid


class ListTracker(GeneralTracker):
    """A tracker that remembers."""

    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.logged = {}, []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **kwargs):
        self.logged.append((step, values))


def test_metrics_rewind_to_what_a_checkpoint_has_seen(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append({"step": step, "loss": 1 / step})
        metrics.append({"step": step, "validation_bits_per_dim": 2 / step})
    before = metrics.path.read_bytes()
    with metrics.path.open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    metrics.rewind(20)
    lines = metrics.path.read_bytes().splitlines()
    assert lines == before.splitlines()[:3]
    assert metrics.curve("loss") == ([10, 20], [0.1, 0.05])
    assert metrics.curve("validation_bits_per_dim") == ([10], [0.2])


def test_a_metrics_file_begins_empty(tmp_path):
    metrics = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    assert metrics.rows() == []
    metrics.rewind(0)
    assert metrics.path.read_text() == ""


def test_metrics_hold_what_the_run_computed_and_trackers_its_speed_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    start_trackers(
        accelerator, {"learning_rate": 1e-3, "layers": [1, 2], "eval_split": None}, folder=tmp_path / "digits"
    )
    assert tracker.config == {"learning_rate": 1e-3, "layers": "[1, 2]", "eval_split": "None"}
    with TrainingLog(accelerator, tmp_path / "metrics.jsonl", total_steps=4, batch_size=8, start=2) as log:
        log.advance(3)
        log.write(3, {"loss": 0.5, "bits_per_dim": 4.25, "skipped_steps": 1, "grad_norm": 2.0})
        log.speed(3)
        log.write(3, {"validation_bits_per_dim": 4.5})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 3, "loss": 0.5, "bits_per_dim": 4.25, "skipped_steps": 1, "grad_norm": 2.0},
        {"step": 3, "validation_bits_per_dim": 4.5},
    ]
    assert [step for step, _ in tracker.logged] == [3, 3, 3]
    assert tracker.logged[1][1]["images_per_second"] > 0
    shown = capsys.readouterr().err
    for text in ("loss=0.5", "bits/dim=4.25", "images/s=", "val bits/dim=4.5", "skipped_steps=1", "3/4"):
        assert text in shown
    assert "skipped_images" not in shown


def test_off_a_terminal_every_line_of_metrics_is_a_plain_line(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    options = {"total_steps": 400, "batch_size": 8, "most_images_per_second": 1e9}
    values = {"loss": 0.5, "bits_per_dim": 4.25, "learning_rate": 1e-4, "grad_norm": 2.0, "skipped_steps": 1}
    with TrainingLog(Accelerator(cpu=True), path, start=200, **options) as log:
        for step in (210, 220):
            log.advance(step)
            log.write(step, values)
            log.speed(step)
        log.write(220, {"validation_bits_per_dim": 4.5})
    shown = capsys.readouterr()
    assert shown.err == ""
    first, second, held_out = shown.out.splitlines()
    assert re.fullmatch(
        r"step 210/400, loss 0.5000, bits 4.2500, lr 1.00e-04, grad norm 2, 1 steps skipped, "
        r"[\d.e+]+ images/s, \d+\.\d\d h left, \d+\.\d GB, MFU \d+\.\d%",
        first,
    )
    assert second.startswith("step 220/400, ")
    assert held_out == "step 220/400, held-out bits 4.5000"
    times = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in times] == [210, 220]
    assert times[0].keys() == {"step", "images_per_second", "hours_left", "peak_memory_gb", "mfu", "time"}
    TrainingLog(Accelerator(cpu=True), path, start=210, **options)  # goes on from a checkpoint
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_operations_are_those_that_torch_counts(volume_preserving):
    options = {"num_blocks": 2, "layers_per_block": [1, 3], "volume_preserving": volume_preserving}
    config = tiny_config(num_classes=0, hidden_size=64, head_dim=8, **options)
    images = torch.zeros(1, config.num_channels, 8, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        TarFlowModel(config)(images).loss.backward()
    assert math.isclose(training_flops(config), counter.get_total_flops(), rel_tol=1e-3)


def test_a_run_keeps_its_id_and_its_pictures_reach_the_trackers(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = run_id(tmp_path / "run" / "trackers.json")
    assert run_id(tmp_path / "run" / "trackers.json") == first
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert run_id(tmp_path / "run" / "trackers.json") == "mine"
    tracker = ListTracker()
    tracker.log_images = lambda values, step: tracker.log(values, step)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    start_trackers(accelerator, {}, folder=tmp_path / "run")
    Image.new("RGB", (4, 3), "red").save(tmp_path / "grid.png")
    track_picture(accelerator, "samples", tmp_path / "grid.png", 7)
    ((step, values),) = tracker.logged
    assert (step, values["samples"][0].shape) == (7, (3, 4, 3))
    track_picture(accelerator, "samples", tmp_path / "none.png", 8)
    assert "list did not take the picture samples of step 8" in caplog.text


def test_a_run_reports_to_the_trackers_it_names(tmp_path, monkeypatch):
    settings = OptimizationArguments(max_steps=1)
    assert make_accelerator(settings, trackers=[], folder=tmp_path).log_with == []
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    assert list(map(str, make_accelerator(settings, trackers=["wandb"], folder=tmp_path).log_with)) == ["wandb"]


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not installed: pip install comet"):
        make_accelerator(OptimizationArguments(max_steps=1), trackers=["comet"], folder=tmp_path)


class Pictures(StoredImages):
    """Images in memory."""

    def __init__(self, count):
        super().__init__(ImageData([None] * count, "pictures", "image", "label", ("a",) * 4), ImageFormat(8, 1))
        levels = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
        self.samples = [Sample(torch.from_numpy(level), index % 4) for index, level in enumerate(levels)]


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_held_out_bits_are_the_mean_over_images_however_they_are_batched(noise_type):
    model = tiny_model(dtype=torch.float32, noise_type=noise_type, volume_preserving=noise_type == "uniform")
    images = Pictures(7)
    bits = [
        held_out_bits_per_dim(model, images, Accelerator(cpu=True), batch_size=size, num_workers=0)
        for size in (7, 3, 1)
    ]
    assert math.isclose(bits[0], bits[1], rel_tol=1e-5)
    assert math.isclose(bits[0], bits[2], rel_tol=1e-5)
    one = held_out_bits_per_dim(model, Pictures(1), Accelerator(cpu=True), batch_size=4, num_workers=0)
    noisy = add_training_noise(to_pixel_values(images[0].levels[None]), model.config, [1_000_003])
    log_prob = model.log_prob(noisy, torch.tensor([images[0].label])).item()
    assert math.isclose(one, (-log_prob / 64 + math.log(128)) / math.log(2), rel_tol=1e-5)


def test_a_model_without_labels_is_evaluated_without_them():
    model = tiny_model(dtype=torch.float32, num_classes=0)
    bits = held_out_bits_per_dim(model, Pictures(3), Accelerator(cpu=True), batch_size=2, num_workers=0)
    assert math.isfinite(bits)


def test_a_grid_has_a_row_a_class_and_is_made_by_the_pipeline(tmp_path):
    model = tiny_model(dtype=torch.float32, std=0.05)
    settings = OutputArguments(sample_columns=3, eval_batch_size=5, guidance_scale=1.5, denoising_strength=0.5)
    sample_grid(model, settings, Accelerator(cpu=True), tmp_path / "grids" / "grid.png")
    sheet = np.array(Image.open(tmp_path / "grids" / "grid.png").convert("L"))
    names = sheet.shape[1] - 3 * 66  # width of the class names
    assert sheet.shape[0] == 4 * 66
    assert names > 0
    pipe = TarFlowPipeline(transformer=model, guidance_scale=1.5, denoising_strength=0.5)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(2_000_003 + index) for index in range(12)]
    images = pipe([0, 1, 2, 3], num_images_per_label=3, generator=generators).images
    for index, image in enumerate(images):
        top, left = index // 3 * 66, names + index % 3 * 66
        drawn = sheet[top : top + 64 : 8, left : left + 64 : 8].astype(int)
        assert np.abs(drawn - np.array(image)).max() <= 1  # up to the decoding tolerance


def test_many_classes_are_sampled_from_first_to_last_and_none_without_labels(tmp_path):
    settings = OutputArguments(sample_columns=1, sample_rows=2)
    for name, classes in (("some", 4), ("none", 0)):
        model = tiny_model(dtype=torch.float32, std=0.05, num_classes=classes)
        sample_grid(model, settings, Accelerator(cpu=True), tmp_path / f"{name}.png")
        width, height = open_image(tmp_path / f"{name}.png").size
        assert height == 2 * 66
        assert width > 66 if classes else width == 66


def test_the_pipeline_has_the_defaults_of_the_run():
    settings = OutputArguments(guidance_scale=3.0, guidance_schedule="constant", attention_temperature=0.5)
    pipe = make_pipeline(tiny_model(dtype=torch.float32), settings)
    assert (pipe.config.guidance_scale, pipe.config.guidance_schedule) == (3.0, "constant")
    assert (pipe.config.attention_temperature, pipe.config.denoising_strength) == (0.5, 1.0)
    assert tiny_config().noise_std == pipe.transformer.config.noise_std


def test_the_first_line_tells_the_ids_of_classes_with_numbers_for_names(tmp_path):
    for names, told in (
        ({0: "1", 1: "2"}, ", 2 classes ('1' has the id 0, '2' has the id 1), "),
        ({0: "0", 1: "1"}, ", 2 classes, "),
    ):
        model = TarFlowModel(tiny_config(num_classes=len(names), id2label=names))
        trainer = Trainer(Accelerator(cpu=True), model, OptimizationArguments(max_steps=1), Schedule(1, 0))
        assert told in overview(tmp_path, trainer, BatchLayout(4), images="9 images", total_steps=1)


def test_a_line_of_the_history_that_was_cut_short_goes(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.append("change", 3, {"max_steps": [3, 4]})
    with history.path.open("a") as file:
        file.write('{"time": "2026')
    history.append("start", 4, {})
    assert history.changes() == {"step 3": "max_steps 3 to 4"}
    assert [json.loads(line)["event"] for line in history.path.read_text().splitlines()] == ["change", "start"]
    history.path.write_text('{"time": "2026')
    history.append("start", 0, {})
    assert len(history.path.read_text().splitlines()) == 1

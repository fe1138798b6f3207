"""What a run leaves when something at its end goes wrong: the model first, and a way on."""

import json
import shutil
import socket

import datasets
import pytest
import torch
from training_runs import Run, weights

from examples import sample
from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.results import PushError, Results, prepare_push

DIGITS = "./examples/data/digits"


@pytest.fixture(scope="module")
def pictureless(tmp_path_factory):
    """A run in whose folder no picture can be written."""
    folder = tmp_path_factory.mktemp("pictureless") / "run"
    for name in ("samples.png", "curve.png"):
        (folder / name).mkdir(parents=True)
    (folder / "grids").write_text("in the way")
    return Run(folder).finish()


def test_pictures_that_fail_are_warnings_and_cost_no_model(pictureless):
    pipe = TarFlowPipeline.from_pretrained(pictureless.folder)
    found, state = pipe.transformer.state_dict(), weights(pictureless.folder)
    assert all(torch.equal(found[n.removeprefix("saved.")], t) for n, t in state.items() if n.startswith("saved."))
    log = pictureless.log.read_text()
    for name in ("samples.png", "curve.png", "grids/step-00000008.png", "grids/step-00000016.png"):
        assert f"the picture {pictureless.folder / name} was not written: " in log


def test_the_log_of_a_job_has_a_line_for_each_line_of_metrics(pictureless):
    lines = pictureless.log.read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and "loss" in line]
    assert len(steps) == 18
    assert all("images/s" in line and "h left" in line and len(line) < 160 for line in steps)
    times = [json.loads(line) for line in (pictureless.folder / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in times] == list(range(1, 19))


def test_a_checkpoint_and_a_run_under_way_are_sampled_like_a_pipeline(pictureless, tmp_path):
    checkpoint = max(pictureless.folder.glob("checkpoints/step-*"))
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    for place, output in ((pictureless.folder, "a.png"), (checkpoint, "b.png"), (run, "c.png")):
        options = ["--class_labels", "3", "--num_images_per_label", "2", "--output", str(tmp_path / output)]
        sample.main([str(place), *options])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_an_unreachable_hub_is_told_at_the_start_and_at_the_end_with_the_way_on(pictureless, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    options = {"output_dir": str(pictureless.folder), "push_to_hub": True, "hub_model_id": "user/digits"}
    arguments = make_arguments({"data": "user/data", "max_steps": 1, **options})
    results = Results(arguments, None, num_eval_images=0, unit=DensityUnit(64))
    with pytest.raises(PushError, match=r"user/digits cannot be written to: .*; nothing was trained"):
        prepare_push(arguments.output)
    with pytest.raises(PushError, match="the finished model lies in") as caught:
        results.push()
    command = f"push_folder('{pictureless.folder}', 'user/digits')"
    assert command in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_held_out_images_are_drawn_evenly_from_the_classes_and_always_the_same():
    def labels(count):
        _, held_out = load_image_data(
            DataArguments(data=DIGITS, eval_split="test"), class_conditional=True, eval_images=count
        )
        rows = [row["image"]["bytes"] for row in held_out.rows]
        return rows, [*held_out.rows["label"]]

    small, of_small = labels(30)
    large, _ = labels(60)
    assert sorted(of_small) == sorted(list(range(10)) * 3)
    assert set(small) <= set(large)
    assert labels(30)[0] == small
    assert len(labels(None)[0]) == len(labels(10_000)[0]) == 297


def test_folders_of_save_to_disk_and_streamed_text_labels(tmp_path):
    digits = datasets.load_dataset(DIGITS)
    digits.save_to_disk(tmp_path / "both")
    digits["train"].save_to_disk(tmp_path / "one")
    for name in ("both", "one"):
        data, _ = load_image_data(DataArguments(data=str(tmp_path / name)), class_conditional=True)
        assert (len(data.rows), data.label_column) == (1500, "label")
    cells = {"image": [{"bytes": b"", "path": None}] * 2, "kind": ["lynx", "tabby"]}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / "cats.parquet")
    where = {"data": str(tmp_path / "cats.parquet"), "label_column": "kind", "streaming": True}
    data, _ = load_image_data(DataArguments(**where, class_names=("tabby", "lynx")), class_conditional=True)
    assert data.label_id("lynx") == 1
    with pytest.raises(ValueError, match="name the classes with class_names"):
        load_image_data(DataArguments(**where), class_conditional=True)


def test_trackers_in_one_text_and_whole_numbers_with_an_exponent():
    arguments = make_arguments({"data": "d", "max_steps": "1e5", "report_to": "tensorboard, wandb", "log_every": 2e1})
    assert arguments.optimization.max_steps == 100_000
    assert arguments.output.report_to == ("tensorboard", "wandb")
    assert arguments.output.log_every == 20
    with pytest.raises(ValueError, match=r"log_every must be int, got 2.5"):
        make_arguments({"data": "d", "max_steps": 1, "log_every": 2.5})

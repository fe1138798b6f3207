"""Options: one name in recipes and on the command line, typed, and with no contradiction let through."""

import dataclasses
import subprocess
import sys
import traceback
import typing
from pathlib import Path

import pytest
import yaml

from tarflow_hf import TarFlowConfig
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.arguments import ModelArguments
from tarflow_hf.training.recipes import convert, make_arguments, parse_arguments, read_recipe
from tarflow_hf.training.schedule import Schedule

MINIMAL = {"data": "some/data", "max_steps": 10}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: ../images\nepochs: 3\nlearning_rate: 1e-3\nlayers_per_block: [1, 2]\nnum_blocks: 2\n")
    return path


def test_the_command_line_overrides_single_values(recipe):
    arguments = parse_arguments(
        [str(recipe), "--batch_size", "32", "--learning_rate=2e-4", "--streaming", "--max_steps", "7"],
        default_recipe="nowhere.yaml",
    )
    assert arguments.optimization.batch_size == 32
    assert arguments.optimization.learning_rate == 2e-4
    assert arguments.data.streaming
    assert arguments.model.layers_per_block == [1, 2]
    assert (arguments.optimization.epochs, arguments.optimization.max_steps) == (None, 7)


def test_the_default_recipe_is_read_where_none_is_named(recipe):
    arguments = parse_arguments(["--report_to", "tensorboard"], default_recipe=recipe)
    assert arguments.optimization.learning_rate == 1e-3
    assert arguments.output.report_to == ("tensorboard",)


def test_data_paths_are_relative_to_the_recipe(recipe):
    assert read_recipe(recipe)["data"] == str(recipe.parent.parent / "images")


@pytest.mark.parametrize("switch", [["--skip_bad_images"], ["--skip_bad_images", "true"], ["--skip_bad_images=yes"]])
def test_switches_need_no_value(recipe, switch):
    assert parse_arguments([str(recipe), *switch], default_recipe=recipe).data.skip_bad_images


def test_an_unknown_option_is_named(recipe, capsys):
    recipe.write_text("data: x\nepohcs: 3\n")
    with pytest.raises(ValueError, match="unknown option 'epohcs'"):
        parse_arguments([str(recipe)], default_recipe=recipe)
    with pytest.raises(SystemExit):
        parse_arguments(["--batchsize", "3"], default_recipe=recipe)
    assert "--batchsize" in capsys.readouterr().err


def test_a_recipe_that_is_no_mapping_is_refused(recipe):
    recipe.write_text("- data\n")
    with pytest.raises(ValueError, match="must hold a mapping of options, got list"):
        read_recipe(recipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 2.5}, "batch_size must be int, got 2.5"),
        ({"batch_size": True}, "batch_size must be int, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"streaming": "maybe"}, "streaming must be bool, got 'maybe'"),
        ({"precision": "fp16"}, "precision must be one of float32, bfloat16, float16, got 'fp16'"),
        ({"layers_per_block": [1, "two"]}, r"layers_per_block must be int or list\[int\]"),
        ({"report_to": ["csv"]}, "report_to must be"),
        ({"epochs": 3}, "either epochs or max_steps"),
        ({"max_steps": None}, "either epochs or max_steps"),
        ({"warmup_epochs": 1, "warmup_steps": 5}, "warmup_epochs or warmup_steps"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"min_learning_rate": 1}, "min_learning_rate must be between 0 and learning_rate"),
        ({"label_drop": 1.5}, r"label_drop must be in \[0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"denoising_strength": -1.0}, "denoising_strength must be at least 0, got -1.0"),
        (
            {"noise_type": "uniform", "denoising_strength": 1.0},
            "denoising_strength must be 0 for noise_type='uniform'",
        ),
        ({"num_refinement_steps": 9}, "num_refinement_steps must be 1 without noise_conditioning, got 9"),
        ({"data": ""}, "data must name a data set"),
        ({"streaming": True, "cache_images": True}, "contradict each other"),
        ({"streaming": True, "max_steps": None, "epochs": 2}, "no known length: give max_steps"),
        ({"streaming": True, "warmup_epochs": 1}, "no known length: give warmup_steps"),
        ({"eval_data": "elsewhere"}, "needs eval_split"),
        ({"num_channels": 2}, "num_channels 1"),
    ],
)
def test_a_wrong_value_or_contradiction_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(MINIMAL | values)


def test_text_that_spells_a_number_is_one_only_where_a_number_may_stand():
    assert convert("learning_rate", "1e-4", float) == 1e-4
    assert convert("data", "1e-4", str) == "1e-4"
    assert convert("epochs", None, float | None) is None


def test_the_model_options_are_those_of_the_configuration():
    defaults = {field.name: field.default for field in dataclasses.fields(ModelArguments)}
    assert defaults.pop("class_conditional") is True
    config = TarFlowConfig()
    assert defaults == {name: getattr(config, name) for name in defaults}
    hints = typing.get_type_hints(ModelArguments)
    assert hints["noise_type"] == TarFlowConfig.__annotations__["noise_type"]
    made = ModelArguments(num_blocks=3, noise_type="uniform").to_config(["cat", "dog"])
    assert (made.num_blocks, made.noise_type, made.id2label) == (3, "uniform", {0: "cat", 1: "dog"})
    assert ModelArguments().to_config([]).num_classes == 0


def test_every_option_has_one_line_of_help_and_one_owner():
    arguments = make_arguments(MINIMAL)
    groups = [getattr(arguments, field.name) for field in dataclasses.fields(arguments)]
    fields = [field for group in groups for field in dataclasses.fields(group)]
    assert len({field.name for field in fields}) == len(fields) == len(arguments.flat())
    for field in fields:
        assert field.metadata["help"]
        assert "\n" not in field.metadata["help"]


def test_options_that_decide_the_result_are_told_from_those_that_do_not():
    fixed = make_arguments(MINIMAL).fixed()
    assert {"learning_rate", "batch_size", "noise_std", "data", "seed", "precision"} <= fixed.keys()
    assert fixed.keys().isdisjoint({"output_dir", "num_workers", "log_every", "gradient_accumulation_steps"})


def test_a_run_can_be_told_its_own_options_again():
    arguments = make_arguments(MINIMAL | {"report_to": ["wandb"], "layers_per_block": [1] * 8})
    assert make_arguments(yaml.safe_load(yaml.safe_dump(arguments.flat()))) == arguments


@pytest.mark.parametrize("script", ["train", "sample"])
def test_help_imports_nothing_that_only_running_needs(script):
    heavy = ("torch", "transformers", "diffusers", "datasets", "accelerate", "matplotlib")
    code = (
        f"import sys; from examples.{script} import main\n"
        f"try: main(['--help'])\nexcept SystemExit: print([name for name in {heavy} if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_shows_groups_and_types_as_a_person_writes_them(recipe, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], default_recipe=recipe)
    text = capsys.readouterr().out
    for part in (
        "model:",
        "data:",
        "optimization:",
        "output:",
        "--noise_type gaussian|uniform",
        "int or list of ints",
    ):
        assert part in text
    assert "--report_to list of tensorboard|trackio|wandb" in text
    assert "Literal" not in text


def test_what_a_run_gives_away_has_no_path_of_the_machine_and_no_credentials(tmp_path, monkeypatch):
    """But a recipe in a run's folder still finds data that lie near it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    local = make_arguments(
        MINIMAL | {"data": str(tmp_path / "data"), "output_dir": str(tmp_path / "run"), "init_from": str(tmp_path)}
    )
    for written in (local.published(tmp_path / "run"), local.published(), local.fixed()):
        assert str(tmp_path) not in str(written)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(local.published(tmp_path / "run")))
    assert read_recipe(recipe)["data"] == str(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for near in ("./data", "data"):
        recipe.write_text(yaml.safe_dump(make_arguments(MINIMAL | {"data": near}).published(tmp_path / "run")))
        assert read_recipe(recipe)["data"] == str(tmp_path / "data")
    far = make_arguments(MINIMAL | {"data": "https://me:secret@host.org/a.parquet?token=hf_1", "eval_data": None})
    assert far.published()["data"] == far.fixed()["data"] == "https://host.org/a.parquet"
    assert local.published(Path("/elsewhere"))["data"] == "data"


def test_an_error_does_not_repeat_credentials():
    for data in ("https://me:secret@host.org/a.parquet", "https://host.org/b?token=secret", "hf://me:secret@x/y"):
        with pytest.raises(FileNotFoundError) as caught:
            load_image_data(DataArguments(data=data), class_conditional=True)
        assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_misspelt_option_of_the_command_line_is_answered_in_a_line(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--batchsize", "32"], default_recipe="nowhere.yaml")
    (line,) = capsys.readouterr().err.splitlines()
    assert "unrecognized arguments: --batchsize, did you mean '--batch_size'?" in line
    with pytest.raises(SystemExit):
        parse_arguments(["a.yaml", "b.yaml"], default_recipe="nowhere.yaml")
    assert "unrecognized arguments: b.yaml" in capsys.readouterr().err


def test_a_run_of_no_step_is_refused_and_a_warm_up_that_never_ends_is_said():
    shape = {"data": "x", "image_size": 8, "batch_size": 100}
    with pytest.raises(ValueError, match=r"epochs=0.004 of 1500 images are no step of batch_size=100"):
        Schedule.plan(make_arguments(shape | {"epochs": 0.004}).optimization, 1500)
    one = Schedule.plan(make_arguments(shape | {"epochs": 0.05, "warmup_steps": 1}).optimization, 1500)
    assert (one.total_steps, one.remark) == (
        1,
        "the warm-up takes 1 steps and the run 1: learning_rate is never reached",
    )
    assert not Schedule(total_steps=2, warmup_steps=1).remark

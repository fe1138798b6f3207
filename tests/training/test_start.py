"""What a run starts from and what of it is trained: sources of every kind, frozen parts, adapters, conditions."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import random_images, tiny_model
from PIL import Image
from training_runs import TINY

from tarflow_hf import TarFlowModel, TarFlowPipeline, adapt
from tarflow_hf.conversion.reference_keys import reference_state_dict
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.arguments import LoraArguments, ModelArguments, StartArguments
from tarflow_hf.training.command import train
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.run_card import training_settings
from tarflow_hf.training.start import load_source, start_model
from tarflow_hf.training.trained_part import add_lora, freeze, parameter_groups, save_adapter, without_adapters

FEW = {"max_steps": 2, "warmup_steps": 0, "eval_every": None, "sample_every": None, "ema_decay": 0.5, "data": "digits"}
DIGITS = {"image_size": 8, "num_channels": 1, "horizontal_flip": False, "num_workers": 0}
SHAPE = ModelArguments(image_size=8, num_channels=1)


def run(tmp_path, name="run", **options):
    values = TINY | FEW | DIGITS | {"data": "./examples/data/digits", "output_dir": str(tmp_path / name)} | options
    train(make_arguments(values))
    return tmp_path / name


def saved(tmp_path, **overrides):
    """A pipeline of the shape of the tiny runs."""
    names = {index: str(index) for index in range(10)}
    sizes = {"num_blocks": 2, "layers_per_block": 1, "num_classes": 10, "id2label": names}
    model = tiny_model(dtype=torch.float32, **(sizes | overrides))
    TarFlowPipeline(transformer=model).save_pretrained(tmp_path / "source")
    return model, str(tmp_path / "source")


@pytest.mark.parametrize("kind", ["pipeline", "model", "pth"])
def test_a_source_of_any_kind_gives_its_log_prob(tmp_path, kind):
    model, place = saved(tmp_path, num_classes=0, id2label={}, head_dim=16, mlp_ratio=4, hidden_size=64)
    if kind == "model":
        model.save_pretrained(place := str(tmp_path / "model"))
    if kind == "pth":
        model, _ = saved(tmp_path, num_classes=0, id2label={}, head_dim=64, mlp_ratio=4, hidden_size=64)
        torch.save(reference_state_dict(model), place := str(tmp_path / "x_model_2_64_2_1_0.10.pth"))
    found, report = start_model(model.config, StartArguments(init_from=place), SHAPE)
    images = random_images(model)
    torch.testing.assert_close(found.eval().log_prob(images), model.log_prob(images), rtol=0, atol=1e-6)
    assert "copied" in report
    assert "adapted" not in report


def test_a_source_in_half_precision_is_trained_in_float32(tmp_path):
    model, place = saved(tmp_path)
    TarFlowPipeline(transformer=model.half()).save_pretrained(place)
    found, _ = start_model(model.config, StartArguments(init_from=place), SHAPE)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


def test_a_run_starts_at_the_source_and_its_average_too(tmp_path, capsys):
    model, place = saved(tmp_path)
    options = {"learning_rate": 1e-12, "min_learning_rate": 0, "weight_decay": 0}
    folder = run(tmp_path, init_from=place, **options)
    assert f"started from {place}:" in capsys.readouterr().out
    trained = TarFlowPipeline.from_pretrained(folder).transformer
    images, labels = random_images(model), torch.tensor([0, 5, -1])
    torch.testing.assert_close(trained.log_prob(images, labels), model.log_prob(images, labels), rtol=0, atol=1e-4)
    checkpoint = max((folder / "checkpoints").iterdir())
    again = load_source(str(checkpoint), SHAPE)
    torch.testing.assert_close(again.log_prob(images, labels), trained.log_prob(images, labels), rtol=0, atol=1e-5)
    page = (folder / "README.md").read_text()
    assert "| init_from | source |" in page


def test_a_page_tells_the_source_the_same_way_whether_it_is_on_this_disk_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 1, "init_from": "runs/cats"})
    before = training_settings(arguments)
    (tmp_path / "runs" / "cats").mkdir(parents=True)
    assert training_settings(arguments) == before
    assert before["init_from"] == "runs/cats"


def test_a_rectangle_with_fewer_classes_is_started_from_a_square(tmp_path, capsys):
    _, place = saved(tmp_path)
    folder = run(tmp_path, init_from=place, image_size=(4, 8), class_conditional=False)
    assert "interpolated from a grid of 4x4 to 2x4 patches" in capsys.readouterr().out
    pipe = TarFlowPipeline.from_pretrained(folder)
    assert pipe.transformer.config.image_size == (4, 8)
    with Image.open(folder / "samples.png") as grid:
        assert grid.width > grid.height  # three rows of two images that are twice as wide as high


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
    model, place = saved(tmp_path)
    folder = run(tmp_path, init_from=place, freeze=["blocks.0.*", "*.layers.*"])
    trained = TarFlowPipeline.from_pretrained(folder).transformer.state_dict()
    for name, tensor in model.state_dict().items():
        frozen = name.startswith("blocks.0.") or ".layers." in name
        assert trained[name].equal(tensor) == frozen, name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # that PEFT asks for
def test_adapters_alone_are_trained_and_saved_apart(tmp_path):
    from peft import PeftModel

    model, place = saved(tmp_path)
    folder = run(tmp_path, init_from=place, lora={"rank": 2, "targets": ["qkv_proj"]}, ema_decay=None)
    pipe = TarFlowPipeline.from_pretrained(folder)
    changed = {
        name for name, tensor in model.state_dict().items() if not pipe.transformer.state_dict()[name].equal(tensor)
    }
    assert changed == {f"blocks.{block}.layers.0.attention.qkv_proj.weight" for block in (0, 1)}
    images, labels = random_images(model), torch.tensor([0, 5, -1])
    expected = pipe.transformer.log_prob(images, labels)
    adapted = PeftModel.from_pretrained(
        TarFlowModel.from_pretrained(f"{place}/transformer"), folder / "adapter"
    ).eval()
    with torch.no_grad():
        found = adapted.get_base_model().log_prob(images, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    loaded = TarFlowPipeline.from_pretrained(place)
    loaded.load_lora_weights(folder / "adapter")
    for _ in range(2):  # beside the weights, and merged into them
        latents = loaded.transformer(images, labels).latents
        torch.testing.assert_close(latents, pipe.transformer(images, labels).latents, rtol=0, atol=1e-5)
        loaded.fuse_lora()
        loaded.unload_lora_weights()
    assert not torch.allclose(model.log_prob(images, labels), expected, rtol=0, atol=1e-3)
    assert "rank 2, alpha 16, on qkv_proj; `adapter/`" in (folder / "README.md").read_text()
    again = load_source(str(max((folder / "checkpoints").iterdir())), SHAPE)
    torch.testing.assert_close(again.log_prob(images, labels), expected, rtol=0, atol=1e-3)


def test_adapters_start_as_nothing_and_new_classes_are_trained_beside_them():
    source = tiny_model(num_classes=0)
    model, adaptation = adapt(source, class_names=["cat", "dog"])
    names = {weight.name for weight in adaptation.weights if weight.origin == "fresh"}
    add_lora(model, LoraArguments(rank=2), trained=names)
    images = random_images(source)
    torch.testing.assert_close(model.log_prob(images), source.log_prob(images), rtol=0, atol=1e-9)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained if "lora_" not in name} == {"class_embedding"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    plain = without_adapters(model)
    torch.testing.assert_close(plain.log_prob(images), model.log_prob(images), rtol=0, atol=1e-9)
    assert not torch.allclose(plain.log_prob(images), source.log_prob(images))
    assert plain.state_dict().keys() == adapt(source, class_names=["cat", "dog"])[0].state_dict().keys()


def test_layers_far_from_the_output_learn_more_slowly():
    model = tiny_model(layers_per_block=2, num_blocks=1)
    factors = {
        id(parameter): group["rate_factor"] for group in parameter_groups(model, 0.5) for parameter in group["params"]
    }
    found = {name: factors[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(factors) == len(found)
    assert found["blocks.0.proj_out.weight"] == found["blocks.0.class_embedding.weight"] == 1
    assert found["blocks.0.layers.1.mlp.up_proj.weight"] == 1
    assert found["blocks.0.layers.0.mlp.up_proj.weight"] == 0.5
    assert found["blocks.0.proj_in.weight"] == found["blocks.0.position_embedding"] == 0.25
    assert len(parameter_groups(model, 1.0)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_from": "nowhere/at/all"}, "init_from='nowhere/at/all' is no model"),
        ({"init_from": "./nowhere"}, "init_from='./nowhere' is no model: there is nothing at this path"),
        ({"init_from": "examples"}, "init_from='examples' is no model: the folder has no model_index.json"),
        ({"init_from": "nowhere.pth"}, "init_from is no model: no checkpoint file at nowhere.pth"),
        ({"freeze": ("blocks.7.*",)}, r"freeze: the pattern 'blocks.7.\*' matches no parameter"),
        ({"freeze": ("*",)}, r"freeze=\['\*'\] leaves no parameter to train"),
        ({"lora": LoraArguments(targets=("to_q",))}, r"lora.targets: \['to_q'\] match no linear layer; there are"),
    ],
)
def test_what_cannot_be_started_from_or_trained_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        start_model(tiny_model().config, StartArguments(**arguments), SHAPE)


def test_a_source_of_another_shape_is_refused_with_the_reason_and_all_sizes_to_give(tmp_path):
    source, place = saved(tmp_path)
    with pytest.raises(
        ValueError, match="init_from=.* does not fit the options of this run: hidden_size cannot change"
    ) as caught:
        run(tmp_path, init_from=place, hidden_size=24, mlp_ratio=3, num_conditioned_blocks=1, layers_per_block=5)
    assert not (tmp_path / "run").exists()
    advice = str(caught.value).partition("A recipe for this source says ")[2]
    given = dict(part.split(": ") for part in advice.split(", "))
    assert list(given) == ["hidden_size", "mlp_ratio", "layers_per_block", "num_conditioned_blocks"]
    for name, text in given.items():
        assert yaml.safe_load(text) == getattr(source.config, name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rang": 2}, "lora has no 'rang'; it has rank, alpha, targets"),
        ({"rank": 0}, "lora.rank must be at least 1 and at most 4096, got 0"),
        ({"rank": "many"}, "lora.rank must be int"),
        ("yes", "lora must be a mapping of rank, alpha, targets or null"),
    ],
)
def test_options_of_adapters_are_checked(lora, message):
    with pytest.raises(ValueError, match=message):
        make_arguments({"data": "x", "max_steps": 1, "lora": lora})


def striped(tmp_path, numbers, name="striped.parquet"):
    """Pictures with a brightness and a pair of numbers each."""
    cells = [Image.fromarray(np.full((8, 8), 10 * index % 256, dtype=np.uint8)) for index in range(len(numbers))]
    columns = {
        "image": cells,
        "brightness": numbers,
        "pair": [[float(index), 2.0 - index] for index in range(len(cells))],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "brightness": datasets.Value("float32"),
            "pair": datasets.List(datasets.Value("float32")),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path := tmp_path / name)
    return str(path)


def test_columns_of_the_data_become_the_condition(tmp_path):
    data = striped(tmp_path, [float(index) for index in range(16)])
    options = {
        "data": data,
        "condition_columns": ["brightness", "pair"],
        "class_conditional": False,
        "eval_split": "train",
    }
    folder = run(tmp_path, label_drop=0.5, eval_every=1, **options)
    config = TarFlowPipeline.from_pretrained(folder).transformer.config
    assert config.condition_names == ["brightness", "pair[0]", "pair[1]"]
    assert config.condition_mean == pytest.approx([7.5, 7.5, -5.5])
    assert config.condition_std == pytest.approx([np.arange(16).std()] * 3)
    saved = json.loads((max((folder / "checkpoints").iterdir()) / "checkpoint.json").read_text())["configuration"]
    assert saved["condition"]["condition_mean"] == config.condition_mean
    again = load_source(str(max((folder / "checkpoints").iterdir())), SHAPE)
    assert again.config.to_dict()["condition_std"] == config.condition_std


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            [0.0, 1.0, float("nan")],
            "row 2 of data set .*: condition column 'brightness' must hold finite numbers, got nan",
        ),
        ([0.0, 1.0, None], "row 2 .* got None"),
        ([1.0, 1.0, 1.0], "condition_columns: brightness has the same value in every row"),
    ],
)
def test_a_condition_that_says_nothing_is_refused_at_the_start(tmp_path, numbers, message):
    arguments = DataArguments(data=striped(tmp_path, numbers), condition_columns=("brightness",))
    with pytest.raises(ValueError, match=message):
        load_image_data(arguments, class_conditional=False)


def test_a_column_that_is_not_there_is_named(tmp_path):
    arguments = DataArguments(data=striped(tmp_path, [0.0, 1.0]), condition_columns=("slant",))
    with pytest.raises(ValueError, match=r"no column 'slant', found columns \['image', 'brightness', 'pair'\]"):
        load_image_data(arguments, class_conditional=False)


def test_an_adapter_of_another_rank_is_written_as_it_is(tmp_path):
    model = tiny_model(dtype=torch.float32)
    arguments = StartArguments(lora=LoraArguments(rank=3, alpha=6, targets=("up_proj",)))
    add_lora(model, arguments.lora, trained=set())
    save_adapter(model, arguments, tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["target_modules"]) == (3, 6, ["up_proj"])


def test_nothing_is_frozen_without_a_pattern():
    model = tiny_model()
    freeze(model, ())
    assert all(parameter.requires_grad for parameter in model.parameters())

"""Every recipe is understood by the trainer, and gives the model of the published size."""

from pathlib import Path

import pytest
import torch
import yaml

from tarflow_hf import TarFlowModel
from tarflow_hf.training.recipes import make_arguments, parse_arguments, read_recipe

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
CLASSES = {
    "afhq256": 3,
    "emoji32_cpu": 9,
    "emoji64": 9,
    "fashion_5_to_9": 5,
    "imagenet64_cond": 1000,
    "imagenet128_cond": 1000,
    "itarflow_imagenet64": 1000,
    "itarflow_imagenet128": 1000,
    "itarflow_imagenet256": 1000,
}
PUBLISHED = {  # millions of parameters, and images of a step
    "imagenet64_uncond_bpd": (460, 256),
    "imagenet64_uncond": (460, 256),
    "imagenet64_cond": (466, 256),
    "imagenet128_cond": (824, 768),
    "afhq256": (463, 256),
}
ITARFLOW = {  # millions of parameters, patch size, highest noise level, and refinement steps
    "itarflow_imagenet64": (771, 2, 0.3, 30),
    "itarflow_imagenet128": (1203, 4, 0.5, 50),
    "itarflow_imagenet256": (2221, 8, 0.7, 70),
}
NAMES = [
    "digits",
    "digits_inverted_lora",
    "elevation",
    "emoji32_cpu",
    "emoji64",
    "fashion_5_to_9",
    "fashion_mnist",
    "fashion_mnist_cpu",
    "photo_strips",
    *PUBLISHED,
    *ITARFLOW,
]


def read(name):
    return make_arguments(read_recipe(RECIPES / f"{name}.yaml"))


def test_there_is_no_other_recipe():
    of_flows = [path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("_inverse")]
    assert sorted(of_flows) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_its_model(name):
    arguments = parse_arguments([str(RECIPES / f"{name}.yaml")], default_recipe="nowhere.yaml")
    assert arguments == read(name)
    assert arguments.output.output_dir == f"runs/{name}"
    classes = CLASSES.get(name, 10) if arguments.model.class_conditional else 0
    config = arguments.model.to_config([f"class {index}" for index in range(classes)])
    with torch.device("meta"):
        model = TarFlowModel(config)
    if name in PUBLISHED:
        millions, batch_size = PUBLISHED[name]
        assert round(model.num_parameters() / 1e6) == millions
        assert arguments.optimization.batch_size == batch_size
    if name in ITARFLOW:
        millions, patch_size, highest, steps = ITARFLOW[name]
        assert round(model.num_parameters() / 1e6) == millions
        assert (config.patch_size, config.noise_range, config.num_tokens) == (patch_size, (0.01, highest), 1024)
        assert arguments.output.num_refinement_steps == steps


@pytest.mark.parametrize("name", ITARFLOW)
def test_a_recipe_of_itarflow_has_the_authors_optimisation(name):
    settings = read(name).optimization
    assert (settings.learning_rate, settings.min_learning_rate, settings.warmup_epochs) == (1e-4, 1e-5, 1)
    assert (settings.weight_decay, settings.adam_beta1, settings.adam_beta2) == (1e-4, 0.9, 0.95)
    assert (settings.noise_level_sampling, settings.noise_level_weighting) == ("uniform", "t")
    assert (settings.batch_size, settings.precision, settings.ema_decay) == (512, "bfloat16", None)
    assert settings.label_drop == (0.0 if name.endswith("256") else 0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_authors_optimisation(name):
    settings = read(name).optimization
    assert (settings.learning_rate, settings.min_learning_rate, settings.warmup_epochs) == (1e-4, 1e-6, 1)
    assert (settings.weight_decay, settings.adam_beta1, settings.adam_beta2) == (1e-4, 0.9, 0.95)
    assert settings.ema_decay is None
    assert settings.max_grad_norm is None
    assert settings.precision == ("float32" if read(name).model.noise_type == "uniform" else "bfloat16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_where_its_numbers_are_from(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "https://github.com/apple/ml-tarflow" in text
    for option in ("patch_size", "hidden_size", "batch_size", "epochs", "learning_rate", "weight_decay"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{option}:")]
        assert "# --" in line or "# train.py" in line


def test_the_default_recipe_finds_its_data_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(read("digits").data.data, "train.parquet").is_file()


def test_the_accelerate_files_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {}
    for path in sorted((RECIPES.parent / "accelerate").glob("*.yaml")):
        config = load_config_from_file(str(path))
        kinds[path.stem] = (str(config.distributed_type), config.num_machines)
        assert config.mixed_precision == "no"  # `precision` of the recipe decides
        if path.stem == "fsdp":
            wrapped = yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
            assert wrapped == TarFlowModel._no_split_modules[0]
    assert kinds == {
        "ddp": ("DistributedType.MULTI_GPU", 1),
        "fsdp": ("DistributedType.FSDP", 1),
        "multi_node": ("DistributedType.MULTI_GPU", 4),
    }

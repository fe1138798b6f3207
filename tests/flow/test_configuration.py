"""The configuration: derived sizes, round trip, class names, and what it refuses."""

import json

import pytest
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from tarflow_hf import TarFlowConfig


def test_the_defaults_are_the_paper_s_imagenet64_model():
    config = TarFlowConfig()
    assert (config.num_tokens, config.patch_dim, config.num_dims) == (1024, 12, 64 * 64 * 3)
    assert config.block_depths == [8] * 8
    assert config.num_attention_heads == 12


def test_a_configuration_survives_saving(tmp_path):
    config = tiny_config(id2label={0: "cat", 1: "dog, hound", 2: "bird", 3: "fish"}, volume_preserving=True)
    config.save_pretrained(tmp_path)
    loaded = TarFlowConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.id2label == {0: "cat", 1: "dog, hound", 2: "bird", 3: "fish"}
    assert loaded.label2id["dog, hound"] == 1
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tarflow"


def test_classes_without_names_get_some():
    assert tiny_config(num_classes=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert tiny_config(num_classes=0).id2label == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30, "patch_size": 4}, "image_size=30 must be a multiple of patch_size=4"),
        ({"hidden_size": 100, "head_dim": 64}, "hidden_size=100 must be a multiple of head_dim=64"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"layers_per_block": [1, 2]}, r"num_blocks=3 of them, got \[1, 2\]"),
        ({"layers_per_block": 0}, "layers_per_block must be a positive number"),
        ({"num_classes": -1}, r"num_classes must be 0 \(unconditional\) or more, got -1"),
        ({"id2label": {0: "cat"}}, "num_classes=4, got 1 names"),
        ({"noise_std": -0.1}, "noise_std must be finite and at least 0, got -0.1"),
        ({"noise_std": float("nan")}, "noise_std must be finite and at least 0, got nan"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "overrides", [{"image_size": "64"}, {"image_size": 64.0}, {"noise_type": "laplace"}, {"volume_preserving": 1}]
)
def test_values_of_the_wrong_type_are_refused(overrides):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(overrides))):
        tiny_config(**overrides)


def test_a_label2id_that_contradicts_the_names_is_refused():
    names = {0: "cat", 1: "dog"}
    config = TarFlowConfig(num_classes=2, id2label=names, label2id={"cat": 0, "dog": 1})
    assert TarFlowConfig.from_dict(config.to_dict()).label2id == {"cat": 0, "dog": 1}
    with pytest.raises(StrictDataclassClassValidationError, match="label2id must be the reverse of id2label"):
        TarFlowConfig(num_classes=2, id2label=names, label2id={"cat": 1, "dog": 0})


def test_class_names_keep_the_order_of_their_ids_in_files(tmp_path):
    names = [f"kind {index}" for index in range(12)]
    tiny_config(num_classes=12, id2label=dict(enumerate(names))).save_pretrained(tmp_path)
    assert list(TarFlowConfig.from_pretrained(tmp_path).id2label.items()) == list(enumerate(names))

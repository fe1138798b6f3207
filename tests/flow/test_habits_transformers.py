"""What users of transformers type by habit: another number of classes, copies."""

import copy
import logging
import pickle

import pytest
import torch
from conftest import random_images, tiny_model
from transformers.utils import logging as transformers_logging

from tarflow_hf import TarFlowModel, TarFlowPipeline

NAMES = {0: "ant", 1: "bee", 2: "cow", 3: "dog", 4: "emu", 5: "fox"}


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(dtype=torch.float32, id2label={index: f"old {index}" for index in range(4)})
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_classes": 6}, {index: f"LABEL_{index}" for index in range(6)}),
        ({"num_labels": 2}, {0: "LABEL_0", 1: "LABEL_1"}),
        ({"id2label": NAMES}, NAMES),
        ({"num_labels": 6, "id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}, NAMES),
    ],
)
def test_other_classes_have_fresh_vectors_and_names_that_are_saved(changes, names, folder, tmp_path):
    model = TarFlowModel.from_pretrained(folder, ignore_mismatched_sizes=True, **changes)
    old = TarFlowModel.from_pretrained(folder)
    assert model.config.id2label == names
    assert model.config.label2id == {name: index for index, name in names.items()}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.blocks[0].proj_in.weight.equal(old.blocks[0].proj_in.weight)
    pipe = TarFlowPipeline(model)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = TarFlowPipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.transformer.config.id2label == names
    assert loaded.prepare_class_labels(names[1]).tolist() == [1]
    assert loaded.transformer.blocks[1].class_embedding.weight.equal(model.blocks[1].class_embedding.weight)


def test_other_classes_are_refused_where_nothing_says_that_weights_may_be_drawn(folder):
    with pytest.raises(OSError, match="class_embedding.weight must be 6 x 16, got 4 x 16"):
        TarFlowModel.from_pretrained(folder, id2label=NAMES)
    with pytest.raises(ValueError, match="class_embedding.weight would be left out: tarflow_hf.adapt makes"):
        TarFlowModel.from_pretrained(folder, num_classes=0, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_are_copied_and_pickled(clone):
    model = tiny_model()
    assert clone(model).log_prob(random_images(model)).equal(model.log_prob(random_images(model)))
    assert clone(model.config) == model.config


def test_training_without_labels_or_on_levels_is_said_once(caplog):
    hints = logging.getLogger("tarflow_hf.flow.training_hints")
    model, images, labels = tiny_model().train(), torch.zeros(2, 1, 8, 8), torch.tensor([0, -1])
    for training, batch, given, said in [
        (True, images, labels, ""),
        (True, images, None, "a model of 4 classes trains without labels"),
        (True, images + 200, labels, "pixel_values must be in [-1, 1]"),
        (False, images + 200, None, ""),
    ]:
        caplog.clear()
        transformers_logging.warning_once.cache_clear()
        with caplog.at_level(logging.WARNING, hints.name):
            for _ in range(2):
                model.train(training)(batch, class_labels=given)
        told = [record.getMessage() for record in caplog.records if record.name == hints.name]
        assert len(told) == bool(said)
        assert all(said in message for message in told)

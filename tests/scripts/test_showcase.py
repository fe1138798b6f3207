"""The models of examples/showcase: what a visitor of a fresh clone loads, and how the page of such a model is made."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from examples.data.classifiers import emoji_classifier, fashion_classifier, groups_of, predicted
from tarflow_hf import TarFlowPipeline

SHOWCASE = Path(__file__).parents[2] / "examples" / "showcase"
CLASSIFIERS = {"emoji": emoji_classifier, "fashion": fashion_classifier}
FLOORS = {"emoji": 0.48, "fashion": 0.9}  # of 100 samples read as asked; the card has the measured share, of more


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_samples_of_a_showcase_model_are_read_as_the_class_asked_for(name):
    pipe = TarFlowPipeline.from_pretrained(SHOWCASE / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    _, groups = groups_of(list(pipe.transformer.config.id2label.values()))
    labels = torch.arange(100) % pipe.transformer.config.num_classes
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    images = pipe(labels, generator=generators, output_type="pt").images
    assert images.isfinite().all()
    assert images.shape == (100, pipe.num_channels, *pipe.image_shape)
    read = predicted(CLASSIFIERS[name](), (images * 255).round().to(torch.uint8))
    assert (read == groups[labels]).float().mean() >= FLOORS[name]


def test_every_showcase_model_is_small_complete_and_has_its_page():
    folders = sorted(path.parent for path in SHOWCASE.glob("*/model_index.json"))
    assert [folder.name for folder in folders] == sorted(CLASSIFIERS)
    total = 0
    for folder in folders:
        weights = list(folder.rglob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
        assert size <= 4 * 2**20, folder
        total += size
        assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}
        card = ModelCard.load(folder / "README.md")
        assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "nearest", "rms"}
        shown = {line.split("(")[1].split(")")[0] for line in card.text.splitlines() if line.startswith("![")}
        assert {"samples.png", "nearest.png", "guidance.png", "interpolation.png"} <= shown
        assert all((folder / picture).is_file() for picture in shown)
        assert json.loads((folder / "model_index.json").read_text())["vae"]
        assert not any("_name_or_path" in path.read_text() for path in folder.rglob("*.json"))  # of the maker's disk
    assert total <= 12 * 2**20

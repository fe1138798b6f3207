"""The models of examples/showcase: what a visitor of a fresh clone loads, and how the page of such a model is made."""

import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import AutoencoderTiny
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from examples import make_showcase
from examples.data.classifiers import (
    emoji_classifier,
    fashion_classifier,
    fashion_perceptual,
    groups_of,
    predicted,
    trained,
)
from examples.data.digits_classifier import load_digits_split
from tarflow_hf import TarFlowPipeline

SHOWCASE = Path(__file__).parents[2] / "examples" / "showcase"
CLASSIFIERS = {"emoji": emoji_classifier, "fashion": fashion_classifier}
FLOORS = {"emoji": 0.48, "fashion": 0.9}  # of 100 samples read as asked; the card has the measured share, of more


def test_perceptual_features_are_of_another_classifier_and_have_one_length():
    ours, other = trained("fashion_lessons"), fashion_classifier()
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (3, 1, 28, 28), generator=generator, dtype=torch.uint8)
    features = fashion_perceptual()(levels)
    torch.testing.assert_close(features.square().sum(1), torch.full((3,), 5.0), rtol=0.01, atol=0)
    torch.testing.assert_close(features[:, -64:], torch.nn.functional.normalize(ours(levels)))
    assert not torch.allclose(ours(levels), other(levels), atol=0.1)
    assert fashion_perceptual()(levels[:0]).shape == (0, features.shape[1])


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_samples_of_a_showcase_model_are_read_as_the_class_asked_for(name):
    pipe = TarFlowPipeline.from_pretrained(SHOWCASE / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    _, groups = groups_of(list(pipe.transformer.config.id2label.values()))
    labels = torch.linspace(0, pipe.transformer.config.num_classes - 1, 100).round().long()
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    images = pipe(labels, generator=generators, output_type="pt").images
    assert images.isfinite().all()
    assert images.shape == (100, pipe.num_channels, *pipe.image_shape)
    read = predicted(CLASSIFIERS[name](), (images * 255).round().to(torch.uint8))
    assert (read == groups[labels]).float().mean() >= FLOORS[name]


def test_samples_of_photographs_have_the_colours_and_edges_of_photographs():
    pipe = TarFlowPipeline.from_pretrained(SHOWCASE / "photos", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_images_per_label=100, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (100, 3, 32, 32)
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    far = (images[..., 16:] - images[..., :16]).abs().mean()
    assert images.mean((2, 3)).std(0).min() > 0.15  # of the held-out parts 0.21 and more
    assert 0.008 < across < far / 2  # of the held-out parts 0.022 and 0.076: neighbours are alike


def test_every_showcase_model_is_small_complete_and_has_its_page():
    folders = sorted(path.parent for path in SHOWCASE.glob("*/model_index.json"))
    assert [folder.name for folder in folders] == [*sorted(CLASSIFIERS), "photos"]
    total = 0
    for folder in folders:
        weights = list(folder.rglob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
        assert size <= 4 * 2**20, folder
        total += size
        assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}
        card = ModelCard.load(folder / "README.md")
        has_classes = folder.name in CLASSIFIERS
        kinds = {result.metric_type for result in card.data.eval_results}
        assert kinds >= {"nearest", "rms"} | ({"accuracy"} if has_classes else set())
        shown = {line.split("(")[1].split(")")[0] for line in card.text.splitlines() if line.startswith("![")}
        assert {"samples.png", "nearest.png", "interpolation.png"} <= shown
        assert ("guidance.png" in shown) == has_classes
        assert all((folder / picture).is_file() for picture in shown)
        assert json.loads((folder / "model_index.json").read_text())["vae"]
        assert not any("_name_or_path" in path.read_text() for path in folder.rglob("*.json"))  # of the maker's disk
    assert total <= 12 * 2**20


TINY_VAE = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "latent_channels": 2}
HALVES = """
import torch
from examples.data.digits_classifier import DigitsClassifier, digits_classifier

class Halves(DigitsClassifier):
    def logits(self, levels):
        digits = super().logits(levels)
        return torch.stack([digits[:, :5].logsumexp(1), digits[:, 5:].logsumexp(1)], 1)

def halves():
    network = Halves()
    network.load_state_dict(digits_classifier().state_dict())
    return network.eval()
"""


def named(digit):
    """The classes by name sort as the digits do, in two groups."""
    return f"{'1 low' if digit < 5 else '2 high'}: {digit}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Showcase folders of untrained flows of digits' latents, one with ten classes in two groups and one with none."""
    folder = tmp_path_factory.mktemp("showcase")
    for split in ("train", "test"):
        levels, labels = load_digits_split(split)
        cells = []
        for image in levels[:200]:
            Image.fromarray(image[0].numpy()).save(file := BytesIO(), "PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        columns = {"image": cells, "digit": [named(int(label)) for label in labels[:200]]}
        features = Features({"image": ImageFeature(), "digit": Value("string")})
        Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    (folder / "halves.py").write_text(HALVES)
    blocks = {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
    for name, names in (("grouped", [named(digit) for digit in reversed(range(10))]), ("plain", [])):
        torch.manual_seed(0)
        vae = AutoencoderTiny(in_channels=1, out_channels=1, **TINY_VAE, **blocks)
        sizes = {"image_size": 4, "num_channels": 2, "num_classes": len(names), "id2label": dict(enumerate(names))}
        flow = tiny_model(dtype=torch.float32, **sizes)
        TarFlowPipeline(transformer=flow, vae=vae, image_size=8).save_pretrained(folder / f"run_{name}")
        recipe = {
            "data": str(folder / "data"),
            "eval_split": "test",
            "image_size": 8,
            "num_channels": 1,
            "patch_size": 2,
        }
        recipe |= {"label_column": "digit"} if names else {"class_conditional": False}
        recipe |= {"vae": str(folder / f"run_{name}" / "vae"), "max_steps": 1, "noise_std": 0.1, "hidden_size": 64}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        line = [str(folder / f"run_{name}"), str(folder / name), "--recipe", str(folder / f"{name}.yaml")]
        line += ["--num_samples", "40", "--num_compared", "60", "--work", str(folder / f"work_{name}")]
        reader = f"{folder / 'halves.py'}:halves"
        line += ["--classifier", reader, "--sample_labels", "data"] if names else ["--feature_extractor", reader]
        make_showcase.main([*line, "--temperature", "0.5", "--denoising_strength", "1"])
    return folder


def test_rows_of_a_showcase_are_groups_of_classes_as_often_as_in_training(made):
    counts = torch.tensor([3, 0, 1, 0, 0, 2, 2, 0, 0, 0])
    groups = make_showcase.Groups(*groups_of([named(digit) for digit in range(10)]), counts)
    assert groups.names == ["1 low", "2 high"]
    asked = torch.tensor([0, 1]).repeat(200)
    drawn = groups.labels(asked)
    assert drawn.equal(groups.labels(asked))
    shares = drawn.bincount(minlength=10)
    assert set(shares.nonzero().flatten().tolist()) == {0, 2, 5, 6}
    assert groups.of_class[drawn].equal(asked)
    assert 125 <= shares[0] <= 175  # of 200 with probability 3/4: within four deviations
    assert 72 <= shares[5] <= 128
    assert groups_of(["cat", "dog: brown"])[0] == ["cat", "dog"]
    assert groups_of(["dog", "cat"])[0] == ["dog", "cat"]

    def rows(picture):
        with Image.open(made / "grouped" / picture) as image:
            return image.height // 60  # a row is some 66 pixels

    assert (rows("samples.png"), rows("plain.png"), rows("interpolation.png")) == (2, 2, 2)
    card = ModelCard.load(made / "grouped" / "README.md")
    assert "ten of each group, of its classes as often as the training images are" in card.text
    read = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert read["held-out images read right by the classifier (real images)"] > 0.9
    shares = [value for name, value in read.items() if name.startswith("samples read as the class asked for")]
    assert len(shares) == 8  # four guidance scales, at the temperature that is saved and at 1
    assert TarFlowPipeline.from_pretrained(made / "grouped").config.denoising_strength == 1


def test_a_showcase_of_a_model_without_classes_has_plain_rows_and_no_guidance(made):
    card = ModelCard.load(made / "plain" / "README.md")
    assert not (made / "plain" / "guidance.png").exists()
    assert "guidance.png" not in card.text
    kinds = {result.metric_type for result in card.data.eval_results}
    assert {"nearest", "rms", "fd-halves"} <= kinds
    assert "accuracy" not in kinds
    with Image.open(made / "plain" / "samples.png") as image:
        assert image.size == (10 * 66, 8 * 66)

"""Pages: what they tell, that they keep what people write, and that those of the recipes are as they are rendered."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hub.loopback import LoopbackHub
from model_cards.render import HERE, recipe_page, recipes
from tarflow_hf import TarFlowConfig
from tarflow_hf.hub.known_data import KNOWN_DATA, class_names, training_data
from tarflow_hf.hub.model_card import Page, Result, TrainingData, for_repository, is_edited, merge, render
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.run_card import held_out_result, save_page

PAGES = {recipe.stem: recipe for recipe in recipes()}
NAMES = sorted(PAGES)
BITS = Result("bits_per_dim", "bits per dimension", 2.5, "user/data", "test", "one draw | 10 images", "`evaluate`")


def page(**changes):
    """A page that tells everything."""
    config = TarFlowConfig(image_size=8, patch_size=4, num_classes=3, id2label={0: "cat", 1: "dog", 2: "wild"})
    full = Page(
        repo_id="user/model",
        config=config,
        num_parameters=1234567,
        defaults={"guidance_scale": 2.0, "denoising_strength": None},
        license="mit",
        license_note="Weights: MIT.",
        data=TrainingData("Data", "user/data", "Ten pictures.", "All of them are blue."),
        training={"epochs": 3.0, "learning_rate": 1e-4, "max_steps": None},
        command="train me",
        results=(BITS,),
        published=(replace(BITS, metric="fid", name="FID", value=9.9, source="a paper"),),
        samples="samples.png",
        curve="curve.png",
        advice="Try 3.",
    )
    return replace(full, **changes)


def test_page_tells_what_is_known():
    text = render(page()).text
    for part in (
        "# model\n",
        "8x8 RGB images",
        "(1,234,567 parameters)",
        "![Samples](samples.png)",
        "![Bits per dimension over the training](curve.png)",
        'TarFlowPipeline.from_pretrained("user/model")',
        'pipe(class_labels="cat")',
        "cat, dog, wild",
        "`guidance_scale=2.0`.",
        "- Try 3.",
        "[Data](https://huggingface.co/datasets/user/data)",
        "Weights: MIT.",
        "Made with `train me`.",
        "| epochs | 3 |\n| learning_rate | 0.0001 |\n",
        "| bits per dimension | 2.5 | user/data, test | one draw \\| 10 images | `evaluate` |",
        "| FID | 9.9 |",
        "All of them are blue.",
        "arXiv 2412.06329",
    ):
        assert part in text
    assert "\n\n\n" not in text


def test_page_leaves_out_what_is_not_known():
    bare = render(Page("user/model", TarFlowConfig(noise_type="uniform", num_channels=2), 10))
    for part in ("## Results", "## Published", "## Data and licence", "![Samples]", "Made with", "| setting", "None"):
        assert part not in bare.text
    assert "pipe().images[0]" in bare.text
    assert "2-channel" in bare.text
    assert "there is nothing to denoise" in bare.text
    assert bare.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["tarflow", "tarflow_hf", "normalizing-flow", "image-generation", "unconditional"],
    }


def test_page_of_a_model_with_numbered_or_many_classes():
    assert "class_labels=0" in render(page(config=TarFlowConfig(num_classes=7))).text
    names = dict(enumerate(class_names("imagenet-1k")))
    text = render(page(config=TarFlowConfig(num_classes=1000, id2label=names))).text
    assert 'class_labels="tench, Tinca tinca"' in text
    assert "has all 1000" in text


def test_page_of_a_model_that_is_told_the_noise_level():
    config = TarFlowConfig(noise_conditioning=True, noise_range=(0.01, 0.25))
    assert "a standard deviation from 0.01 to 0.25" in render(page(config=config)).text


def test_metadata_survive_the_way_through_the_file():
    card = ModelCard(str(render(page())))
    assert card.data.license == "mit"
    assert card.data.datasets == ["user/data"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("bits_per_dim", 2.5, "user/data")
    assert "9.9" not in card.data.to_yaml()


def test_an_edit_is_noticed_and_line_ends_are_not():
    text = render(page()).text
    assert not is_edited(text)
    assert not is_edited(text.replace("\n", "\r\n"))
    assert not is_edited(" \n")
    assert is_edited(text.replace("blue", "green"))
    assert is_edited("# Mine\n")


def test_merge_keeps_a_persons_text_and_choices():
    existing = ModelCard(str(render(page())).replace("blue", "green").replace("license: mit", "license: cc0-1.0"))
    existing.data.tags = ["mine"]
    new = render(page(results=(replace(BITS, value=2.25), replace(BITS, metric="kid", name="KID", value=0.1))))
    merged = ModelCard(str(merge(existing, new)))
    assert merged.text == existing.text
    assert merged.data.license == "cc0-1.0"
    assert merged.data.tags[:2] == ["mine", "tarflow"]
    assert [(result.metric_type, result.metric_value) for result in merged.data.eval_results] == [
        ("bits_per_dim", 2.25),
        ("kid", 0.1),
    ]


def test_merge_renews_an_unedited_text_only_where_it_may():
    existing, new = render(page()), render(page(num_parameters=7))
    assert "(7 parameters)" in merge(existing, new).text
    assert merge(existing, new, update_text=False).text == existing.text
    assert "(7 parameters)" in merge(ModelCard("---\nlicense: cc0-1.0\n---\n"), new, update_text=False).text


def test_page_takes_the_name_of_its_repository():
    renamed = for_repository(render(page()), "other/name")
    assert "\n# name\n" in renamed.text
    assert 'from_pretrained("other/name")' in renamed.text
    assert renamed.data.model_name == "name"
    assert not is_edited(renamed.text)
    mine = ModelCard("---\nlicense: mit\n---\n# Mine\n")
    assert for_repository(mine, "other/name").text == "# Mine\n"


def test_held_out_result_says_how_it_was_measured():
    values = {"data": "digits", "eval_split": "test", "epochs": 1, "ema_decay": 0.9}
    noisy = held_out_result(make_arguments(values | {"noise_std": 0.1}), 1.23456, 297, source="train")
    assert (noisy.name, noisy.value, noisy.split) == ("bits per dimension of noisy images", 1.2346, "test")
    assert "Gaussian noise of 0.1" in noisy.method
    assert "averaged weights" in noisy.method
    exact = held_out_result(make_arguments(values | {"noise_type": "uniform"}), 1.5, 297, source="train")
    assert exact.name == "bits per dimension"


def test_saved_page_gives_way_only_where_nobody_edited_it(tmp_path):
    path = tmp_path / "README.md"
    save_page(page(), path)
    save_page(page(num_parameters=7), path)
    assert "(7 parameters)" in path.read_text()
    path.write_text(path.read_text() + "Mine.\n")
    save_page(page(num_parameters=8), path)
    assert "(7 parameters)" in path.read_text()


def test_training_data_of_a_page():
    assert training_data("ILSVRC/imagenet-1k") is KNOWN_DATA["imagenet-1k"]
    assert training_data("../data/digits") is KNOWN_DATA["digits"]
    assert training_data("user/pictures").hub_id == "user/pictures"
    assert training_data("/home/me/holiday").hub_id is None
    assert "/home" not in training_data("/home/me/holiday").name


def test_every_recipe_has_its_page():
    assert NAMES
    assert sorted(path.stem for path in HERE.glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_page_is_the_rendered_one(name):
    assert (HERE / f"{name}.md").read_text(encoding="utf-8") == str(render(recipe_page(PAGES[name]))), (
        "run `python model_cards/render.py`"
    )


@pytest.mark.parametrize("name", NAMES)
def test_committed_page_parses_and_is_complete(name):
    card = ModelCard.load(HERE / f"{name}.md")
    assert card.data.license
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "normalizing-flow" in card.data.tags
    for heading in ("How to use it", "Sampling", "Data and licence", "Training", "Limits and biases", "Citation"):
        assert f"\n## {heading}\n" in card.text
    assert not is_edited(card.text)


def test_code_on_the_committed_pages_runs(tmp_path):
    pages = {}
    for name in NAMES:
        shown = recipe_page(PAGES[name])
        kept = ("num_classes", "noise_type", "noise_std", "id2label", "condition_dim", "value_mean", "value_scale")
        settings = {key: getattr(shown.config, key) for key in kept}
        pages[str(HERE / f"{name}.md")] = settings | {"num_channels": shown.num_channels}
    tmp_path.joinpath("pages.json").write_text(json.dumps(pages))
    with LoopbackHub(tmp_path) as hub:
        pictures = hub.run("snippets", str(tmp_path / "pages.json"), HF_TOKEN="hf_your_name")
    for path, kind in pages.items():
        picture = "L (8, 8)" if kind["num_channels"] == 1 else "RGB (8, 8)"
        array = f"array (1, 8, 8, {kind['num_channels']})"
        assert pictures[path] == [picture if kind["value_scale"] is None else array], path


def test_pictures_on_the_committed_pages_are_there():
    for name in NAMES:
        page = recipe_page(PAGES[name])
        assert all(Path(HERE, picture).is_file() for picture in (page.samples, page.curve) if picture)


def test_the_ids_of_classes_with_numbers_for_names_are_told():
    config = TarFlowConfig(image_size=8, patch_size=4, num_classes=2, id2label={0: "1", 1: "2"})
    told = "A number asks for the class of that id, a string for the one of that name: '1' has the id 0, '2' has"
    assert told in str(render(page(config=config)))
    assert "A number asks" not in str(render(page()))


def test_a_condition_is_told_with_its_names_and_spread():
    known = {"condition_dim": 2, "condition_names": ["age", "size"], "condition_mean": [40.0, 1.234567]}
    config = TarFlowConfig(image_size=8, patch_size=4, **known, condition_std=[9.5, 0.25])
    text = str(render(page(config=config)))
    assert "pipe(condition=[40.0, 1.23]).images[0]" in text
    assert "`condition` takes 2 numbers an image, or a list of such: age (40 ± 9.5), size (1.23 ± 0.25)" in text
    assert "follows the condition more closely" in text
    assert "- conditional\n" in text
    plain = str(render(page(config=TarFlowConfig(image_size=8, patch_size=4, condition_dim=1))))
    assert "pipe(condition=[0.0])" in plain
    assert "`condition` takes a number an image, or a list of such: number 1." in plain

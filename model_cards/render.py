"""Writes the page of each recipe: `python model_cards/render.py` turns examples/recipes/NAME.yaml into NAME.md here.

What a page says beyond its recipe stands in NAME.yaml beside it: licence, advice, and numbers with their sources. A
number that nobody has measured is not there. `tests/test_model_card.py` fails where a page is not what this writes.
"""

from dataclasses import replace
from pathlib import Path

import torch
import yaml

from tarflow_hf import TarFlowModel
from tarflow_hf.hub.known_data import class_names
from tarflow_hf.hub.model_card import Page, Result, render
from tarflow_hf.training.recipes import make_arguments, read_recipe
from tarflow_hf.training.run_card import run_page

HERE = Path(__file__).parent
RECIPES = HERE.parent / "examples" / "recipes"


def recipe_page(recipe: Path) -> Page:
    """What the page of a recipe tells.

    Args:
        recipe: The YAML file of the recipe; the file of the same name in this folder may hold `license`,
            `license_note`, `advice`, `samples`, `curve`, and lists `results` and `published` of `Result`s.
    """
    arguments = make_arguments(read_recipe(recipe))
    labelled = arguments.model.class_conditional
    config = arguments.model.to_config(class_names(Path(arguments.data.data).name.lower()) if labelled else [])
    with torch.device("meta"):
        num_parameters = TarFlowModel(config).num_parameters()
    page = run_page(
        arguments,
        config,
        num_parameters,
        repo_id=f"your-name/tarflow-{recipe.stem.replace('_', '-')}",
        command=f"accelerate launch examples/train.py examples/recipes/{recipe.name}",
    )
    facts = yaml.safe_load((HERE / recipe.name).read_text(encoding="utf-8"))
    for kind in ("results", "published"):
        facts[kind] = tuple(Result(**result) for result in facts.get(kind, []))
    return replace(page, **facts)


def main() -> None:
    """Writes every page."""
    for recipe in sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.endswith("_inverse")):
        render(recipe_page(recipe)).save(HERE / f"{recipe.stem}.md")


if __name__ == "__main__":
    main()

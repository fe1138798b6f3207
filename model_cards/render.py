"""Writes the page of each recipe: `python model_cards/render.py` turns examples/recipes/NAME.yaml into NAME.md here.

`latents/NAME_inverse.yaml` have a page too, whose flow is there; other flows of latents are trained with theirs.

What a page says beyond its recipe stands in NAME.yaml beside it: licence, advice, and numbers with their sources. A
number that nobody has measured is not there. `tests/hub/test_model_card.py` fails where a page is another than this
writes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from tarflow_hf import TarFlowInverseModel, TarFlowModel, TarFlowPipeline
from tarflow_hf.hub.known_data import class_names
from tarflow_hf.hub.model_card import Page, Result, render
from tarflow_hf.training.inverse_arguments import GROUPS
from tarflow_hf.training.option_groups import parse_groups
from tarflow_hf.training.recipes import make_arguments, read_recipe
from tarflow_hf.training.run_card import inverse_page, run_page

HERE = Path(__file__).parent
RECIPES = HERE.parent / "examples" / "recipes"


def recipe_page(recipe: Path) -> Page:
    """What the page of a recipe tells.

    Args:
        recipe: The YAML file of the recipe; the file of the same name in this folder may hold `license`,
            `license_note`, `advice`, `samples`, `curve`, lists `results` and `published` of `Result`s, and
            `condition`, what the data say of a condition.
    """
    facts = yaml.safe_load((HERE / recipe.name).read_text(encoding="utf-8"))
    condition = facts.pop("condition", {})
    page = page_of_inverse(recipe) if recipe.stem.endswith("_inverse") else page_of_flow(recipe, condition)
    for kind in ("results", "published"):
        facts[kind] = tuple(Result(**result) for result in facts.get(kind, []))
    return replace(page, **facts)


def page_of_flow(recipe: Path, condition: Mapping[str, Any] = MappingProxyType({})) -> Page:
    """The page of a recipe of `examples/train.py`, whose data have this condition, without what stands beside it."""
    arguments = make_arguments(read_recipe(recipe))
    labelled = arguments.model.class_conditional
    names = class_names(Path(arguments.data.data).name.lower()) if labelled else []
    data = arguments.data
    arrays = {"value_mean": list(data.value_mean), "value_scale": list(data.value_scale)} if data.value_scale else {}
    config = arguments.model.to_config(names, **condition, **arrays)
    with torch.device("meta"):
        num_parameters = TarFlowModel(config).num_parameters()
    return run_page(
        arguments,
        config,
        num_parameters,
        repo_id=f"your-name/tarflow-{recipe.stem.replace('_', '-')}",
        command=f"accelerate launch examples/train.py examples/recipes/{recipe.name}",
    )


def page_of_inverse(recipe: Path) -> Page:
    """The page of a recipe of `examples/train_inverse.py`: of the flow that it names, or of that flow's recipe."""
    data, settings, options = parse_groups([str(recipe)], GROUPS, description="A page.")
    folder = HERE.parent / options.flow
    if folder.is_dir():
        pipe = TarFlowPipeline.from_pretrained(folder, dtype=torch.float32)
    else:
        flow = page_of_flow(RECIPES / f"{folder.name}.yaml")
        pipe = TarFlowPipeline(transformer=TarFlowModel(flow.config).eval(), **flow.defaults)
    pipe.register_modules(inverse=TarFlowInverseModel(options.to_config(pipe.transformer)).eval())
    return inverse_page(
        pipe,
        data,
        settings,
        options,
        repo_id=f"your-name/tarflow-{recipe.stem.replace('_', '-')}",
        command=f"accelerate launch examples/train_inverse.py examples/{recipe.relative_to(RECIPES.parent)}",
    )


def recipes() -> list[Path]:
    """Every recipe that has a page."""
    return sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("latents/*_inverse.yaml")])


def main() -> None:
    """Writes every page."""
    for recipe in recipes():
        render(recipe_page(recipe)).save(HERE / f"{recipe.stem}.md")


if __name__ == "__main__":
    main()

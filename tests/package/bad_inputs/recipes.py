"""Recipes and command lines of `examples/train.py`."""

from bad_inputs import Bad
from tarflow_hf.training.recipes import parse_arguments


def recipe(name, text, message, error=ValueError):
    """A row: the trainer is given a recipe of this text."""

    def call(folder):
        (folder / "mine.yaml").write_text(text, encoding="utf-8")
        parse_arguments(["mine.yaml"], default_recipe="nowhere.yaml")

    return Bad(name, call, error, message)


ROWS = [
    recipe("a list", "- data: x\n", "mine.yaml must hold a mapping of options, got list"),
    recipe("no data", "max_steps: 1\n", "data must name a data set"),
]

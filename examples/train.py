"""Trains a TarFlow model.

    accelerate launch examples/train.py                                # the embedded digits -> runs/digits/
    accelerate launch examples/train.py recipe.yaml --batch_size 32    # a recipe, with single values overridden
    python examples/train.py --help                                    # every option

The folder of a run holds the trained pipeline (`TarFlowPipeline.from_pretrained(folder)`), samples.png, metrics.jsonl,
curve.png, recipe.yaml, grids/ and checkpoints/. The same command started again goes on from the last complete
checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tarflow_hf.training.recipes import parse_arguments

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "digits.yaml"


def main(argv: Sequence[str]) -> int:
    """Trains as the command line says; the exit status, 0 if finished, 143 if stopped early with a checkpoint."""
    arguments = parse_arguments(argv, default_recipe=DEFAULT_RECIPE)
    from tarflow_hf.training.command import train  # here, so that --help need not wait for what only a run needs
    from tarflow_hf.training.results import NOT_PUSHED, PushError

    try:
        return train(arguments)
    except PushError as error:
        print(error, file=sys.stderr)
        return NOT_PUSHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Turns a checkpoint of a training run into a pipeline with its page, while the run goes on or after it broke off.

    python examples/export.py runs/digits/checkpoints/step-00000120 runs/digits-120
    python examples/export.py runs/digits runs/digits-long --weights posthoc --ema_length 0.15

`posthoc` makes the average of any relative length of those that a run with `posthoc_ema` has stored.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args


def main(argv: Sequence[str]) -> None:
    """Exports as the command line says."""
    options = parse(argv)
    from tarflow_hf.hub.bars import no_bars_off_a_terminal
    from tarflow_hf.training.export import export

    no_bars_off_a_terminal()
    what = export(options.checkpoint, options.output, weights=options.weights, ema_length=options.ema_length)
    print(f"{options.output}: pipeline with weights {what}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    from tarflow_hf.training.export import Weights

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run: its newest one")
    parser.add_argument("output", help="folder of the pipeline")
    parser.add_argument("--weights", choices=get_args(Weights), help="[ema where the run keeps one, else raw]")
    parser.add_argument("--ema_length", type=float, help="relative length of the average for --weights posthoc")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Makes examples/data/digits_inverted/{train,test}.parquet: the embedded digits, black on white.

    python examples/data/make_inverted_digits.py [FOLDER]

level = 255 - level, with the same rows in both splits; the recipe `digits_inverted_lora` is trained on them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import ImageOps

DIGITS = Path(__file__).parent / "digits"


def inverted(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a digit with its image inverted."""
    return row | {"image": ImageOps.invert(row["image"])}


def main(argv: Sequence[str]) -> None:
    """Writes both splits into the folder, over what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = DIGITS.parent / "digits_inverted"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="[beside the digits]")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: str(DIGITS / f"{name}.parquet") for name in ("train", "test")}
    for name, rows in load_dataset("parquet", data_files=splits).items():
        rows.map(inverted).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    main(sys.argv[1:])

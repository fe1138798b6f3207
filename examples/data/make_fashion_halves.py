"""Makes two data sets of Fashion-MNIST: many images of its classes 0 to 4, and few of its classes 5 to 9.

    python examples/data/make_fashion_halves.py [SOURCE] [FOLDER]

writes {train,test}.parquet into fashion_0_to_4, with all images of the first five classes, and into fashion_5_to_9,
with 60 training images of each of the others and all that are held out. SOURCE is what `data` of a recipe may be.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Image, concatenate_datasets

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.sources import ImageData, load_image_data

HALVES = {"fashion_0_to_4": range(5), "fashion_5_to_9": range(5, 10)}
FEW = {("fashion_5_to_9", "train"): 60}  # images of a class; all where nothing is said


def half(data: ImageData, classes: range, count: int | None) -> Dataset:
    """The rows of some classes, which are numbered anew, and of each the first ones."""
    rows, label, names = data.rows, data.label_column, data.class_names
    assert label is not None  # labels were asked for
    labels = rows[label]
    parts = []
    for name in classes:
        found = [row for row, value in enumerate(labels) if value == name]
        parts.append(rows.select(found[:count]).remove_columns(label))
    chosen = concatenate_datasets(parts).cast_column(data.image_column, Image())
    numbers = [number for number, part in enumerate(parts) for _ in range(len(part))]
    return chosen.add_column("label", numbers).cast_column("label", ClassLabel(names=[names[c] for c in classes]))


def main(argv: Sequence[str]) -> None:
    """Writes both data sets, over what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="zalando-datasets/fashion_mnist", help="[%(default)s]")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, help="[that of this script]")
    options = parser.parse_args(argv)
    train, test = load_image_data(DataArguments(data=options.source, eval_split="test"), class_conditional=True)
    if test is None or len(train.class_names) != 10:
        raise ValueError(f"{options.source} must have the 10 classes of Fashion-MNIST, got {train.class_names}")
    for name, classes in HALVES.items():
        (options.folder / name).mkdir(parents=True, exist_ok=True)
        for split, data in (("train", train), ("test", test)):
            count = FEW.get((name, split))
            rows = half(data, classes, count)
            path = options.folder / name / f"{split}.parquet"
            rows.to_parquet(path)
            print(f"{path}: {len(rows)} images")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The two halves of Fashion-MNIST that are fine-tuned from one to the other."""

from pathlib import Path

import datasets
import numpy as np

from examples.data import make_fashion_halves

DIGITS = Path(make_fashion_halves.__file__).parent / "digits"


def test_fashion_is_halved_by_class_with_few_images_of_the_second_half(tmp_path):
    """On the digits, which have ten classes too."""
    make_fashion_halves.main([str(DIGITS), str(tmp_path)])
    parts = {
        (name, split): datasets.load_dataset("parquet", data_files=str(tmp_path / name / f"{split}.parquet"))["train"]
        for name in make_fashion_halves.HALVES
        for split in ("train", "test")
    }
    few = parts["fashion_5_to_9", "train"]
    assert few.features["label"].names == list("56789")
    assert np.bincount(few["label"]).tolist() == [60] * 5
    low = parts["fashion_0_to_4", "train"]
    whole = datasets.load_dataset("parquet", data_files=str(DIGITS / "train.parquet"))["train"]
    assert len(low) == sum(label < 5 for label in whole["label"])
    assert sum(len(rows) for (_, split), rows in parts.items() if split == "test") == 297
    first = next(row for row in whole if row["label"] == 7)
    assert np.array_equal(np.asarray(few[few["label"].index(2)]["image"]), np.asarray(first["image"]))

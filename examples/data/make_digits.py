"""Makes examples/data/digits/{train,test}.parquet from scikit-learn's copy of the UCI hand-written digits.

    python examples/data/make_digits.py [FOLDER]

needs `pip install "tarflow_hf[train,eval]"` and no network: the digits come with scikit-learn.
"""

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

MAX_LEVEL = 16  # the digits' pixels are integers 0..16
TEST_SIZE = 297
SPLIT_SEED = 0
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})


def levels_to_grey(levels: np.ndarray) -> np.ndarray:
    """Pixel levels 0..16 as 8-bit grey: grey = round(level * 255 / 16)."""
    return np.rint(levels * (255 / MAX_LEVEL)).astype(np.uint8)


def grey_to_levels(grey: np.ndarray) -> np.ndarray:
    """The exact inverse of `levels_to_grey`: level = round(grey * 16 / 255)."""
    return np.rint(grey * (MAX_LEVEL / 255)).astype(np.int64)


def split_rows(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Row numbers of each split in ascending order, every class in the same proportion in both."""
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=labels
    )
    return {"train": np.sort(train), "test": np.sort(test)}


def make_split(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Dataset:
    """The chosen rows as PNG images named by their row number, and their labels."""
    columns = {
        "image": [{"bytes": png_bytes(levels_to_grey(images[row])), "path": f"{row:04d}.png"} for row in rows],
        "label": labels[rows].tolist(),
    }
    return Dataset.from_dict(columns, features=FEATURES)


def png_bytes(grey: np.ndarray) -> bytes:
    """An 8-bit grey image (height, width) as a PNG file."""
    buffer = BytesIO()
    PILImage.fromarray(grey).save(buffer, format="PNG")
    return buffer.getvalue()


def main(folder: Path) -> None:
    """Writes both splits into the folder, over what is there."""
    digits = load_digits()
    for name, rows in split_rows(digits.target).items():
        make_split(digits.images, digits.target, rows).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "digits")

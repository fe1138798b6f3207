"""Reads a digits model's samples with a support vector machine trained on the real digits: is it the digit asked for?

python examples/data/digits_svm.py runs/digits --guidance_scale 2
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from sklearn.svm import SVC

from tarflow_hf import TarFlowPipeline

TRAIN = Path(__file__).parent / "digits" / "train.parquet"


def main(argv: Sequence[str]) -> None:
    """Prints the share of samples that are read as the class asked for."""
    parser = argparse.ArgumentParser(description="Reads a digits model's samples with a support vector machine.")
    parser.add_argument("model", help="folder of a saved pipeline, or its name on the Hub")
    parser.add_argument("--guidance_scale", type=float, help="default: the one saved with the pipeline")
    parser.add_argument("--decoder", default="exact", help="exact, one_pass or refined")
    parser.add_argument("--num_images_per_label", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    rows = load_dataset("parquet", data_files=str(TRAIN), split="train")
    levels = np.stack([np.array(image, dtype=float).ravel() for image in rows["image"]]) * 16 / 255
    reader = SVC(C=10, gamma=0.001).fit(levels.round(), rows["label"])

    pipe = TarFlowPipeline.from_pretrained(options.model)
    (images,) = pipe(
        list(range(10)),
        num_images_per_label=options.num_images_per_label,
        guidance_scale=options.guidance_scale,
        decoder=options.decoder,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="np",
        return_dict=False,
    )
    asked = np.repeat(np.arange(10), options.num_images_per_label)
    right = reader.predict(np.asarray(images).reshape(len(asked), -1) * 16) == asked
    print(f"{right.mean():.1%} of {len(asked)} samples are read as the digit asked for")


if __name__ == "__main__":
    main(sys.argv[1:])

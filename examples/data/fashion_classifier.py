"""A small classifier of Fashion-MNIST, which reads samples, and whose features make a Fréchet distance for them.

    python examples/data/fashion_classifier.py read examples/showcase/fashion --guidance_scale 1 2 3
    python examples/evaluate.py examples/showcase/fashion --data zalando-datasets/fashion_mnist \
        --metrics frechet_distance --feature_extractor examples/data/fashion_classifier.py:fashion_classifier

`read` draws samples of every class and prints the share that is read as the class asked for. The weights are kept in
`fashion_classifier.safetensors`, so that the numbers mean the same on every machine;
`python examples/data/fashion_classifier.py train` makes them anew (eight epochs, some minutes) and prints the accuracy
on the held-out images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, collate
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.samples import SampleSettings, draw_samples
from tarflow_hf.training.export import load_pipeline

WEIGHTS = Path(__file__).with_suffix(".safetensors")
FASHION = "zalando-datasets/fashion_mnist"


class FashionClassifier(nn.Module):
    """Four convolutions and two linear layers; `forward` gives the 64 features before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 3 * 3, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 28, 28) levels 0 ... 255 -> (batch, 64) features."""
        hidden = F.max_pool2d(F.relu(self.conv1(levels.float() / 127.5 - 1)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        hidden = F.max_pool2d(F.relu(self.conv4(F.relu(self.conv3(hidden)))), 2)
        return self.hidden(hidden.flatten(1))

    def logits(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 28, 28) levels -> (batch, 10) scores of the classes."""
        return self.output(F.relu(self(levels)))


def fashion_classifier() -> FashionClassifier:
    """The trained classifier."""
    network = FashionClassifier()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def load_fashion_split(data: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, 1, 28, 28) uint8 levels and (images,) int64 labels of a split."""
    images, _ = load_image_data(DataArguments(data=data, train_split=split), class_conditional=True)
    found = collate(StoredImages(images, ImageFormat(image_size=28, num_channels=1), cached=True).samples)
    return found.levels, found.class_labels


@torch.no_grad()
def predicted(network: FashionClassifier, levels: torch.Tensor) -> torch.Tensor:
    """(images,) the class that each image is read as."""
    return torch.cat([network.logits(part).argmax(1) for part in levels.split(500)])


def train(data: str, epochs: int = 8) -> FashionClassifier:
    """Trains a classifier on mirrored and shifted training images."""
    torch.manual_seed(0)
    levels, labels = load_fashion_split(data, "train")
    network, batch_size = FashionClassifier(), 100
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(levels) // batch_size)
    for epoch in range(epochs):
        for rows in torch.randperm(len(levels)).split(batch_size):
            down, right, mirrored = (int(torch.randint(count, ())) for count in (3, 3, 2))
            batch = F.pad(levels[rows], (1, 1, 1, 1))[..., down : down + 28, right : right + 28]
            batch = batch.flip(3) if mirrored else batch
            loss = F.cross_entropy(network.logits(batch), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss of the last batch {loss.item():.3f}", flush=True)
    return network.eval()


def read(model: str, guidance_scale: float | None, num_per_class: int, seed: int) -> np.ndarray:
    """(classes,) share of a pipeline's samples of each class that the classifier reads as that class."""
    pipe, network = load_pipeline(model), fashion_classifier()
    pipe.set_progress_bar_config(disable=True)
    settings = SampleSettings(seed, guidance_scale, labels="balanced")
    parts = [draw_samples(pipe, range(start, start + 100), settings) for start in range(0, 10 * num_per_class, 100)]
    images, asked = (np.concatenate([part[name] for part in parts]) for name in ("images", "class_labels"))
    right = predicted(network, torch.from_numpy(images).movedim(-1, 1)).numpy() == asked
    return np.array([right[asked == label].mean() for label in range(10)])


def main(argv: Sequence[str]) -> None:
    """Trains, or reads samples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="make the weights anew")
    training.add_argument("--data", default=FASHION, help=f"folder or Hub data set [{FASHION}]")
    reading = commands.add_parser("read", help="read samples of a pipeline")
    reading.add_argument("model", help="folder of a pipeline or a run, or a name on the Hub")
    reading.add_argument("--guidance_scale", nargs="+", type=float, default=[None], help="[the pipeline's]")
    reading.add_argument("--num_per_class", type=int, default=100, help="a multiple of 10 [100]")
    reading.add_argument("--seed", type=int, default=0, help="[0]")
    options = parser.parse_args(argv)
    if options.command == "train":
        network = train(options.data)
        levels, labels = load_fashion_split(options.data, "test")
        halved = {name: value.half() for name, value in network.state_dict().items()}
        network.load_state_dict(halved)
        share = (predicted(network, levels) == labels).float().mean()
        print(f"{share:.2%} of the held-out images are read right")
        save_file(halved, WEIGHTS)
        return
    for scale in options.guidance_scale:
        shares = read(options.model, scale, options.num_per_class, options.seed)
        of_classes = " ".join(f"{share:.2f}" for share in shares)
        print(f"guidance {scale or 'of the pipeline'}: {shares.mean():.1%} read as asked; by class {of_classes}")


if __name__ == "__main__":
    main(sys.argv[1:])

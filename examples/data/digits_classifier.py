"""A small classifier of the embedded digits, whose features make a Fréchet distance for them: FD-digits_classifier.

    python examples/evaluate.py runs/digits --data examples/data/digits --split test \
        --feature_extractor examples/data/digits_classifier.py:digits_classifier

Its weights are kept in `digits_classifier.safetensors`, so that the distance means the same on every machine; running
this file trains them anew on the 1,500 training digits (half a minute) and prints the accuracy on the 297 others.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, collate
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data

DIGITS = Path(__file__).parent / "digits"
WEIGHTS = Path(__file__).with_suffix(".safetensors")


class DigitsClassifier(nn.Module):
    """Two convolutions and two linear layers; `forward` gives the 32 features before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 4 * 4, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 8, 8) levels 0 ... 255 -> (batch, 32) features."""
        images = levels.float() / 127.5 - 1
        return self.hidden(F.gelu(self.conv2(F.gelu(self.conv1(images)))).flatten(1))

    def logits(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, 1, 8, 8) levels -> (batch, 10) scores of the digits."""
        return self.output(F.gelu(self(levels)))


def digits_classifier() -> DigitsClassifier:
    """The trained classifier."""
    network = DigitsClassifier()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def load_digits_split(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, 1, 8, 8) uint8 levels and (images,) int64 labels of `"train"` or `"test"`."""
    data, _ = load_image_data(DataArguments(data=str(DIGITS), train_split=split), class_conditional=True)
    found = collate(StoredImages(data, ImageFormat(image_size=8, num_channels=1), cached=True).samples)
    return found.levels, found.class_labels


def accuracy(network: DigitsClassifier) -> float:
    """Share of the held-out digits that a classifier reads right."""
    levels, labels = load_digits_split("test")
    with torch.no_grad():
        return float((network.logits(levels).argmax(1) == labels).float().mean())


def train(epochs: int = 60) -> DigitsClassifier:
    """Trains a classifier on images under Gaussian noise, which samples carry as well."""
    torch.manual_seed(0)
    levels, labels = load_digits_split("train")
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(levels) // 50)
    for _ in range(epochs):
        for rows in torch.randperm(len(levels)).split(50):
            noisy = levels[rows].float() + 12 * torch.randn(len(rows), 1, 8, 8)
            loss = F.cross_entropy(network.logits(noisy), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


if __name__ == "__main__":
    trained = train()
    print(f"{accuracy(trained):.1%} of the held-out digits are read right")
    save_file(trained.state_dict(), WEIGHTS)

"""Small classifiers of Fashion-MNIST and of emoji, which read samples, and whose features make a Fréchet distance.

    python examples/data/classifiers.py read fashion examples/showcase/fashion --guidance_scale 1 2 3
    python examples/evaluate.py examples/showcase/fashion --data zalando-datasets/fashion_mnist \
        --metrics frechet_distance --feature_extractor examples/data/classifiers.py:fashion_classifier

`read` draws samples of every class and prints the share that is read as the class asked for. The weights are kept in
`fashion_classifier.safetensors` and its like, so that the numbers mean the same everywhere; `train fashion` makes them
anew (some minutes) and prints the accuracy on the held-out images. `fashion_lessons` is another classifier of the same
images, whose features a learned inverse is taught with, so that it is measured by what it has not seen.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tarflow_hf.flow.class_names import class_names
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import StoredImages, collate
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.metrics.samples import SampleSettings, draw_samples
from tarflow_hf.training.export import load_pipeline

HERE = Path(__file__).parent


class SmallClassifier(nn.Module):
    """Four convolutions and two linear layers; `forward` gives the 64 features before the last."""

    def __init__(self, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * (image_size // 8) ** 2, 64)
        self.output = nn.Linear(64, num_classes)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) levels 0 ... 255 -> (batch, 64) features."""
        return self.summary(self.maps(levels))

    def summary(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What [`maps`] gives -> (batch, 64) features."""
        return self.hidden(F.max_pool2d(maps[-1], 2).flatten(1))

    def maps(self, levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(batch, channels, height, width) levels -> what each convolution finds, (batch, found, height, width)."""
        first = F.relu(self.conv1(levels.float() / 127.5 - 1))
        second = F.relu(self.conv2(F.max_pool2d(first, 2)))
        third = F.relu(self.conv3(F.max_pool2d(second, 2)))
        return first, second, third, F.relu(self.conv4(third))

    def logits(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) levels -> (batch, classes) scores of the classes."""
        return self.output(F.relu(self(levels)))


class PerceptualFeatures(nn.Module):
    """What a classifier finds in an image, place by place, in the manner of LPIPS (arXiv 1801.03924).

    The maps of each convolution, divided by their length over the channels at each place, and the last features,
    divided by theirs; every one of the five parts has the same share of the length of all.
    """

    def __init__(self, network: SmallClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) levels -> (batch, features)."""
        maps = self.network.maps(levels)
        parts = [F.normalize(part, dim=1, eps=1e-3) / (part.shape[-2] * part.shape[-1]) ** 0.5 for part in maps]
        return torch.cat([*(part.flatten(1) for part in parts), F.normalize(self.network.summary(maps))], dim=1)


@dataclass(frozen=True)
class Task:
    """What a classifier is trained on: a data set, its images and classes, and how often it is seen."""

    data: str
    num_channels: int
    image_size: int
    num_classes: int
    epochs: int
    mirrored: bool
    seed: int = 0

    def network(self) -> SmallClassifier:
        """The classifier, not trained yet."""
        return SmallClassifier(self.num_channels, self.image_size, self.num_classes)

    def load_split(self, data: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, channels, height, width) uint8 levels and (images,) int64 labels of a split."""
        images, _ = load_image_data(DataArguments(data=data, train_split=split), class_conditional=True)
        image_format = ImageFormat(image_size=self.image_size, num_channels=self.num_channels)
        found = collate(StoredImages(images, image_format, cached=True).samples)
        return found.levels, found.class_labels


TASKS = {
    "fashion": Task("zalando-datasets/fashion_mnist", 1, 28, 10, epochs=8, mirrored=True),
    "fashion_lessons": Task("zalando-datasets/fashion_mnist", 1, 28, 10, epochs=8, mirrored=True, seed=1),
    "emoji": Task("examples/data/emoji", 3, 32, 9, epochs=20, mirrored=False),
}


def fashion_classifier() -> SmallClassifier:
    """The trained classifier of Fashion-MNIST."""
    return trained("fashion")


def fashion_perceptual() -> PerceptualFeatures:
    """What a learned inverse is taught with: of another classifier than [`fashion_classifier`], which measures it."""
    return PerceptualFeatures(trained("fashion_lessons"))


def emoji_classifier() -> SmallClassifier:
    """The trained classifier of the nine categories of emoji, 32x32."""
    return trained("emoji")


def trained(name: str) -> SmallClassifier:
    """A classifier with the weights beside this file."""
    network = TASKS[name].network()
    network.load_state_dict(load_file(weights_of(name)))
    return network.eval()


def weights_of(name: str) -> Path:
    """Where the weights of a classifier are kept."""
    return HERE / f"{name}_classifier.safetensors"


@torch.no_grad()
def predicted(network: SmallClassifier, levels: torch.Tensor) -> torch.Tensor:
    """(images,) the class that each image is read as."""
    return torch.cat([network.logits(part).argmax(1) for part in levels.split(500)])


def train(task: Task, data: str) -> SmallClassifier:
    """Trains a classifier on shifted, and where it may be mirrored, training images."""
    torch.manual_seed(task.seed)
    levels, labels = task.load_split(data, "train")
    network, batch_size, side = task.network(), 100, task.image_size
    steps = task.epochs * -(-len(levels) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(task.epochs):
        for rows in torch.randperm(len(levels)).split(batch_size):
            down, right, mirrored = (int(torch.randint(count, ())) for count in (3, 3, 2))
            batch = F.pad(levels[rows].float(), (1, 1, 1, 1), mode="replicate")
            batch = batch[..., down : down + side, right : right + side]
            batch = batch.flip(3) if task.mirrored and mirrored else batch
            loss = F.cross_entropy(network.logits(batch), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {task.epochs}: loss of the last batch {loss.item():.3f}", flush=True)
    return network.eval()


def groups_of(names: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """What a classifier reads of a model's classes, and the number of that for each class.

    Classes with names such as `Food & Drink: food-fruit` are of the group before the colon, as the emoji's
    subcategories are; others are read as they are.
    """
    heads = [name.partition(": ")[0] for name in names]
    groups = list(names) if list(names) == heads else sorted(set(heads))
    return groups, torch.tensor([groups.index(head) for head in heads])


def read(name: str, model: str, settings: SampleSettings, num_per_class: int) -> np.ndarray:
    """(groups,) share of a pipeline's samples of each class, or group of classes, that is read as that."""
    pipe, network = load_pipeline(model), trained(name)
    pipe.set_progress_bar_config(disable=True)
    _, groups = groups_of(class_names(pipe.transformer.config))
    classes = len(groups)
    if num_per_class < 1 or num_per_class % 10:
        raise ValueError(f"num_per_class must be a multiple of 10, got {num_per_class}")
    per_call = 10 * classes
    starts = range(0, classes * num_per_class, per_call)
    parts = [draw_samples(pipe, range(start, start + per_call), settings) for start in starts]
    images, asked = (np.concatenate([part[name] for part in parts]) for name in ("images", "class_labels"))
    asked = groups[torch.from_numpy(asked)].numpy()
    right = predicted(network, torch.from_numpy(images).movedim(-1, 1)).numpy() == asked
    return np.array([right[asked == group].mean() for group in range(TASKS[name].num_classes)])


def main(argv: Sequence[str]) -> None:
    """Trains, or reads samples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="make the weights anew")
    training.add_argument("name", choices=TASKS, help="what it reads")
    training.add_argument("--data", help="folder or Hub data set, in place of the usual one")
    reading = commands.add_parser("read", help="read samples of a pipeline")
    reading.add_argument("name", choices=TASKS, help="what they show")
    reading.add_argument("model", help="folder of a pipeline or a run, or a name on the Hub")
    reading.add_argument("--guidance_scale", nargs="+", type=float, default=[None], help="[the pipeline's]")
    reading.add_argument("--temperature", type=float, help="standard deviation of the latents [the pipeline's]")
    reading.add_argument("--denoising_strength", type=float, help="1 is a whole score step [the pipeline's]")
    reading.add_argument("--num_per_class", type=int, default=100, help="a multiple of 10 [100]")
    reading.add_argument("--seed", type=int, default=0, help="[0]")
    options = parser.parse_args(argv)
    if options.command == "train":
        task = TASKS[options.name]
        network = train(task, options.data or task.data)
        levels, labels = task.load_split(options.data or task.data, "test")
        halved = {name: value.half() for name, value in network.state_dict().items()}
        network.load_state_dict(halved)
        share = (predicted(network, levels) == labels).float().mean()
        print(f"{share:.2%} of the held-out images are read right")
        save_file(halved, weights_of(options.name))
        return
    for scale in options.guidance_scale:
        settings = SampleSettings(
            options.seed,
            scale,
            denoising_strength=options.denoising_strength,
            temperature=options.temperature,
            labels="balanced",
        )
        shares = read(options.name, options.model, settings, options.num_per_class)
        of_classes = " ".join(f"{share:.2f}" for share in shares)
        print(f"guidance {scale or 'of the pipeline'}: {shares.mean():.1%} read as asked; by class {of_classes}")


if __name__ == "__main__":
    main(sys.argv[1:])

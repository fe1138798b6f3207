"""A data set of images encoded once by an autoencoder: standardised latents in shards; a kill costs one at most.

A folder holds `latents.json`, which says of what the latents are, and for each split files `SPLIT-00000.safetensors`:
`mean` and, for an autoencoder with a distribution, `std`, each (images, views, channels, rows, columns), the second
view of a mirrored image where asked for; and `label` (images,). Encoding goes on where it stopped, and a folder of
other latents (another autoencoder, data set or size) is refused.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from tarflow_hf.images.batches import StoredImages, collate
from tarflow_hf.images.latents import Autoencoder, encode_moments
from tarflow_hf.images.processing import to_pixel_values

logger = logging.getLogger(__name__)

INDEX = "latents.json"


class LatentDataError(ValueError):
    """A folder of latents is of something else than what is asked for, or is not whole."""


@dataclass(frozen=True)
class LatentSample:
    """The latents of one image.

    Args:
        moments: (views, 1 or 2, channels, rows, columns) float32: mean, and standard deviation where there is one.
        label: Class id, -1 where there is none.

    Example:
        >>> LatentSample(torch.zeros(1, 1, 4, 8, 8), label=7).label
        7
    """

    moments: torch.Tensor
    label: int


@dataclass(frozen=True)
class LatentBatch:
    """Latents on their way to the device.

    Args:
        moments: (batch, views, 1 or 2, channels, rows, columns) float32.
        class_labels: (batch,) int64 class ids, -1 where there is none.
        bad_rows: Always empty: unreadable images are met when they are encoded.
        condition: Always None: flows of latents take labels alone.

    Example:
        >>> batch = collate_latents([LatentSample(torch.zeros(1, 1, 4, 8, 8), 7)])
        >>> mean, std = batch.select(torch.tensor([False]), torch.device("cpu"))
        >>> mean.shape, std
        (torch.Size([1, 4, 8, 8]), None)
    """

    moments: torch.Tensor
    class_labels: torch.Tensor
    bad_rows: tuple[int, ...] = ()
    condition: None = None

    def select(self, mirrored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (or None) of each image, of its mirrored view where (batch,) `mirrored` says.

        Raises:
            LatentDataError: If mirrored views are asked for and were not encoded.
        """
        if self.moments.shape[1] == 1 and bool(mirrored.any()):
            raise LatentDataError("horizontal_flip=true needs latents of mirrored images, and these have none")
        chosen = self.moments[torch.arange(len(self.moments)), mirrored.long()].to(device, non_blocking=True)
        return chosen[:, 0], chosen[:, 1] if chosen.shape[1] == 2 else None

    def pin_memory(self) -> "LatentBatch":
        """Called by the data loader so that copies to a GPU need not wait."""
        return LatentBatch(self.moments.pin_memory(), self.class_labels.pin_memory())


def collate_latents(samples: Sequence[LatentSample]) -> LatentBatch:
    """Stacks samples into a batch.

    Example:
        >>> collate_latents([LatentSample(torch.zeros(2, 1, 4, 8, 8), label=3)] * 2).class_labels
        tensor([3, 3])
    """
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return LatentBatch(torch.stack([sample.moments for sample in samples]), labels)


class StoredLatents(Dataset[LatentSample]):
    """Encoded images by row, read from the shards of one split (mapped into memory, not copied).

    Args:
        folder: Folder that [`encode_images`] wrote.
        split: Name of the split.

    Raises:
        LatentDataError: If the folder is no such folder, or a shard is missing or damaged.

    Example:
        >>> from pathlib import Path
        >>> StoredLatents(Path("nothing"), "train")
        Traceback (most recent call last):
            ...
        tarflow_hf.images.latent_data.LatentDataError: nothing is no folder of latents: ...
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        about = _read_index(folder).get("splits", {}).get(split)
        if about is None:
            raise LatentDataError(f"{folder} holds no latents of the split {split!r}")
        self.num_images, self.shard_size = int(about["num_images"]), int(about["shard_size"])
        self.shards = []
        for shard in range(-(-self.num_images // self.shard_size)):
            path = folder / _shard_name(split, shard)
            try:
                self.shards.append(load_file(path))
            except Exception as error:  # safetensors raises an error type of its own
                raise LatentDataError(f"{path} cannot be read: {error}; encode the data set again") from error

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, row: int) -> LatentSample:
        shard, index = divmod(range(self.num_images)[row], self.shard_size)
        tensors = self.shards[shard]
        parts = [tensors[name][index].float() for name in ("mean", "std") if name in tensors]
        return LatentSample(torch.stack(parts, dim=1), int(tensors["label"][index]))


def fingerprint(vae: Autoencoder) -> str:
    """Sixteen hexadecimal digits that tell one autoencoder from another: of its configuration and weights.

    Args:
        vae: The autoencoder.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> vae = AutoencoderTiny()
        >>> before = fingerprint(vae)
        >>> _ = vae.decoder.layers[0].bias.data.add_(1.0)
        >>> before == fingerprint(vae)
        False
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(vae).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode_images(
    vae: Autoencoder,
    images: StoredImages,
    folder: Path,
    split: str,
    *,
    mirrored: bool,
    multiple: int = 1,
    batch_size: int = 64,
    shard_size: int = 4096,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Encodes a data set into a folder, shard by shard; complete shards are kept, so that it can be taken up again.

    Args:
        vae: The autoencoder, in evaluation mode on the device to use.
        images: The images.
        folder: Where the latents go; made if missing.
        split: What the split is called there.
        mirrored: Whether mirrored images are encoded too: a mirrored latent is not the latent of a mirrored image.
        multiple: What the sides of the grid of latents shall be multiples of, see [`latents.pad_to_grid`].
        batch_size: Images encoded at once.
        shard_size: Images of a file.
        process_index: This process, which encodes every `num_processes`-th shard.
        num_processes: All processes.

    Raises:
        LatentDataError: If the folder holds latents of something else; the message says what differs.

    Example:
        >>> from pathlib import Path
        >>> from diffusers import AutoencoderTiny
        >>> from tarflow_hf.images import arguments, batches, processing, sources
        >>> digits = arguments.DataArguments(data="./examples/data/digits", eval_split="test")
        >>> _, data = sources.load_image_data(digits, class_conditional=True, eval_images=10)
        >>> images = batches.StoredImages(data, processing.ImageFormat(8, 1))
        >>> vae = AutoencoderTiny(in_channels=1, out_channels=1).eval()
        >>> encode_images(vae, images, Path("latents"), "train", mirrored=True)
        >>> StoredLatents(Path("latents"), "train")[3].moments.shape
        torch.Size([2, 1, 4, 1, 1])
    """
    about = {
        "num_images": len(images),
        "shard_size": shard_size,
        "views": 2 if mirrored else 1,
        "multiple": multiple,
        "images": _images_fingerprint(images),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, {"vae": fingerprint(vae)}, split, about, write=process_index == 0)
    for shard in range(process_index, -(-len(images) // shard_size), num_processes):
        path = folder / _shard_name(split, shard)
        if not path.exists():
            rows = range(shard * shard_size, min((shard + 1) * shard_size, len(images)))
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            save_file(_encode_rows(vae, images, rows, mirrored, multiple, batch_size), partial)
            os.replace(partial, path)


@torch.no_grad()
def _encode_rows(
    vae: Autoencoder, images: StoredImages, rows: range, mirrored: bool, multiple: int, batch_size: int
) -> dict[str, torch.Tensor]:
    """The tensors of one shard."""
    means, stds, labels = [], [], []
    for start in range(0, len(rows), batch_size):
        batch = collate([images[row] for row in rows[start : start + batch_size]])
        if batch.bad_rows:
            logger.warning("unreadable images in rows %s, replaced", list(batch.bad_rows))
        pixel_values = to_pixel_values(batch.levels.to(vae.device)).to(vae.dtype)
        views = [pixel_values, pixel_values.flip(3)] if mirrored else [pixel_values]
        moments = [encode_moments(vae, view, multiple) for view in views]
        means.append(torch.stack([mean for mean, _ in moments], dim=1).cpu())
        stds += (
            [torch.stack([std for _, std in moments if std is not None], dim=1).cpu()]
            if moments[0][1] is not None
            else []
        )
        labels.append(batch.class_labels)
    tensors = {"mean": torch.cat(means), "label": torch.cat(labels)} | ({"std": torch.cat(stds)} if stds else {})
    for name in ("mean", "std"):
        if name in tensors and not tensors[name].isfinite().all():
            raise LatentDataError(f"the vae's latents of rows {rows.start} to {rows.stop - 1} are not finite")
    return tensors


def _images_fingerprint(images: StoredImages) -> str:
    """Of the prepared images: their format and up to 64 of them, evenly spread."""
    digest = hashlib.sha256(repr((images.image_format, images.data.class_names)).encode())
    for row in range(0, len(images), max(1, len(images) // 64)):
        sample = images[row]
        digest.update(sample.levels.contiguous().numpy().tobytes() + str(sample.label).encode())
    return digest.hexdigest()[:16]


def _agree(folder: Path, whole: dict[str, Any], split: str, about: dict[str, Any], *, write: bool) -> None:
    """Writes what the latents are of, or checks that the folder's are of the same."""
    index: dict[str, Any] = _read_index(folder) if (folder / INDEX).exists() else {**whole, "splits": {}}
    known = {**{name: index.get(name) for name in whole}, **index["splits"].get(split, about)}
    wanted = {**whole, **about}
    differences = [
        f"{name} was {known.get(name)!r} and is now {value!r}"
        for name, value in wanted.items()
        if known.get(name) != value
    ]
    if differences:
        raise LatentDataError(
            f"{folder} holds latents of something else: {'; '.join(differences)}. Choose another folder, or remove it"
        )
    if write and split not in index["splits"]:
        index["splits"][split] = about
        partial = folder / f".{INDEX}"
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(partial, folder / INDEX)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LatentDataError(f"{folder} is no folder of latents: {error}") from error


def _shard_name(split: str, shard: int) -> str:
    return f"{split}-{shard:05d}.safetensors"


__all__ = [
    "LatentBatch",
    "LatentDataError",
    "LatentSample",
    "StoredLatents",
    "collate_latents",
    "encode_images",
    "fingerprint",
]

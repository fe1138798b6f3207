"""The autoencoder of a latent flow, from a folder or from the Hub."""

import inspect
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoModel

from tarflow_hf.configuration_tarflow import did_you_mean, read_json
from tarflow_hf.hub.checkpoint_files import INDEX, VAE_STEM, Place
from tarflow_hf.hub.download import download_model
from tarflow_hf.hub.model_files import read_entries, weight_files
from tarflow_hf.hub.safetensors_files import FLOATS, Entry, check_finite, shape_text
from tarflow_hf.images.latents import Autoencoder, latent_channels, latent_scaling, spatial_factor

_LARGEST = 2**20
_FORMER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_autoencoder(place: str) -> Autoencoder:
    """Loads a diffusers autoencoder in float32, in evaluation mode, its gradients off.

    Args:
        place: A folder with the autoencoder or with a pipeline that has one in `vae/`; or a Hub repository of an
            autoencoder, "user/model", or its folder in a repository, "user/model/vae". Only safetensors weights.

    Raises:
        FileNotFoundError: If a path is no folder, or the folder has no autoencoder.
        OSError: If the Hub has no such repository, it has no safetensors weights, or what is there is damaged or no
            image autoencoder with a fixed grid of latents.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> AutoencoderTiny(latent_channels=2).save_pretrained("vae")
        >>> load_autoencoder("./vae").config["latent_channels"]
        2
    """
    folder = Path(place).expanduser()
    if folder.is_dir() or place.startswith(("/", "./", "../", "~")):
        if not folder.is_dir():
            raise FileNotFoundError(f"vae={place!r} is no folder: expected one with an autoencoder of diffusers")
        folder = folder if (folder / "config.json").is_file() else folder / "vae"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"vae={place!r} has no config.json, neither itself nor in vae/")
    else:
        owner_and_name, _, subfolder = _split(place)
        folder = download_model(owner_and_name, subfolder=subfolder, stem=VAE_STEM) / subfolder
    check_autoencoder_files(folder, Place(f"vae={place!r}"))
    loaded = AutoModel.from_pretrained(str(folder), torch_dtype=torch.float32, use_safetensors=True)
    loaded.register_to_config(_name_or_path=None)  # a folder of this machine
    return cast(Autoencoder, loaded.eval().requires_grad_(False))


def check_autoencoder_files(
    folder: Path, place: Place, variant: str | None = None, class_name: str | None = None
) -> dict[str, Entry]:
    """Raises OSError, naming the file, unless an autoencoder's configuration and weights fit, are whole and finite.

    Args:
        folder: The folder of the autoencoder.
        place: What messages call it.
        variant: The weights that are wanted.
        class_name: The class that a pipeline's index names; None: whichever the configuration does.

    Returns:
        What the headers of the weights say.
    """
    name = place.file("config.json")
    if not (folder / "config.json").is_file():
        raise OSError(f"{place.owner} is incomplete: it has no {place.inside}config.json")
    content = read_json(folder / "config.json", name)
    kind = _class_of(content, name, class_name)
    entries = read_entries(folder, place, variant, VAE_STEM)
    if content.get("quantization_config") is None:
        _check_shapes(_shapes(kind, content, len(entries), name), entries, place)
    for file in weight_files(folder, place, variant, VAE_STEM):
        check_finite(folder / file, place.file(file))
    return entries


def stored_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The type that most of the weights have, float32 where that is none of torch's own."""
    names = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    counts = Counter(entry.dtype for entry in entries.values())
    return names.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32


def _class_of(content: Mapping[str, Any], name: str, wanted: str | None) -> type[Autoencoder]:
    """The class of diffusers that a configuration is of, with every setting looked at that could be misspelt."""
    called = content.get("_class_name")
    kind = getattr(diffusers, called, None) if isinstance(called, str) and called.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, Autoencoder) and hasattr(kind, "decode")):
        raise OSError(f"{name} is damaged: _class_name must be an autoencoder of diffusers, got {called!r:.60}")
    if wanted not in (None, called):
        raise OSError(f"{name} is of another class than {INDEX} says: expected {wanted}, got {called}")
    known = list(inspect.signature(kind.__init__).parameters)[1:]
    for key in content:
        near = "" if key.startswith("_") or key in known else did_you_mean(key, known, likeness=0.85)
        if near:  # what is unknown altogether diffusers warns of
            raise OSError(f"{name} is damaged: {called} has no setting {key!r}{near}")
    return kind


def _shapes(
    kind: type[Autoencoder], content: Mapping[str, Any], num_tensors: int, name: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of an autoencoder by name, without making them."""
    for key, value in content.items():
        largest = num_tensors if key.endswith(("per_block", "encoder_blocks", "decoder_blocks")) else _LARGEST
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number > largest:  # no weights bear it out, and building it would take for ever
                raise OSError(f"{name} does not fit the weights: {key} must be at most {largest}, got {number}")
    try:
        with torch.device("meta"):
            empty: Autoencoder = kind.from_config(dict(content))  # type: ignore[attr-defined]
        latent_channels(empty), spatial_factor(empty), latent_scaling(empty)  # each refuses what it cannot use
        return {key: tuple(tensor.shape) for key, tensor in empty.state_dict().items()}
    except Exception as error:  # whatever a class meets among settings that are none of its
        reason = " ".join(str(error).split())
        raise OSError(f"{name} is damaged: it makes no {kind.__name__}: {reason:.200}") from error


def _check_shapes(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry], place: Place) -> None:
    """Refuses tensors that are too many, too few, of another shape, or no floating point numbers."""
    names = {key: _present_name(key) for key in entries}
    if surplus := sorted(key for key, present in names.items() if present not in expected):
        raise OSError(
            f"{entries[surplus[0]].file} has {len(surplus)} tensors that an autoencoder of its config.json has not, "
            f"among them {surplus[0]}"
        )
    if missing := sorted(expected.keys() - set(names.values())):
        raise OSError(
            f"{place.owner} is incomplete: the weights of its autoencoder lack {len(missing)} tensors, "
            f"among them {missing[0]}"
        )
    for key, entry in entries.items():
        if entry.dtype not in FLOATS:
            raise OSError(f"{entry.file} is damaged: {key} must be one of {', '.join(FLOATS)}, got {entry.dtype}")
        if entry.shape != expected[names[key]]:
            wanted, found = shape_text(expected[names[key]]), shape_text(entry.shape)
            raise OSError(f"{entry.file} does not fit its config.json: {key} must be {wanted}, got {found}")


def _present_name(key: str) -> str:
    """The name of a tensor in today's diffusers, which renames those of its former attention when it loads them."""
    for old, new in _FORMER_ATTENTION.items():
        if ".attentions." in key and f".{old}." in key:
            return key.replace(f".{old}.", f".{new}.")
    return key


def _split(place: str) -> tuple[str, str, str]:
    parts = place.split("/", 2)
    return "/".join(parts[:2]), "/", parts[2] if len(parts) == 3 else ""


__all__ = ["load_autoencoder"]

"""The autoencoder of a latent flow, from a folder or from the Hub."""

from pathlib import Path

import torch
from diffusers import AutoModel

from tarflow_hf.configuration_tarflow import read_json
from tarflow_hf.hub.checkpoint_files import VAE_STEM, Place, weight_names
from tarflow_hf.hub.safetensors_files import check_finite, read_header
from tarflow_hf.images.latents import Autoencoder, latent_channels, latent_scaling, spatial_factor


def load_autoencoder(place: str) -> Autoencoder:
    """Loads a diffusers autoencoder in float32, in evaluation mode, its gradients off.

    Args:
        place: A folder with the autoencoder or with a pipeline that has one in `vae/`; or a Hub repository of an
            autoencoder, "user/model", or its folder in a repository, "user/model/vae". Only safetensors weights.

    Raises:
        FileNotFoundError: If a path is no folder, or the folder has no autoencoder.
        OSError: If the Hub has no such repository, or it has no safetensors weights.
        ValueError: If what is there is no image autoencoder with a fixed grid of latents.

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
        loaded = AutoModel.from_pretrained(str(folder), torch_dtype=torch.float32, use_safetensors=True)
    else:
        owner_and_name, _, subfolder = _split(place)
        options = {"subfolder": subfolder or None, "torch_dtype": torch.float32, "use_safetensors": True}
        loaded = AutoModel.from_pretrained(owner_and_name, **options)
    latent_channels(loaded), spatial_factor(loaded), latent_scaling(loaded)  # each refuses what it cannot use
    return loaded.eval().requires_grad_(False)


def check_autoencoder_files(folder: Path, place: Place, variant: str | None) -> None:
    """Raises OSError, naming the file, unless an autoencoder's configuration and weights are there, whole and finite.

    Args:
        folder: The folder of the autoencoder.
        place: What messages call it.
        variant: The weights that are wanted.
    """
    if not (folder / "config.json").is_file():
        raise OSError(f"{place.owner} is incomplete: it has no {place.inside}config.json")
    read_json(folder / "config.json", place.file("config.json"))
    whole, _, index = weight_names(variant, VAE_STEM)
    files = [whole] if (folder / whole).is_file() else []
    if not files:
        if not (folder / index).is_file():
            wanted = "" if variant is None else f" of the variant {variant!r}"
            raise OSError(f"{place.owner} has no weights{wanted}: neither {place.inside}{whole} nor shards of it")
        files = sorted(set(read_json(folder / index, place.file(index))["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise OSError(f"{place.owner} is incomplete: it has no {place.inside}{file}")
        read_header(folder / file, place.file(file))
        check_finite(folder / file, place.file(file))


def _split(place: str) -> tuple[str, str, str]:
    parts = place.split("/", 2)
    return "/".join(parts[:2]), "/", parts[2] if len(parts) == 3 else ""


__all__ = ["load_autoencoder"]

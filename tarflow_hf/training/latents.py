"""Training on the latents of an autoencoder: what a recipe with `vae` gives in place of images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tarflow_hf.configuration_tarflow import TarFlowConfig, height_and_width
from tarflow_hf.hub.autoencoders import load_autoencoder
from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.latent_data import StoredLatents, encode_images, fingerprint
from tarflow_hf.images.latents import Autoencoder, image_channels, latent_channels, spatial_factor
from tarflow_hf.images.sources import ImageData
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.waiting import wait_for_all


@dataclass(frozen=True)
class LatentSpace:
    """The autoencoder of a run and the data encoded by it.

    Args:
        vae: The autoencoder, on the device of this process.
        train: The latents to train on.
        held_out: Those of the held-out images, if there are any.
        fingerprint: Of the autoencoder; part of what a checkpoint must agree on.

    Example:
        See [`encode_run_data`], which makes it.

        >>> sorted(LatentSpace.__dataclass_fields__)
        ['fingerprint', 'held_out', 'train', 'vae']
    """

    vae: Autoencoder
    train: StoredLatents
    held_out: StoredLatents | None
    fingerprint: str


def latent_folder(arguments: TrainingArguments) -> Path:
    """Where a run keeps its encoded data: `latents_dir`, or `latents/` in its own folder.

    Example:
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> latent_folder(make_arguments({"data": "huggan/AFHQ", "max_steps": 9, "vae": "./vae", "output_dir": "run"}))
        PosixPath('run/latents')
    """
    return Path(arguments.data.latents_dir or Path(arguments.output.output_dir) / "latents")


def flow_config(
    arguments: TrainingArguments,
    class_names: Sequence[str],
    vae: Autoencoder | None,
    **condition: Any,  # noqa: ANN401  # as the data have it
) -> TarFlowConfig:
    """The flow's configuration: of the images themselves, or of the autoencoder's grid of latents.

    Args:
        arguments: The options of the run; image_size and num_channels are those of the images in either case,
            patch_size is in latents where there is an autoencoder.
        class_names: Names of the classes.
        vae: The autoencoder, or None.
        **condition: What the configuration says of a condition.

    Raises:
        ValueError: If the autoencoder has another number of image channels, or a patch does not fit its grid.

    Example:
        >>> from diffusers import AutoencoderTiny
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> arguments = make_arguments({"data": "a", "max_steps": 9, "image_size": 28, "vae": "./vae"})
        >>> config = flow_config(arguments, [], AutoencoderTiny())  # 8 pixels for a latent, 4 channels
        >>> config.image_size, config.num_channels, config.num_tokens
        (4, 4, 4)
    """
    shape = arguments.model
    if vae is not None:
        if image_channels(vae) != shape.num_channels:
            raise ValueError(f"num_channels={shape.num_channels} must be the vae's in_channels, {image_channels(vae)}")
        cell = spatial_factor(vae) * shape.patch_size  # pixels of a patch: images are padded up to the next one
        height, width = (-(-side // cell) * shape.patch_size for side in height_and_width(shape.image_size))
        shape = replace(shape, image_size=(height, width), num_channels=latent_channels(vae))
    return shape.to_config(class_names, arguments.data.resize, **condition)


def encode_run_data(
    arguments: TrainingArguments, accelerator: Accelerator, train: ImageData, held_out: ImageData | None
) -> LatentSpace | None:
    """Encodes what is not encoded yet of a run's data, and opens it; None for a run on pixels. All processes call it.

    Args:
        arguments: The options of the run.
        accelerator: The processes, which share the work.
        train: The images to train on.
        held_out: The held-out images, if there are any.

    Raises:
        LatentDataError: If the folder holds latents of something else.

    Example:
        >>> from accelerate import Accelerator
        >>> from diffusers import AutoencoderTiny
        >>> from tarflow_hf.images.sources import load_image_data
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> AutoencoderTiny(in_channels=1, out_channels=1).save_pretrained("vae")
        >>> shape = {"image_size": 8, "num_channels": 1, "max_steps": 9, "vae": "./vae"}
        >>> arguments = make_arguments({"data": "./examples/data/digits", **shape})
        >>> train, held_out = load_image_data(arguments.data, class_conditional=True)
        >>> space = encode_run_data(arguments, Accelerator(cpu=True), train, held_out)
        >>> len(space.train), space.held_out is None
        (1500, True)
    """
    if arguments.data.vae is None:
        return None
    if train.condition:
        raise ValueError("vae and condition_columns cannot be combined: flows of latents take labels alone")
    vae = load_autoencoder(arguments.data.vae).to(accelerator.device)
    if accelerator.is_main_process:  # so that the folder of the run has all that its pipeline needs
        vae.save_pretrained(Path(arguments.output.output_dir) / "vae")
    folder = latent_folder(arguments)
    splits = [(arguments.data.train_split, train, arguments.data.horizontal_flip)]
    splits += [(f"held-out-{arguments.data.eval_split}", held_out, False)] if held_out is not None else []
    stored = [
        encode_together(
            vae,
            StoredImages(data, arguments.image_format, skip_bad_images=arguments.data.skip_bad_images),
            folder,
            split,
            accelerator,
            mirrored=mirrored,
            multiple=arguments.model.patch_size,
        )
        for split, data, mirrored in splits
    ]
    return LatentSpace(vae, stored[0], stored[1] if len(stored) > 1 else None, fingerprint(vae))


def encode_together(
    vae: Autoencoder,
    images: StoredImages,
    folder: Path,
    split: str,
    accelerator: Accelerator,
    *,
    mirrored: bool,
    multiple: int,
) -> StoredLatents:
    """Encodes what is not encoded yet of some images, each process its share, and opens it. All processes call it.

    Args:
        vae: The autoencoder, on the device of this process.
        images: The images.
        folder: Where the latents are kept.
        split: What the images are called there.
        accelerator: The processes.
        mirrored: Whether mirrored images are encoded too.
        multiple: What the sides of the grid of latents are multiples of: the flow's patch size.

    Raises:
        LatentDataError: If the folder holds latents of something else.

    Example:
        See [`encode_run_data`], which calls it for each split.

        >>> encode_together.__doc__.split(",")[0]
        'Encodes what is not encoded yet of some images'
    """
    shares = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    encode_images(vae, images, folder, split, mirrored=mirrored, multiple=multiple, **shares)
    wait_for_all(accelerator)
    return StoredLatents(folder, split)


__all__ = ["LatentSpace", "encode_run_data", "encode_together", "flow_config", "latent_folder"]

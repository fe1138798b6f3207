"""Encodes the data of a recipe with `vae` once, and says how the latents are spread.

    accelerate launch examples/encode.py examples/recipes/latents/fashion.yaml
    accelerate launch examples/encode.py recipe.yaml --latents_dir /data/latents

Training does it by itself; this is for a machine that waits to train, or to look first: a flow diverges on latents
that hardly vary. Complete shards are kept, so the same command goes on where it was stopped; latents of another
autoencoder or other images are refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tarflow_hf.images.latent_data import StoredLatents
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.latents import encode_run_data, latent_folder
from tarflow_hf.training.launchers import first_on_each_machine, make_accelerator
from tarflow_hf.training.recipes import parse_arguments

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "latents" / "fashion.yaml"


def main(argv: Sequence[str]) -> None:
    """Encodes as the command line says, in every process that a launcher started."""
    arguments = parse_arguments(argv, default_recipe=DEFAULT_RECIPE)
    if arguments.data.vae is None:
        raise ValueError("vae must name an autoencoder, whose latents are wanted; the recipe has none")
    accelerator = make_accelerator(arguments.optimization, trackers=(), folder=latent_folder(arguments))
    with first_on_each_machine(accelerator):
        images = load_image_data(
            arguments.data,
            class_conditional=arguments.model.class_conditional,
            eval_images=arguments.output.eval_images,
        )
    space = encode_run_data(arguments, accelerator, *images)
    if space is not None and accelerator.is_main_process:
        print(f"{latent_folder(arguments)}: {len(space.train)} images; training by the same recipe finds them")
        for split in (space.train, space.held_out):
            if split is not None:
                print(spread(split))
    accelerator.end_training()


def spread(latents: StoredLatents) -> str:
    """The shape of a split's latents, and their standard deviation: of all, and of the number that varies least."""
    values = torch.cat([shard["mean"][:, 0] for shard in latents.shards])
    shape = "x".join(map(str, values.shape[1:]))
    return f"{latents.num_images} latents of {shape}: std {values.std():.3f}, least {values.std(dim=0).min():.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])

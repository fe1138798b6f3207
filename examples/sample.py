"""Samples images from a saved TarFlow pipeline and writes them as one PNG, a row for each class.

    python examples/sample.py runs/digits                               # every class, into runs/digits/samples.png
    python examples/sample.py user/model --class_labels tabby lynx --guidance_scale 3 --output cats.png
    python examples/sample.py runs/digits --trace trace.png             # and how noise turns into an image

The trace shows the first image of each row as noise, after each block, and before and after denoising.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tarflow_hf.flow.choices import Decoder

if TYPE_CHECKING:
    import torch

    from tarflow_hf import TarFlowConfig, TarFlowPipeline

MAX_ROWS = 20


def main(argv: Sequence[str]) -> None:
    """Loads the pipeline, samples and writes the grid."""
    arguments = parse_arguments(argv)
    sample(arguments)


def sample(arguments: argparse.Namespace) -> None:
    """Does what the command line says."""
    import numpy as np  # these here, so that --help need not wait for them
    import torch

    from tarflow_hf.flow.inputs import class_of_text
    from tarflow_hf.hub.bars import no_bars_off_a_terminal
    from tarflow_hf.images.arrays import SHOWN_DEVIATIONS, to_data_units
    from tarflow_hf.images.plotting import save_image_grid, save_trace
    from tarflow_hf.training.export import load_pipeline

    no_bars_off_a_terminal()
    if (columns := arguments.num_images_per_label) < 1:
        raise ValueError(f"num_images_per_label must be at least 1, got {columns}")
    pipe = load_pipeline(arguments.model, dtype=getattr(torch, arguments.dtype))
    pipe.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.set_progress_bar_config(disable=None)  # to tqdm: a bar on a terminal only
    labels = arguments.class_labels or shown_classes(pipe.transformer.config)
    # A generator per image: a sample keeps its looks when classes are added or left out.
    count = (len(labels) if labels else MAX_ROWS) * columns
    first, generators = (
        [torch.Generator().manual_seed(arguments.seed + index) for index in range(count)] for _ in range(2)
    )
    temperature = pipe.config.temperature if arguments.temperature is None else arguments.temperature
    latents = pipe.prepare_latents(count, first, temperature=temperature)  # as the call will draw them
    states = [pipe.state_images(latents[::columns])]

    def record(pipe: "TarFlowPipeline", step: int, block: int, tensors: "dict[str, torch.Tensor]") -> None:
        states.append(pipe.state_images(tensors["latents"][::columns]))

    config = pipe.transformer.config
    (images,) = pipe(
        [class_of_text(label, config) for label in labels] if labels and config.num_classes else labels,
        num_images_per_label=columns if labels else count,
        guidance_scale=arguments.guidance_scale,
        attention_temperature=arguments.attention_temperature,
        denoising_strength=arguments.denoising_strength,
        decoder=arguments.decoder,
        generator=generators,
        temperature=temperature,
        callback_on_step_end=record if arguments.trace else None,
        output_type="latent",
        return_dict=False,
    )
    images = torch.as_tensor(images)  # a tensor for this output type
    path = arguments.output or default_output(arguments.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_grid(pipe.pictures(images), path, columns=columns, row_labels=labels)
    print(f"{len(images)} images -> {path}")
    if pipe.transformer.config.value_scale is not None:
        np.save(path.with_suffix(".npy"), to_data_units(images, pipe.transformer.config).cpu().numpy())
        print(f"the arrays in the units of the data, (number, channels, height, width) -> {path.with_suffix('.npy')}")
    if arguments.trace:
        arguments.trace.parent.mkdir(parents=True, exist_ok=True)
        config = pipe.transformer.config
        save_trace(
            states,
            arguments.trace,
            num_blocks=config.num_blocks,
            row_labels=labels,
            noise_type=pipe.noise_type,
            unit=1.0 if config.value_scale is None else SHOWN_DEVIATIONS,
        )
        print(f"the first image of each row, from noise on -> {arguments.trace}")


def shown_classes(config: "TarFlowConfig") -> list[str] | None:
    """All classes, or `MAX_ROWS` spread over them; None for a model without."""
    from tarflow_hf.flow.class_names import class_names

    names = class_names(config)
    return names[:: -(-len(names) // MAX_ROWS) or 1] or None


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what is left out falls back to the defaults saved with the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", help="folder of a pipeline, a run or a checkpoint, or a name on the Hub")
    parser.add_argument(
        "--class_labels", nargs="+", help=f"names or ids; default: all, or {MAX_ROWS} spread over them"
    )
    parser.add_argument("--num_images_per_label", type=int, default=10, help="images in a row")
    parser.add_argument("--guidance_scale", type=float, help="at least 1; 1 is none, 1 + the paper's w")
    parser.add_argument("--attention_temperature", type=float, help="of the unlabelled branch: guides without labels")
    parser.add_argument("--denoising_strength", type=float, help="0 is off, 1 is Tweedie's formula")
    parser.add_argument("--temperature", type=float, help="standard deviation of the latents; 1 is the model's own")
    parser.add_argument("--decoder", choices=get_args(Decoder), default="exact", help="with a learned inverse [exact]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the others count up from it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--trace", type=Path, help="PNG file: the first image of each row, from noise to image")
    parser.add_argument("--output", type=Path, help="PNG file; default: samples.png in the folder of the pipeline")
    arguments = parser.parse_args(argv)
    if arguments.trace and arguments.decoder == "one_pass":
        parser.error("--trace shows the blocks on the way, which --decoder one_pass does not take")
    return arguments


def default_output(model: str) -> Path:
    """samples.png in the pipeline's folder, or here if it came from the Hub."""
    return Path(model, "samples.png") if Path(model).is_dir() else Path("samples.png")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What narrower numbers cost a trained model: bits per dimension, round trip and images beside those of float32.

    python examples/precision.py runs/digits --data examples/data/digits
    python examples/precision.py runs/digits --data examples/data/digits --numbers bfloat16 int8 nf4

`int8`, `int8_dynamic` and `int4` are torchao's, `bnb_int8`, `nf4` and `fp4` bitsandbytes'
(`pip install "tarflow_hf[quant]"`). Quantised models are loaded through `quantization_config`, saved, loaded again and
then measured. The bits are those of images with uniform dequantisation noise; the samples are decoded from the same
latents one token at a time, without guidance and denoising. Prints a table and writes MODEL/evaluation/precision.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tarflow_hf import TarFlowModel, TarFlowPipeline, bits_per_dim
from tarflow_hf.images.extras import installed_by
from tarflow_hf.images.labels import renumber
from tarflow_hf.images.processing import to_levels
from tarflow_hf.metrics.command_line import add_model_and_data, check_pictures, load_images, open_workplace
from tarflow_hf.metrics.likelihood import dequantized_images, log_prob_draws
from tarflow_hf.training.export import load_pipeline

BATCH = 64
PLAIN = {
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TORCHAO = ("int8", "int8_dynamic", "int4")
BITSANDBYTES = ("bnb_int8", "nf4", "fp4")
NAMES = (*PLAIN, *TORCHAO, *BITSANDBYTES)


@dataclass(frozen=True)
class Measured:
    """What a model makes of images and latents.

    Args:
        bits: (images,) bits per dimension.
        round_trip: rms of decode(encode(x)) - x, with x in [-1, 1].
        samples: (samples, channels, height, width).
        megabytes: Of its weights as they are saved.
    """

    bits: torch.Tensor
    round_trip: float
    samples: torch.Tensor
    megabytes: float


def main(argv: Sequence[str]) -> None:
    """Measures the model in each kind of numbers and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_and_data(parser)
    parser.add_argument("--numbers", nargs="+", choices=NAMES, default=list(NAMES), help="rows of the table [all]")
    parser.add_argument(
        "--num_samples", type=int, help=f"samples and round trips [{BATCH}, or as many as there are images]"
    )
    options = parser.parse_args(argv)
    place = open_workplace(options, load_pipeline)
    pipe, device = place.pipe, place.pipe.device.type
    check_pictures(pipe)
    if options.dtype != "float32":
        parser.error(f"--dtype must be left out: the table is of all types, got {options.dtype}")
    if pipe.vae is not None:
        parser.error(f"{options.model} models latents of an autoencoder; the table is of pixels")
    images, numbering = load_images(options, place)
    count = min(BATCH, images.num_images) if options.num_samples is None else options.num_samples
    if not 1 <= count <= images.num_images:
        parser.error(f"--num_samples must be from 1 to the {images.num_images} images, got {count}")
    read = images.read(range(images.num_images))
    noisy = dequantized_images(read.levels, list(range(images.num_images)), 1, options.seed)[0].to(device)
    labels = None if numbering is None else renumber(read.class_labels, numbering).to(device)
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(options.seed)
    shape = (count, config.num_tokens, config.patch_dim)
    latents = torch.randn(shape, generator=generator).to(device)
    exact, report = measure(pipe, "float32", noisy, labels, latents), {}
    print(
        "| numbers | weights, MB | bits/dim | mean change | largest | round trip rms | samples rms | levels changed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.numbers:
        report[name] = row = compare(exact, measure(pipe, name, noisy, labels, latents))
        print(
            f"| {name} | {row['megabytes']:.2f} | {row['bits_per_dim']:.4f} | {row['mean_change']:+.5f} | "
            f"{row['largest_change']:.4f} | {row['round_trip']:.1e} | {row['samples_rms']:.1e} | "
            f"{row['levels_changed']:.2%} |",
            flush=True,
        )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "precision.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    place.finish()


def compare(exact: Measured, found: Measured) -> dict[str, float]:
    """A row of the table: `found` beside `exact`, which is float32."""
    change, moved = found.bits - exact.bits, found.samples - exact.samples
    return {
        "megabytes": found.megabytes,
        "bits_per_dim": found.bits.mean().item(),
        "mean_change": change.mean().item(),
        "largest_change": change.abs().max().item(),
        "round_trip": found.round_trip,
        "samples_rms": moved.square().mean().sqrt().item(),
        "levels_changed": (to_levels(found.samples) != to_levels(exact.samples)).float().mean().item(),
    }


def quantization_config(name: str) -> Any:  # noqa: ANN401  # of a library that may not be there
    """What `from_pretrained` is told for one of the quantised rows."""
    if name in TORCHAO:
        with installed_by("quant"):
            from torchao import quantization
        from transformers import TorchAoConfig

        four_bits: torch.dtype = vars(torch)["int4"]  # which the types of torch do not know
        kinds: dict[str, Callable[[], Any]] = {
            "int8": quantization.Int8WeightOnlyConfig,
            "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
            "int4": lambda: quantization.IntxWeightOnlyConfig(four_bits, quantization.PerGroup(32)),
        }
        return TorchAoConfig(kinds[name]())
    with installed_by("quant"):
        import bitsandbytes  # noqa: F401  # its absence is to name the extra
    from transformers import BitsAndBytesConfig

    if name == "bnb_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=torch.float32)


def narrowed(pipe: TarFlowPipeline, name: str, folder: Path) -> TarFlowModel:
    """The model of a pipeline in other numbers, after it has been saved and loaded again.

    Args:
        pipe: The pipeline.
        name: The row.
        folder: An empty one; `narrow` in it gets the pipeline that is measured.
    """
    pipe.save_pretrained(folder / "exact")
    device = pipe.device.type
    source, narrow = folder / "exact/transformer", folder / "narrow"
    if name in PLAIN:
        model = TarFlowModel.from_pretrained(source, dtype=PLAIN[name])
    else:
        model = TarFlowModel.from_pretrained(
            source, quantization_config=quantization_config(name), dtype=torch.float32, device_map=device
        )
    TarFlowPipeline(model).save_pretrained(narrow)
    if name in PLAIN:
        return TarFlowPipeline.from_pretrained(narrow, dtype=PLAIN[name]).to(device).transformer
    return TarFlowPipeline.from_pretrained(narrow, device_map=device).transformer


@torch.no_grad()
def measure(
    pipe: TarFlowPipeline, name: str, images: torch.Tensor, labels: torch.Tensor | None, latents: torch.Tensor
) -> Measured:
    """A row of the table before it is compared.

    Args:
        pipe: The pipeline, in float32.
        name: The row.
        images: (images, channels, height, width) with dequantisation noise.
        labels: (images,) class ids or None.
        latents: (samples, tokens, patch_dim) to decode, with the labels of as many images, which make the round trip.
    """
    on, device = name == "autocast", pipe.device.type
    numbers: AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16) if on else nullcontext()
    with tempfile.TemporaryDirectory() as folder, numbers:
        model = narrowed(pipe, name, Path(folder))
        files = Path(folder, "narrow/transformer").glob("*.safetensors")
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        own = [None] * len(images.split(BATCH)) if labels is None else labels.split(BATCH)
        parts = [log_prob_draws(model, part[None], y) for part, y in zip(images.split(BATCH), own, strict=True)]
        bits = bits_per_dim(torch.cat([torch.from_numpy(part) for part in parts])[:, 0], model.config.num_dims)
        some = images[: len(latents)], None if labels is None else labels[: len(latents)]
        level = model.lowest_noise_level(some[0])
        back = model.decode(model(*some, level).latents, some[1], noise_level=level, window=1)
        samples = model.decode(latents, some[1], noise_level=level, window=1)
    return Measured(bits, (back - some[0]).square().mean().sqrt().item(), samples, megabytes)


if __name__ == "__main__":
    main(sys.argv[1:])

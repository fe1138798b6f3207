"""Times sampling and training side by side in one process, this library and if asked the authors' code; or the input.

python examples/benchmark.py sampling --size digits
python examples/benchmark.py sampling --model runs/fashion_mnist --batch_size 1 --reference path/to/ml-tarflow
python examples/benchmark.py training --size imagenet64 --dtype bfloat16
python examples/benchmark.py input recipe.yaml [--num_workers 8] [--metrics runs/mine/metrics.jsonl]

Each round runs each contender once, sampling from latents of its own; the table has medians and spreads of the rounds.
`--reference` is your own clone of the authors' repository; it gets the same weights, latents and labels.
"""

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from tarflow_hf import Guidance, TarFlowConfig, TarFlowModel, TarFlowPipeline
from tarflow_hf.conversion.checkpoint import reference_state_dict
from tarflow_hf.flow.products import linear
from tarflow_hf.training.peak_memory import PeakMemory

SIZES: dict[str, dict[str, Any]] = {
    "digits": {"image_size": 8, "num_channels": 1, "patch_size": 2, "hidden_size": 64, "num_blocks": 4,
               "layers_per_block": 2, "num_classes": 10},
    "fashion": {"image_size": 28, "num_channels": 1, "patch_size": 4, "hidden_size": 64, "num_blocks": 4,
                "layers_per_block": 2, "num_classes": 10},
    "random32": {"image_size": 32, "num_channels": 3, "patch_size": 2, "hidden_size": 256, "num_blocks": 4,
                 "layers_per_block": 4, "num_classes": 10},
    "afhq256": {"image_size": 256, "patch_size": 8, "hidden_size": 768, "num_classes": 3},
    "imagenet64": {"image_size": 64, "patch_size": 2, "hidden_size": 768, "num_classes": 1000},
    "imagenet128": {"image_size": 128, "patch_size": 4, "hidden_size": 1024, "num_classes": 1000},
}  # fmt: skip


@dataclass
class Contender:
    """Something to time, given the number of the round, and what came of it."""

    name: str
    run: Callable[[int], torch.Tensor]
    seconds: list[float] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    peak_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark that the command line names."""
    if argv[:1] == ["input"]:
        speed = importlib.import_module("tarflow_hf.training.input_speed").input_speed_of  # needs an extra
        return print(speed(argv[1:], default_recipe=Path(__file__).parent / "recipes" / "digits.yaml"))
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    torch.manual_seed(0)
    pipe = load_pipeline(options).to(options.device)
    model = pipe.transformer
    reference = load_reference(options.reference, model) if options.reference else None
    contenders = (sampling if options.mode == "sampling" else training)(options, model, reference)
    measure(contenders, options)
    if options.mode == "sampling":
        compare_images(contenders, options, pipe)
    report = {
        "machine": machine(options.device),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "work": arithmetic(options, model),
        "results": [summary(contender, contenders[0], options) for contender in contenders],
    }
    print_report(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of sampling and training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["sampling", "training", "input"], help="input --help: its options")
    parser.add_argument("--size", choices=list(SIZES), default="digits", help="size of a model with random weights")
    parser.add_argument("--model", help="folder of a trained pipeline, in place of --size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in float32 matrix products")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="1 + the paper's w; 1 is no guidance")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--window", type=int, help="window of the windowed contender; default: chosen by the solver")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--compile", action="store_true", help="compile: time compiled decoding too, or train so")
    parser.add_argument("--reference", type=Path, help="your clone of the authors' ml-tarflow")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    for name in ("batch_size", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def load_pipeline(options: argparse.Namespace) -> TarFlowPipeline:
    """The trained pipeline asked for, or one with small random weights, float32. Its transformer alone is timed."""
    if options.model:
        return TarFlowPipeline.from_pretrained(options.model, dtype=torch.float32)
    return TarFlowPipeline(with_small_weights(TarFlowModel(TarFlowConfig(**SIZES[options.size])).eval()))


@torch.no_grad()
def with_small_weights(model: TarFlowModel) -> TarFlowModel:
    """The model with random predictions that are small, as those of trained models."""
    for name, parameter in model.named_parameters():
        if "proj_out" in name:
            parameter.normal_(std=0.012)
    return model


def load_reference(folder: Path, model: TarFlowModel) -> nn.Module:
    """The authors' model from the user's clone of their repository, with the weights of ours."""
    file = folder / "transformer_flow.py"
    if not file.is_file():
        raise SystemExit(f"--reference {folder}: no transformer_flow.py there; it must be a clone of ml-tarflow")
    spec = importlib.util.spec_from_file_location("transformer_flow", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--reference: {file} cannot be imported")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = model.config
    reference = module.Model(
        in_channels=config.num_channels, img_size=config.image_size, patch_size=config.patch_size,
        channels=config.hidden_size, num_blocks=config.num_blocks, layers_per_block=config.block_depths[0],
        nvp=not config.volume_preserving, num_classes=config.num_classes,
    )  # fmt: skip
    reference.load_state_dict({key: value.cpu() for key, value in reference_state_dict(model).items()})
    return reference.to(next(model.parameters()).device).eval()


def autocast(options: argparse.Namespace) -> torch.autocast:
    """Mixed precision in the dtype asked for, as the authors' code runs."""
    dtype, on = getattr(torch, options.dtype), options.dtype != "float32"
    return torch.autocast(torch.device(options.device).type, dtype=dtype, enabled=on)


def sampling(options: argparse.Namespace, model: TarFlowModel, reference: nn.Module | None) -> list[Contender]:
    """Sequential and windowed decoding, and the authors' loop."""
    config = model.config
    labels = batch_labels(options, config)
    guidance = Guidance(options.guidance_scale)
    ours = TarFlowModel(config).to(options.device).eval()
    ours.load_state_dict(model.state_dict())
    ours.to(getattr(torch, options.dtype))

    def contender(name: str, window: int | None, ours: TarFlowModel = ours) -> Contender:
        sweeps_seen: list[list[int]] = []

        def decode(number: int) -> torch.Tensor:
            latents, how = round_latents(number, options, config), {"window": window, "tolerance": options.tolerance}
            steps = list(ours.decode_blocks(latents, labels, guidance=guidance, **how))
            sweeps_seen.append([sweeps for _, sweeps in steps])
            return ours.unpatchify(steps[-1][0])

        return Contender(name, decode, notes={"sweeps_per_block": sweeps_seen})

    contenders = [contender("sequential", 1), contender("windowed", options.window)]
    if options.compile:
        (fast := copy.deepcopy(ours)).compile_decoding(options={"cpp_wrapper": options.device == "cpu"})
        contenders += [contender("sequential compiled", 1, fast), contender("windowed compiled", options.window, fast)]
    if reference is not None:
        reverse = cast(Callable[..., torch.Tensor], reference.reverse)

        def authors(number: int) -> torch.Tensor:
            with torch.no_grad(), autocast(options):
                weight = options.guidance_scale - 1
                latents = round_latents(number, options, config)
                images = reverse(latents, labels, guidance=weight, annealed_guidance=True)
            return images.float()

        contenders.insert(0, Contender("authors", authors))
    return contenders


def batch_labels(options: argparse.Namespace, config: TarFlowConfig) -> torch.Tensor | None:
    """The classes in turn; None for a model without."""
    return torch.arange(options.batch_size, device=options.device) % config.num_classes if config.num_classes else None


def round_latents(number: int, options: argparse.Namespace, config: TarFlowConfig) -> torch.Tensor:
    """The latents of a round, the same for every contender."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(options.batch_size, config.num_tokens, config.patch_dim, generator=generator).to(options.device)


def training(options: argparse.Namespace, model: TarFlowModel, reference: nn.Module | None) -> list[Contender]:
    """A training step (noise, forward, backward, AdamW) of this library and of the authors."""
    config = model.config
    shape = (options.batch_size, config.num_channels, config.image_height, config.image_width)
    images = torch.rand(shape, device=options.device) * 2 - 1
    labels = batch_labels(options, config)

    def step(network: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], *, fused: bool) -> Contender:
        network.train()
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=1e-4, fused=fused or None
        )

        def run(number: int) -> torch.Tensor:
            noisy = images + config.noise_std * torch.randn_like(images)
            with autocast(options):
                loss = loss_of(noisy)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Contender("", run)

    call: Callable[..., Any] = torch.compile(model) if options.compile else model
    ours = step(model, lambda noisy: call(noisy, labels).loss, fused=True)
    ours.name = "tarflow_hf compiled" if options.compile else "tarflow_hf"
    if reference is None:
        return [ours]
    network, loss_of = reference, cast(Callable[..., torch.Tensor], reference.get_loss)

    def authors_loss(noisy: torch.Tensor) -> torch.Tensor:
        latents, _, log_dets = network(noisy, labels)
        return loss_of(latents, log_dets)

    theirs = step(network, authors_loss, fused=False)
    theirs.name = "authors"
    return [theirs, ours]


def measure(contenders: Sequence[Contender], options: argparse.Namespace, *, peaks: bool = True) -> None:
    """Runs all once (compiled ones for all rounds' widths), then in turn, then, if asked, for peak memory."""
    cuda = torch.device(options.device).type == "cuda"
    for contender in contenders:
        start = time.perf_counter()
        for number in range(options.rounds if contender.name.endswith("compiled") else 1):
            contender.run(number)  # other latents may ask for other widths
        contender.notes["first_seconds"] = time.perf_counter() - start
        contender.notes.get("sweeps_per_block", []).clear()
    for number in range(options.rounds):
        for contender in contenders:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = contender.run(number)
            if cuda:
                torch.cuda.synchronize()
            contender.seconds.append(time.perf_counter() - start)
            contender.results.append(result)
    for contender in contenders if peaks else ():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            contender.run(0)
            contender.peak_bytes = torch.cuda.max_memory_allocated()
        elif not contender.name.endswith("compiled"):
            with PeakMemory() as memory:
                contender.run(0)
            contender.peak_bytes = memory.peak


@torch.no_grad()
def compare_images(contenders: Sequence[Contender], options: argparse.Namespace, pipe: TarFlowPipeline) -> None:
    """Notes how far each contender's images are from float32 sequential decoding, and how many 8-bit levels agree.

    Of a pipeline with an autoencoder it is the decoded images that are compared.
    """
    model = pipe.transformer
    labels, guidance = batch_labels(options, model.config), Guidance(options.guidance_scale)
    latents = (round_latents(number, options, model.config) for number in range(options.rounds))
    samples = [model.decode(each, labels, guidance=guidance, window=1) for each in latents]
    expected = torch.cat([pipe.decoded(each) for each in samples])
    for contender in contenders:
        images = torch.cat([pipe.decoded(result) for result in contender.results])
        error = (images - expected).abs()
        levels, right = (((x.clamp(-1, 1) + 1) * 127.5).round() for x in (images, expected))
        contender.notes |= {
            "rms_error": error.square().mean().sqrt().item(),
            "max_error": error.max().item(),
            "identical_levels": (levels == right).float().mean().item(),
            "max_level_difference": int((levels - right).abs().max().item()),
        }
        if sweeps := contender.notes.get("sweeps_per_block"):
            contender.notes["sweeps_per_block"] = [
                round(statistics.fmean(block), 1) for block in zip(*sweeps, strict=True)
            ]


def arithmetic(options: argparse.Namespace, model: TarFlowModel) -> dict[str, float]:
    """What the call must do at the least, and what this machine can do.

    Sequential sampling reads the weights once a token, and does 2 floating-point operations a weight, token and row of
    the batch; a training step does 6 a weight and token. Attention is left out.
    """
    config = model.config
    weights = sum(
        parameter.numel() for block in model.blocks for parameter in block.parameters() if parameter.ndim > 1
    )
    weights -= config.num_blocks * (config.num_tokens + config.num_classes) * config.hidden_size
    rows = options.batch_size * (2 if options.mode == "sampling" and options.guidance_scale > 1 else 1)
    dtype = getattr(torch, options.dtype)
    reads, times = (config.num_tokens - 1, 2) if options.mode == "sampling" else (3, 6)
    operations = times * weights * config.num_tokens * rows
    rate, bandwidth = machine_rates(options.device, dtype)
    return {
        "bytes": float(reads * weights * dtype.itemsize),
        "flop": float(operations),
        "machine_flop_per_second": rate,
        "machine_bytes_per_second": bandwidth,
    }


def machine_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measured operations per second of a large matrix product, and bytes per second read by a large sum."""
    side = 8192 if torch.device(device).type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)
    vector = torch.randn(2**28 if side > 1024 else 2**26, device=device)
    product = best_time(lambda: linear(matrix, matrix, None), device)
    return 2 * side**3 / product, vector.nbytes / best_time(vector.sum, device)


def best_time(function: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of ten calls."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(device: str) -> dict[str, str | int]:
    """What the numbers were measured on."""
    on_cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def summary(contender: Contender, first: Contender, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: median, spread, and the ratio to the first contender, round by round."""
    ratios = [theirs / own for theirs, own in zip(first.seconds, contender.seconds, strict=True)]
    median = statistics.median(contender.seconds)
    return {
        "name": contender.name,
        "seconds": median,
        "seconds_min": min(contender.seconds),
        "seconds_max": max(contender.seconds),
        "images_per_second": options.batch_size / median,
        "times_faster": statistics.median(ratios),
        "peak_bytes": contender.peak_bytes,
        **contender.notes,
    }


def print_report(report: dict[str, Any]) -> None:
    """The table on the terminal."""
    print(json.dumps(report["machine"]))
    print(f"{'':20} {'seconds':>9} {'min':>8} {'max':>8} {'images/s':>9} {'faster':>7} {'peak MB':>8}")
    work = report["work"]
    for row in report["results"]:
        print(
            f"{row['name']:20} {row['seconds']:9.4f} {row['seconds_min']:8.4f} {row['seconds_max']:8.4f} "
            f"{row['images_per_second']:9.2f} {row['times_faster']:6.2f}x {row['peak_bytes'] / 2**20:8.1f}"
        )
        row["share_of_matrix_rate"] = work["flop"] / row["seconds"] / work["machine_flop_per_second"]
        row["share_of_bandwidth"] = work["bytes"] / row["seconds"] / work["machine_bytes_per_second"]
    for row in report["results"]:
        if "rms_error" in row:
            print(
                f"{row['name']:20} rms error {row['rms_error']:.1e}, max {row['max_error']:.1e}; 8-bit levels: "
                f"{row['identical_levels']:.2%} identical, largest difference {row['max_level_difference']}; "
                f"sweeps {row.get('sweeps_per_block', '-')}"
            )
    print(
        f"least work: {work['flop']:.2e} operations, {work['bytes']:.2e} bytes; this machine: "
        f"{work['machine_flop_per_second']:.2e} operations/s, {work['machine_bytes_per_second']:.2e} bytes/s"
    )
    for row in report["results"]:
        print(
            f"{row['name']:20} {row['share_of_matrix_rate']:.1%} of the matrix rate, "
            f"{row['share_of_bandwidth']:.1%} of the bandwidth, counting that work"
        )


if __name__ == "__main__":
    main(sys.argv[1:])

"""Random weights in the key layout of the TarFlow authors' checkpoints.

As a program it tries the conversion at the size of their AFHQ model (463M parameters, 1.9 GB; about 6 GB of disk for
a moment), which is too much for the test suite:

    python tests/reference_layout.py
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def reference_state(*, image_size, patch_size, width, blocks, layers, num_channels=3, num_classes=0, seed=0):
    """A state dict as the authors' code writes it, the output projections small enough for a stable flow."""
    generator = torch.Generator().manual_seed(seed)
    tokens, size = (image_size // patch_size) ** 2, num_channels * patch_size**2

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    def linear(name, rows, columns, std=None):
        std = columns**-0.5 if std is None else std
        return {f"{name}.weight": normal(rows, columns, std=std), f"{name}.bias": normal(rows, std=std)}

    def norm(name):
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    state = {"var": torch.ones(tokens, size)}
    for block in range(blocks):
        prefix = f"blocks.{block}"
        state |= linear(f"{prefix}.proj_in", width, size)
        state[f"{prefix}.pos_embed"] = normal(tokens, width, std=0.01)
        if num_classes:
            state[f"{prefix}.class_embed"] = normal(num_classes, 1, width, std=0.01)
        state[f"{prefix}.attn_mask"] = torch.tril(torch.ones(tokens, tokens))
        for layer in range(layers):
            inner = f"{prefix}.attn_blocks.{layer}"
            state |= norm(f"{inner}.attention.norm") | norm(f"{inner}.mlp.norm")
            state |= linear(f"{inner}.attention.qkv", 3 * width, width) | linear(
                f"{inner}.attention.proj", width, width
            )
            state |= linear(f"{inner}.mlp.main.0", 4 * width, width) | linear(f"{inner}.mlp.main.2", width, 4 * width)
        state |= linear(f"{prefix}.proj_out", 2 * size, width, std=1e-3)
    return state


def timed(*command):
    """Seconds that a command takes, and its largest resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


WRITE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from reference_layout import reference_state
torch.save(reference_state(image_size=256, patch_size=8, width=768, blocks=8, layers=8, num_classes=3), sys.argv[1])
"""
SAMPLE = """
import sys
from tarflow_hf import TarFlowPipeline
pipe = TarFlowPipeline.from_pretrained(sys.argv[1])
image = pipe("dog", denoising_strength=0.0).images[0]
print(f"{pipe.transformer.num_parameters():,} parameters, one image of {image.size}, {image.getextrema()}")
"""


def main():
    with tempfile.TemporaryDirectory(dir=".") as parent:
        path, folder = Path(parent, "afhq_model_8_768_8_8_0.07.pth"), Path(parent, "afhq")
        timed("-c", WRITE, str(path), str(Path(__file__).parent))
        size = path.stat().st_size
        _, idle = timed("-c", "import tarflow_hf.conversion.checkpoint")
        for options in [[], ["--variant", "fp16", "bf16"]]:
            command = [
                "-m",
                "tarflow_hf.conversion.checkpoint",
                str(path),
                str(folder),
                "--image_size",
                "256",
                *options,
            ]
            seconds, memory = timed(*command, "--dataset", "afhq")
            share = (memory - idle) / size
            print(f"checkpoint {size / 1e9:.2f} GB; converted {options} in {seconds:.0f} s; memory {share:.2f} of it")
            shutil.rmtree(folder) if not options else None
        seconds, memory = timed("-c", SAMPLE, str(folder))
        print(f"loaded and sampled in {seconds:.0f} s; memory {(memory - idle) / size:.2f} of the checkpoint")


if __name__ == "__main__":
    main()

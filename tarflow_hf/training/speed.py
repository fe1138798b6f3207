"""How fast a run is: images a second, the time left, memory, and the share of the device's peak."""

import resource
import time
from dataclasses import dataclass
from typing import Literal

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig

# Dense matrix products in 1e12 operations a second, in 16 bits and in float32, from the makers' data sheets.
# The first name that is part of the device's counts.
_PEAKS = {
    "B200": (2250.0, 75.0), "H200": (989.0, 67.0), "H100 PCIe": (756.0, 51.0), "H100": (989.0, 67.0),
    "A100": (312.0, 19.5), "L40S": (362.0, 91.6), "L4": (121.0, 30.3), "V100": (125.0, 15.7), "T4": (65.0, 8.1),
    "RTX 4090": (165.0, 82.6), "RTX 3090": (71.0, 35.6), "RTX 2080 Ti": (54.0, 13.4),
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """What is reported of a window of steps.

    Args:
        images_per_second: Over all processes, without the time of evaluations, grids and checkpoints.
        hours_left: At the pace since the start, with all of that.
        peak_memory_gb: Most memory in use so far, 1e9 bytes: of tensors on a GPU, of the process on a CPU.
        mfu: Share of the peak of all devices that the model's operations take, or None where the peak is not known.

    Example:
        >>> Speed(images_per_second=120.0, hours_left=1.5, peak_memory_gb=2.0, mfu=0.41).mfu
        0.41
    """

    images_per_second: float
    hours_left: float
    peak_memory_gb: float
    mfu: float | None


class Stopwatch:
    """Measures the speed of a run between two lines of its log.

    Args:
        batch_size: Images of a step, over all processes.
        total_steps: Planned length of the training.
        start: Steps already taken.
        most_images_per_second: What the devices can do in a second divided by what an image takes; None: not known.
        device: The device whose memory is told.

    Example:
        >>> watch = Stopwatch(batch_size=8, total_steps=100, start=0)
        >>> watch.measure(10).images_per_second > 0
        True
    """

    def __init__(
        self,
        *,
        batch_size: int,
        total_steps: int,
        start: int,
        most_images_per_second: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.first_step = self.window_step = start
        self.began = self.window_began = time.perf_counter()
        self.most_images_per_second = most_images_per_second
        self.device = device or torch.device("cpu")

    def measure(self, step: int) -> Speed:
        """The speed since the last call of this or of [`pause`]."""
        now = time.perf_counter()
        rate = (step - self.window_step) * self.batch_size / max(now - self.window_began, 1e-9)
        pace = (now - self.began) / max(step - self.first_step, 1)
        share = None if self.most_images_per_second is None else rate / self.most_images_per_second
        speed = Speed(rate, pace * (self.total_steps - step) / 3600, peak_memory(self.device) / 1e9, share)
        self.pause(step)
        return speed

    def pause(self, step: int) -> None:
        """Leaves the time since the last measurement out, after an evaluation or a checkpoint."""
        self.window_began, self.window_step = time.perf_counter(), step


def training_flops(config: TarFlowConfig) -> int:
    """Operations of matrix products and attention in a training step on one image: 6 T W + 12 T^2 C L.

    T tokens that the network sees (all but the last), W weights of the matrices, C hidden size, L layers of all
    blocks. A product and its sum count two, the way back twice as much as the way there. The attention is counted
    whole, as is the custom, and recomputed activations are not.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=1, layers_per_block=1)
        >>> training_flops(config)
        4665600
    """
    width, tokens, patch = config.hidden_size, config.num_tokens - 1, config.patch_dim
    blocks = config.layers_per_block
    layers = sum(blocks) if isinstance(blocks, list | tuple) else blocks * config.num_blocks
    of_layers = layers * (4 + 2 * config.mlp_ratio) * width**2
    of_ends = config.num_blocks * (1 + (1 if config.volume_preserving else 2)) * patch * width
    return 6 * tokens * (of_layers + of_ends) + 12 * tokens**2 * width * layers


def peak_flops(device: torch.device, precision: Literal["float32", "bfloat16", "float16"]) -> float | None:
    """Most operations of matrix products that a device can do in a second, or None where that is not known.

    Args:
        device: The device.
        precision: Of the products; float32 without the short cuts of TF32.

    Example:
        >>> peak_flops(torch.device("cpu"), "float32") is None
        True
    """
    if device.type != "cuda" or (precision == "float32" and torch.get_float32_matmul_precision() != "highest"):
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for part, peaks in _PEAKS.items() if part in name), None)
    return None if found is None else found[precision == "float32"] * 1e12


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of tensors on a GPU, of the whole process on a CPU.

    Example:
        >>> peak_memory(torch.device("cpu")) > 1e7
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


__all__ = ["Speed", "Stopwatch", "peak_flops", "peak_memory", "training_flops"]

"""A soak: 500 pipeline calls and 2,000 training steps of a tiny model, and whether memory, handles or threads grow.

`make soak` runs it. For each part it prints the slope of the process's memory over the second half, in kB a call or
step with its standard error, and the open files and threads before and after; it fails if a slope is above zero by
more than three errors and 1 kB, or if handles or threads were left behind.
"""

import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_model

from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.noise import augment


def resident_kb():
    """The memory of this process that is not swapped out, in kB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def handles():
    return len(list(Path("/proc/self/fd").iterdir()))


def slope(values):
    """Least squares over the second half: kB a call, and its standard error."""
    values = np.array(values[len(values) // 2 :])
    (rate, _), covariance = np.polyfit(np.arange(len(values)), values, 1, cov=True)
    return rate, covariance[0, 0] ** 0.5


def soak(name, act, times):
    """Whether nothing grew."""
    act(0)
    before, memory = (handles(), threading.active_count()), []
    for number in range(times):
        act(number)
        if number % 10 == 0:
            gc.collect()
        memory.append(resident_kb())
    after = handles(), threading.active_count()
    rate, error = slope(memory)
    print(
        f"{name}: {times} times, memory {memory[-1] / 1024:.0f} MB, slope {rate:+.3f} +- {error:.3f} kB each, "
        f"handles {before[0]} -> {after[0]}, threads {before[1]} -> {after[1]}",
        flush=True,
    )
    return rate < max(3 * error, 1.0) and after == before


def main():
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32), guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)

    def call(number):
        pipe([number % 4, 1], generator=torch.Generator().manual_seed(number))

    model = tiny_model(dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def step(number):
        noisy = augment(images, "gaussian", 0.1, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(noisy, torch.arange(8) % 4).loss.backward()
        optimizer.step()

    results = [soak("pipeline calls", call, 500), soak("training steps", step, 2000)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

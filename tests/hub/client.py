"""What the clients share: a tiny pipeline, its samples as a digest, and the outcome of a call as plain data."""

import hashlib
from collections.abc import Callable

import torch

from tarflow_hf import TarFlowConfig, TarFlowModel, TarFlowPipeline

CLASS_NAMES = {0: "cat", 1: "dog", 2: "wild"}


def tiny_pipeline(**defaults: float) -> TarFlowPipeline:
    """A conditional model after two real training steps on fixed images, with its pipeline."""
    torch.manual_seed(0)
    config = TarFlowConfig(
        image_size=8,
        num_channels=3,
        patch_size=4,
        hidden_size=32,
        num_blocks=2,
        layers_per_block=1,
        head_dim=16,
        num_classes=3,
        id2label=CLASS_NAMES,
    )
    model = TarFlowModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, -1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return TarFlowPipeline(transformer=model.eval(), **defaults)


def samples(pipe: TarFlowPipeline) -> str:
    """A digest of images drawn from a fixed seed with the pipeline's own defaults: equal only if every bit is."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["cat", "wild"], generator=torch.Generator().manual_seed(7), output_type="pt").images
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def refusal(call: Callable[[], object]) -> list[str]:
    """Type and message of the error that a call raises; empty strings if it raises none."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]

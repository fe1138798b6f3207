"""A pipeline saved before the package had rooms loads as it did, through every door, and gives the same numbers."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tarflow_hf import TarFlowModel, TarFlowPipeline

SAVED = Path(__file__).parents[1] / "fixtures" / "saved_by_0.1.0"


@pytest.mark.parametrize(
    "load",
    [
        lambda: TarFlowPipeline.from_pretrained(SAVED),
        lambda: DiffusionPipeline.from_pretrained(SAVED, custom_pipeline=str(SAVED), trust_remote_code=True),
        lambda: TarFlowPipeline(TarFlowModel.from_pretrained(SAVED / "transformer"), 1.5, guidance_rule="product"),
    ],
    ids=["pipeline", "diffusers", "model"],
)
def test_it_gives_the_numbers_of_its_day(load):
    pipe, expected = load(), load_file(SAVED / "expected.safetensors")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.sampling_defaults["guidance_scale"] == 1.5
    assert pipe.sampling_defaults["guidance_rule"] == "product"
    arguments = {"output_type": "latent", "denoising_strength": 0.5}
    images = pipe(["dog", 3], latents=expected["latents"], **arguments).images
    torch.testing.assert_close(images, expected["images"], atol=1e-5, rtol=1e-5)
    log_prob = pipe.transformer.log_prob(expected["images"], torch.tensor([1, 3]))
    torch.testing.assert_close(log_prob, expected["log_prob"], atol=1e-3, rtol=1e-6)

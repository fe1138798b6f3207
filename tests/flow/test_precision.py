"""Numbers that stay float32 or wider: under autocast, with narrow weights, and where types are mixed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, random_latents, tiny_model

from tarflow_hf import TarFlowPipeline
from tarflow_hf.flow.precision import forget_autocast
from tarflow_hf.flow.sampling.guidance import Guidance

LABELS = torch.tensor([0, 1, 3])


@pytest.fixture
def single():
    """A model in float32 that is close enough to the identity for bfloat16 to matter little."""
    return tiny_model(dtype=torch.float32, std=0.1)


@pytest.mark.parametrize("rule", ["log_scale", "scale", "product"])
def test_guidance_works_under_autocast(single, rule):
    latents = random_latents(single)
    guidance = Guidance(1.5, rule=rule)
    plain = single.decode(latents, LABELS, guidance=guidance, window=1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = single.decode(latents, LABELS, guidance=guidance, window=1)
    assert cast.dtype == torch.float32
    assert torch.allclose(cast, plain, atol=2e-2)


def test_everything_but_the_layers_is_float32_under_autocast(single):
    with torch.autocast("cpu", torch.bfloat16):
        for block in single.blocks:
            tokens = torch.randn(2, 16, 4)
            shift, log_scale = block(tokens, block.condition(torch.tensor([0, 1])))
            assert shift.dtype == log_scale.dtype == torch.float32
            entered = block.proj_in(tokens)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(entered, block.proj_in(tokens))
            assert block.layers[0].mlp.up_proj(entered).dtype == torch.bfloat16
        output = single(random_images(single), LABELS, output_hidden_states=True)
    assert {tensor.dtype for tensor in (output.loss, output.latents, output.log_det)} == {torch.float32}
    assert {state.dtype for state in output.hidden_states} == {torch.float32}


def test_likelihood_and_round_trip_under_autocast_are_those_of_float32(single):
    images = random_images(single)
    plain = single.log_prob(images, LABELS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cast = single.log_prob(images, LABELS)
        latents = single(images, LABELS).latents
        decoded = single.decode(latents, LABELS, window=1)
    assert cast.dtype == torch.float32
    assert (cast - plain).abs().max() / images[0].numel() < 2e-3
    assert (decoded - images).abs().max() < 2e-2


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_and_inputs_of_any_two_types_work_together(weights, inputs):
    model = tiny_model(dtype=weights, std=0.1)
    expected = torch.float64 if torch.float64 in (weights, inputs) else torch.float32
    latents, images = random_latents(model).to(inputs), random_images(model).to(inputs)
    guidance = Guidance(2.0, attention_temperature=0.9)
    for labels in (LABELS, None):
        assert model.decode(latents, labels, guidance=guidance).dtype == expected
    assert model(images, LABELS).latents.dtype == expected
    assert model.log_prob(images, LABELS).dtype == expected
    pipe = TarFlowPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1, 2, 3], guidance_scale=2.0, latents=latents, output_type="latent").images.dtype == expected
    assert pipe.invert(images, [1, 2, 3]).dtype == expected


def test_a_float64_pipeline_draws_and_guides():
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
    pipe.set_progress_bar_config(disable=True)

    def sample():
        return pipe([1], guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="latent").images

    single = sample()
    double = pipe.to(torch.float64) and sample()
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)


def test_sampling_and_training_in_one_autocast_context(single):
    """What autocast keeps for reuse neither blocks the gradients that follow nor comes from inference mode."""
    pipe = TarFlowPipeline(copy.deepcopy(single))
    pipe.set_progress_bar_config(disable=True)
    images = random_images(single)
    with torch.autocast("cpu", torch.bfloat16):
        pipe([1], guidance_scale=2.0, denoising_strength=1.0, output_type="latent")
        pipe.transformer(images, LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in pipe.transformer.parameters())


def test_what_autocast_keeps_for_reuse_can_be_forgotten():
    weight, inputs = torch.nn.Parameter(torch.ones(2, 2)), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(inputs, weight).tolist() == [[2, 2]]
        weight.data.fill_(5)
        forget_autocast(weight.device)
        assert F.linear(inputs, weight).tolist() == [[10, 10]]

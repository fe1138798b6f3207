"""Training of a model that is told the noise level: how levels are drawn, and how they weight the loss."""

import math

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config

from tarflow_hf import TarFlowModel
from tarflow_hf.flow.likelihood import nats_per_dim
from tarflow_hf.flow.noise import noise_level_weights, noise_levels
from tarflow_hf.images.batches import ImageBatch
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.augmentation import Augmenter, add_training_noise
from tarflow_hf.training.recipes import make_arguments
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.trainer import Trainer

RANGE = (0.1, 0.5)
FRACTIONS = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def test_levels_follow_their_distribution():
    low, high = RANGE
    uniform = noise_levels(FRACTIONS, "uniform", RANGE)
    assert math.isclose(uniform.mean().item(), (low + high) / 2, abs_tol=1e-6)
    assert math.isclose(uniform.var().item(), (high - low) ** 2 / 12, rel_tol=1e-4)
    linear = noise_levels(FRACTIONS, "linear", RANGE)  # its square is uniform: E t = 2/3 (t1^3 - t0^3) / (t1^2 - t0^2)
    expected = 2 / 3 * (high**3 - low**3) / (high**2 - low**2)
    assert math.isclose(linear.mean().item(), expected, abs_tol=1e-6)
    for levels in (uniform, linear):
        assert low < levels.min() < levels.max() < high
    edm = noise_levels(FRACTIONS, "edm", RANGE).log()
    assert math.isclose(edm.mean().item(), -1.2, abs_tol=1e-4)
    assert math.isclose(edm.std().item(), 1.0, abs_tol=1e-3)
    with pytest.raises(ValueError, match="sampling must be one of .* got 'cosine'"):
        noise_levels(FRACTIONS, "cosine", RANGE)


def test_weights():
    levels = torch.tensor([0.1, 0.5])
    expected = {
        "none": [1.0, 1.0],
        "t": [0.1, 0.5],
        "t_relative": [0.1 / 0.6, 0.5 / 0.6],
        "t2": [0.01, 0.25],
        "t2_relative": [0.01 / 0.26, 0.25 / 0.26],
    }
    for weighting, weights in expected.items():
        torch.testing.assert_close(noise_level_weights(levels, weighting, RANGE), torch.tensor(weights))
    with pytest.raises(ValueError, match="weighting must be one of .* got 't3'"):
        noise_level_weights(levels, "t3", RANGE)


def make_augmenter(config, **options):
    settings = OptimizationArguments(**({"max_steps": 1, "seed": 3, "label_drop": 0.0} | options))
    return Augmenter(config, settings, horizontal_flip=False, device=torch.device("cpu"))


def augmented(count=6, **options):
    config = tiny_config(noise_conditioning=True, noise_range=RANGE)
    augmenter = make_augmenter(config, batch_size=count, **options)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return augmenter, ImageBatch(pixels, torch.arange(count) % 4)


def test_levels_and_noise_depend_on_the_place_in_the_batch_and_not_on_its_division():
    augmenter, batch = augmented()
    whole = augmenter(batch, 7, slice(0, 6))
    for part in (slice(0, 2), slice(2, 6)):
        divided = augmenter(ImageBatch(batch.levels[part], batch.class_labels[part]), 7, part)
        for tensor, expected in zip(divided, whole, strict=True):
            assert tensor.equal(expected[part])
    assert not augmenter(batch, 8, slice(0, 6))[2].equal(whole[2])


@pytest.mark.parametrize("sampling", ["uniform", "edm"])
def test_an_image_carries_the_noise_of_its_level(sampling):
    augmenter, batch = augmented(count=500, noise_level_sampling=sampling)
    noisy, labels, levels = augmenter(batch, 0, slice(0, 500))
    assert labels.equal(batch.class_labels)
    assert levels.dtype == torch.float32
    assert (RANGE[0] <= levels.min() <= levels.max() <= RANGE[1]) == (sampling == "uniform")
    standardised = (noisy - to_pixel_values(batch.levels)) / levels[:, None, None, None]
    assert math.isclose(standardised.std().item(), 1.0, rel_tol=0.02)
    assert torch.corrcoef(torch.stack([standardised.flatten(1).std(1), levels]))[0, 1].abs() < 0.15


def test_levels_change_no_random_number_of_other_models():
    """Noise, flips and labels of a model without noise conditioning are those of the same seeds and of no level."""
    conditioned, batch = augmented()
    plain = make_augmenter(tiny_config(noise_std=1.0), batch_size=6)
    noisy, _, levels = conditioned(batch, 7, slice(0, 6))
    other, _ = plain(batch, 7, slice(0, 6))
    images = to_pixel_values(batch.levels)
    torch.testing.assert_close(noisy, images + levels[:, None, None, None] * (other - images))


def make_trainer(**settings):
    torch.manual_seed(0)
    model = TarFlowModel(tiny_config(noise_conditioning=True, noise_range=RANGE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    options = OptimizationArguments(batch_size=6, max_steps=10, learning_rate=1e-2, **settings)
    return Trainer(Accelerator(cpu=True), model, options, Schedule(total_steps=10, warmup_steps=1))


@pytest.mark.parametrize("weighting", ["none", "t", "t2_relative"])
def test_the_loss_is_weighted_by_the_level_of_each_image(weighting):
    augmenter, batch = augmented()
    inputs = augmenter(batch, 0, slice(0, 6))
    trainer = make_trainer(noise_level_weighting=weighting)
    output = trainer.model(*inputs)
    weights = noise_level_weights(inputs[2], weighting, RANGE)
    expected = (weights * nats_per_dim(output.latents, output.log_det)).mean()
    parts = make_trainer(noise_level_weighting=weighting)
    assert math.isclose(trainer.step([inputs]).loss, expected.item(), rel_tol=1e-5)
    halves = [tuple(tensor[part] for tensor in inputs) for part in (slice(0, 3), slice(3, 6))]
    assert math.isclose(parts.step(halves).loss, expected.item(), rel_tol=1e-5)
    for parameter, other in zip(trainer.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-4)


def test_training_lowers_the_loss():
    augmenter, batch = augmented()
    trainer = make_trainer()
    losses = [trainer.step([augmenter(batch, 0, slice(0, 6))]).loss for _ in range(10)]
    assert losses[-1] < losses[0] - 0.01


def test_added_noise_of_a_given_level():
    images, config = torch.zeros(2, 1, 50, 50), tiny_config(noise_conditioning=True)
    noisy = add_training_noise(images, config, [1, 1], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(noisy[1], 2 * noisy[0])


def test_options_reach_the_configuration():
    arguments = make_arguments(
        {"data": "x", "max_steps": 1, "noise_conditioning": True, "noise_range": [0.02, 0.4], "image_size": 8}
    )
    config = arguments.model.to_config(["a", "b"])
    assert (config.noise_conditioning, config.noise_range) == (True, (0.02, 0.4))
    with pytest.raises(ValueError, match="noise_level_sampling must be one of uniform, linear, edm, got 'x'"):
        make_arguments({"data": "x", "max_steps": 1, "noise_level_sampling": "x"})
    with pytest.raises(ValueError, match=r"rule \(guidance_rule\)|guidance_rule must be one of"):
        make_arguments({"data": "x", "max_steps": 1, "guidance_rule": "x"})

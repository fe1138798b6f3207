"""A denoising step where it is exact: for a Gaussian, by hand, and at the edges of what it takes."""

import math

import pytest
import torch

from tarflow_hf.flow.sampling.denoising import check_levels, denoise, even_levels


def images():
    return torch.linspace(-2.0, 2.0, 8, dtype=torch.float64).view(2, 1, 2, 2)


def log_prob(pixel_values, rows):
    return -0.5 * pixel_values.square().flatten(1).sum(1)


@pytest.mark.parametrize(("strength", "noise_std"), [(0.0, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_no_strength_or_no_noise_is_no_step(strength, noise_std):
    def never(pixel_values, rows):
        raise AssertionError("the score is not needed")

    found = denoise(never, images(), noise_std, strength=strength)
    assert found.equal(images())


@pytest.mark.parametrize("next_std", [0.0, 0.25])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_images_are_denoised_to_none(next_std, chunk_size):
    found = denoise(log_prob, images()[:0], 0.5, next_std=next_std, chunk_size=chunk_size)
    assert found.shape == (0, 1, 2, 2)


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("noise_std", [0.25, 0.5, 4.0])
def test_a_step_to_no_noise_adds_the_score_alone(strength, noise_std):
    found = denoise(log_prob, images(), noise_std, strength=strength, fresh_noise=1.0)
    torch.testing.assert_close(found, images() * (1 - strength * noise_std**2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("next_std", [0.125, 0.5])
@pytest.mark.parametrize("fresh_noise", [0.0, 0.5, 1.0])
def test_a_step_to_less_noise_keeps_a_part_of_it_and_draws_the_rest(next_std, fresh_noise):
    noise_std = 0.5
    clean = images() * (1 - noise_std**2)
    drawn = fresh_noise**2 * (1 - (next_std / noise_std) ** 2)
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = clean + next_std * math.sqrt(1 - drawn) / noise_std * (images() - clean)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    found = denoise(
        log_prob, images(), noise_std, next_std=next_std, fresh_noise=fresh_noise, generator=generator, chunk_size=1
    )
    torch.testing.assert_close(found, expected + next_std * math.sqrt(drawn) * noise, rtol=0, atol=1e-12)
    assert generator.get_state().equal(before) is (drawn == 0)  # none is drawn where none is needed


def test_a_step_has_no_gradient_of_its_own():
    inputs = images().requires_grad_()
    assert not denoise(log_prob, inputs, 0.5, next_std=0.25).requires_grad
    assert inputs.grad is None


def test_even_levels_go_from_the_highest_to_the_lowest():
    assert even_levels((0.25, 0.75), 1) == [0.75]
    assert even_levels((0.25, 0.75), 2) == [0.75, 0.25]
    assert even_levels((0.25, 0.75), 5) == [0.75, 0.625, 0.5, 0.375, 0.25]


@pytest.mark.parametrize("levels", [[0.3], [0.5], [0.1], [0.5, 0.1], [0.5, 0.3, 0.1], [0.2, 0.15]])
def test_levels_that_fall_within_the_range_are_taken(levels):
    check_levels(levels, (0.1, 0.5))


@pytest.mark.parametrize(
    "levels",
    [[], [0.3, 0.3], [0.4, 0.2, 0.3], [0.2, 0.4, 0.3], [0.5, 0.05], [0.6, 0.3], [0.3, "0.2"], ["a", 0.2]],
)
def test_other_levels_are_refused(levels):
    with pytest.raises(ValueError, match="refinement_levels must fall and be within"):
        check_levels(levels, (0.1, 0.5))


def test_a_step_to_no_noise_draws_none():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    denoise(log_prob, images(), 0.5, next_std=0.0, fresh_noise=1.0, generator=generator)
    assert generator.get_state().equal(before)

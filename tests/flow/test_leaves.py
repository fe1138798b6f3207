"""The leaves that hold one formula each: guidance, likelihood, noise and denoising."""

import math

import pytest
import torch
from conftest import random_images, tiny_model

from tarflow_hf import Guidance
from tarflow_hf.flow.likelihood import bits_per_dim, normal_log_prob
from tarflow_hf.flow.noise import add_gaussian_noise, augment, dequantize
from tarflow_hf.flow.sampling.denoising import denoise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(seed, shape=(2, 3, 4)):
    return tuple(torch.randn(shape, generator=generator(seed + i), dtype=torch.float64) for i in range(2))


def test_guidance_extrapolates_from_the_unlabelled_through_the_labelled_prediction():
    labelled, unlabelled = pair(0), pair(2)
    weights = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    shift, log_scale = Guidance(3.0).combine(labelled, unlabelled, weights)
    for token, weight in enumerate([0.0, 0.5, 2.0]):
        for guided, with_label, without in zip((shift, log_scale), labelled, unlabelled, strict=True):
            expected = (1 + weight) * with_label[:, token] - weight * without[:, token]
            torch.testing.assert_close(guided[:, token], expected)


def test_guidance_of_one_part_leaves_the_other():
    labelled, unlabelled, weights = pair(0), pair(2), torch.ones(3, dtype=torch.float64)
    shift, log_scale = Guidance(2.0, apply_to="shift").combine(labelled, unlabelled, weights)
    assert log_scale is labelled[1]
    assert not shift.equal(labelled[0])
    shift, log_scale = Guidance(2.0, apply_to="log_scale").combine(labelled, unlabelled, weights)
    assert shift is labelled[0]
    assert not log_scale.equal(labelled[1])


def test_the_scale_rule_is_linear_in_the_scale():
    labelled, unlabelled = pair(0), pair(2)
    weights = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    shift, log_scale = Guidance(2.0, rule="scale").combine(labelled, unlabelled, weights)
    assert shift.equal(Guidance(2.0).combine(labelled, unlabelled, weights)[0])
    scale, other = labelled[1].exp(), unlabelled[1].exp()
    expected = scale + weights[:, None] * (scale - other)
    torch.testing.assert_close(log_scale.exp(), expected.clamp(min=0))


def test_a_scale_that_is_not_positive_is_no_number():
    zeros, ones = torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
    limit = 1 / (math.e - 1)
    weights = torch.tensor([limit - 0.08, limit, limit + 0.02])  # the scale is 1 - g (e - 1)
    _, log_scale = Guidance(2.0, rule="scale").combine((zeros, zeros), (zeros, ones), weights)
    assert log_scale.isfinite().flatten().tolist()[::2] == [True, False]
    assert log_scale[0, 2].isnan()


def test_the_product_rule_gives_the_normalised_product_of_the_gaussians():
    """log N = (1 + w) log N_labelled - w log N_unlabelled + constant, where the labelled one is the narrower."""
    (mean, log_std), (other_mean, wider) = pair(0), pair(2)
    other_log_std = log_std + wider.abs()
    weights = torch.tensor([0.0, 0.5, 9.0], dtype=torch.float64)
    rule = Guidance(10.0, rule="product")
    guided_mean, guided_log_std = rule.combine((mean, log_std), (other_mean, other_log_std), weights)
    x = torch.randn(50, *mean.shape, generator=generator(9), dtype=torch.float64)
    normal = torch.distributions.Normal
    product = (1 + weights[:, None]) * normal(mean, log_std.exp()).log_prob(x)
    product = product - weights[:, None] * normal(other_mean, other_log_std.exp()).log_prob(x)
    difference = product - normal(guided_mean, guided_log_std.exp()).log_prob(x)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    narrow = rule.combine((mean, log_std), (other_mean, log_std - 1), weights)  # sigma_u < sigma_c: r is 1
    torch.testing.assert_close(narrow[0], mean + weights[:, None] * (mean - other_mean))
    torch.testing.assert_close(narrow[1], log_std)


def test_guidance_counts_the_guided_blocks_from_the_noise():
    assert [Guidance(2.0, num_guided_blocks=2).guides(step) for step in range(4)] == [True, True, False, False]
    assert Guidance(2.0).guides(99)
    assert [Guidance(2.0, num_guided_blocks=1).guides(step) for step in range(2)] == [True, False]
    assert Guidance().scale == 1


def test_schedules():
    torch.testing.assert_close(Guidance(3.0).weights(0, 5, 5), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
    torch.testing.assert_close(Guidance(3.0).weights(2, 4, 5), torch.tensor([1.0, 1.5]))
    assert Guidance(3.0).weights(0, 2, 2).tolist() == [0.0, 2.0]
    assert Guidance(3.0).weights(0, 1, 1).tolist() == [0.0]
    torch.testing.assert_close(Guidance(3.0, "constant").weights(2, 4, 5), torch.tensor([2.0, 2.0]))


def test_guidance_acts_only_where_the_branches_differ():
    assert not Guidance(1.0, attention_temperature=0.5).acts(labelled=True)
    assert not Guidance(2.0).acts(labelled=False)
    assert Guidance(2.0).acts(labelled=True)
    assert Guidance(2.0, attention_temperature=0.5).acts(labelled=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.5}, r"scale \(guidance_scale\) must be finite and at least 1 .* got 0.5"),
        ({"scale": math.inf}, "scale .* got inf"),
        ({"attention_temperature": -1.0}, "attention_temperature must be finite and above 0, got -1.0"),
        ({"attention_temperature": 0.0}, "attention_temperature must be finite and above 0, got 0.0"),
        ({"schedule": "cosine"}, "schedule .* must be one of .* got 'cosine'"),
        ({"apply_to": "a"}, "apply_to must be one of .* got 'a'"),
        ({"rule": "both"}, "rule .* must be one of .* got 'both'"),
        ({"num_guided_blocks": 0}, "num_guided_blocks must be None or at least 1, got 0"),
    ],
)
def test_guidance_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**arguments)


def test_normal_log_prob_is_that_of_torch():
    latents = torch.randn(3, 5, 2, generator=generator(), dtype=torch.float64)
    variance = torch.rand(5, 2, generator=generator(1), dtype=torch.float64) + 0.5
    expected = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(latents).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(latents, variance), expected)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(latents).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(latents), expected)
    assert normal_log_prob(latents.bfloat16()).dtype == torch.float32


def test_a_uniform_model_of_uniform_noise_needs_eight_bits():
    """The density of U[-1, 1]^12 is 2^-12 everywhere."""
    torch.testing.assert_close(bits_per_dim(torch.tensor([-12 * math.log(2)]), 12), torch.tensor([8.0]))
    with pytest.raises(ValueError, match="num_dims must be at least 1, got 0"):
        bits_per_dim(torch.zeros(1), 0)


def test_dequantisation_keeps_the_level_and_fills_its_cell():
    levels = torch.arange(256, dtype=torch.float64).repeat(100, 1, 1, 1)
    images = dequantize(levels / 127.5 - 1, generator=generator())
    cells = (images + 1) * 128
    assert cells.floor().equal(levels)
    fraction = cells - levels
    assert abs(fraction.mean() - 0.5) < 0.01
    assert abs(fraction.var() - 1 / 12) < 0.002
    assert images.min() >= -1
    assert images.max() < 1


def test_gaussian_noise_has_the_standard_deviation_asked_for():
    images = torch.zeros(10, 1, 50, 50)
    noise = add_gaussian_noise(images, 0.3, generator=generator())
    assert abs(noise.std() - 0.3) < 0.01
    assert noise.equal(augment(images, "gaussian", 0.3, generator=generator()))
    assert dequantize(images, generator=generator()).equal(augment(images, "uniform", 0.3, generator=generator()))
    assert images.abs().max() == 0
    with pytest.raises(ValueError, match="noise_std must be at least 0, got -1"):
        add_gaussian_noise(images, -1)
    with pytest.raises(ValueError, match="noise_type must be 'gaussian' or 'uniform', got 'laplace'"):
        augment(images, "laplace", 0.1)


def test_denoising_a_gaussian_gives_its_posterior_mean():
    """For x ~ N(m, s^2) and y = x + N(0, t^2): y ~ N(m, s^2 + t^2), E[x | y] = (s^2 y + t^2 m) / (s^2 + t^2)."""
    mean, std, noise_std = 0.3, 0.5, 0.2
    noisy = torch.randn(5, 1, 4, 4, generator=generator(), dtype=torch.float64)
    normal = torch.distributions.Normal(mean, math.hypot(std, noise_std))

    def log_prob(images, rows):
        assert images.equal(noisy[rows])
        return normal.log_prob(images).sum((1, 2, 3))

    expected = (std**2 * noisy + noise_std**2 * mean) / (std**2 + noise_std**2)
    for chunk_size in (None, 1, 2, 9):
        torch.testing.assert_close(denoise(log_prob, noisy, noise_std, chunk_size=chunk_size), expected)
    half = denoise(log_prob, noisy, noise_std, strength=0.5)
    torch.testing.assert_close(half, (noisy + expected) / 2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_denoising_needs_no_gradients_of_the_caller(context):
    model = tiny_model()
    images = random_images(model)
    expected = denoise(lambda x, rows: model.log_prob(x), images, 0.1)
    with context():
        denoised = denoise(lambda x, rows: model.log_prob(x), images.clone(), 0.1)
    assert denoised.equal(expected)
    assert not denoised.equal(images)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_std": -0.1}, "noise_std must be finite and at least 0, got -0.1"),
        ({"noise_std": 0.1, "strength": -1.0}, "strength must be finite and at least 0, got -1.0"),
        ({"noise_std": 0.1, "chunk_size": 0}, "chunk_size must be None or at least 1, got 0"),
    ],
)
def test_denoising_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        denoise(lambda x, rows: x.sum((1, 2, 3)), torch.zeros(1, 1, 2, 2), **arguments)


def test_a_scale_of_exactly_nothing_is_lost_too():
    zeros = torch.zeros(1, 1, 1)
    other = torch.full_like(zeros, 2.0).log()  # e^0 + 1 (e^0 - 2) = 0
    _, log_scale = Guidance(2.0, rule="scale").combine((zeros, zeros), (zeros, other), torch.ones(1))
    assert log_scale.isnan().all()

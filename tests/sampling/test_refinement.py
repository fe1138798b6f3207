"""Refinement in many steps: the step and its levels as mathematics, and as the pipeline runs it."""

import math

import pytest
import torch
from conftest import quiet_pipeline, random_latents, seeded, tiny_model

from tarflow_hf import Guidance, TarFlowPipeline
from tarflow_hf.flow.sampling.denoising import denoise, even_levels

RANGE = (0.1, 0.4)
MEAN, STD = 0.3, 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_pipeline(**defaults):
    model = tiny_model(dtype=torch.float32, noise_conditioning=True, noise_range=RANGE)
    return quiet_pipeline(model, **({"num_refinement_steps": 4} | defaults))


@pytest.fixture
def pipe():
    """A pipeline of a model with noise conditioning that refines in four steps."""
    return make_pipeline()


def sample(pipe, seeds=(1, 2, 3), **arguments):
    return pipe([0, 1, 2], generator=seeded(*seeds), **({"output_type": "latent"} | arguments)).images


def normal(level):
    """log p of N(MEAN, STD^2) with noise of this level, as `denoise` wants it."""
    density = torch.distributions.Normal(MEAN, math.hypot(STD, level))
    return lambda images, rows: density.log_prob(images).sum((1, 2, 3))


def refine(images, levels, **arguments):
    for level, next_level in zip(levels, [*levels[1:], 0.0], strict=True):
        images = denoise(normal(level), images, level, next_std=next_level, **arguments)
    return images


def test_levels():
    assert even_levels((0.1, 0.4), 4) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert even_levels((0.1, 0.4), 1) == [0.4]


@pytest.mark.parametrize(("fresh_noise", "tolerance"), [(0.0, 0.01), (0.5, 0.02), (1.0, 0.02)])
def test_many_steps_turn_noisy_gaussians_into_clean_ones(fresh_noise, tolerance):
    """The score of a Gaussian is exact, so that the ODE and the SDE both end at the density without noise."""
    high = 2.0
    noisy = MEAN + math.hypot(STD, high) * torch.randn(8, 1, 50, 50, generator=generator(), dtype=torch.float64)
    levels = even_levels((0.005, high), 300)
    clean = refine(noisy, levels, fresh_noise=fresh_noise, generator=generator(1))
    assert abs(clean.mean() - MEAN) < 0.01
    assert abs(clean.std() - STD) < tolerance
    correlation = torch.corrcoef(torch.stack([noisy.flatten(), clean.flatten()]))[0, 1]
    assert (correlation > 0.999) == (fresh_noise == 0)


def test_one_step_to_nothing_is_tweedie_and_a_step_keeps_its_share_of_the_noise():
    noisy = torch.randn(3, 1, 4, 4, generator=generator(), dtype=torch.float64)
    clean = denoise(normal(0.4), noisy, 0.4)
    kept = denoise(normal(0.4), noisy, 0.4, next_std=0.1)
    torch.testing.assert_close(kept, clean + 0.25 * (noisy - clean))
    unmoved = denoise(normal(0.4), noisy, 0.4, next_std=0.4, fresh_noise=1.0, generator=generator())
    torch.testing.assert_close(unmoved, noisy)
    fresh = denoise(normal(0.4), noisy, 0.4, next_std=0.1, fresh_noise=1.0, generator=generator(3))
    noise = torch.randn(noisy.shape, generator=generator(3), dtype=torch.float64)
    expected = clean + 0.1 * (0.25 * (noisy - clean) / 0.4 + math.sqrt(1 - 0.25**2) * noise)
    torch.testing.assert_close(fresh, expected)


def test_the_pipeline_decodes_at_the_highest_level_and_then_refines(pipe):
    model, labels, latents = pipe.transformer, torch.tensor([0, 1, 2]), random_latents(pipe.transformer)
    images = model.decode(latents, labels, guidance=Guidance(1.5, rule="product", num_guided_blocks=2))
    for level, next_level in [(0.4, 0.3), (0.3, 0.2), (0.2, 0.1), (0.1, 0.0)]:

        def log_prob(images, rows, level=level):
            return model.log_prob(images, labels[rows], torch.full((len(images),), level))

        images = denoise(log_prob, images, level, next_std=next_level)
    arguments = {"guidance_scale": 1.5, "guidance_rule": "product", "num_guided_blocks": 2}
    refined = pipe([0, 1, 2], latents=latents, output_type="latent", **arguments).images
    torch.testing.assert_close(refined, images, rtol=0, atol=1e-5)


def test_callback_progress_bar_and_interrupt_are_those_of_one_step(pipe, capsys):
    seen = []

    def watch(pipe, step, block, tensors):
        seen.append((step, block, tuple(tensors["latents"].shape)))
        pipe._interrupt = len(seen) == 5
        return {"latents": torch.zeros_like(tensors["latents"])} if block == -2 else tensors

    pipe.set_progress_bar_config(disable=False)
    images = sample(pipe, callback_on_step_end=watch)
    shape = (3, 16, 4)
    assert seen == [(0, 2, shape), (1, 1, shape), (2, 0, shape), (3, -1, shape), (4, -2, shape)]
    assert images.abs().max() == 0
    assert "5/7" in capsys.readouterr().err
    sample(pipe)
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize("fresh_noise", [0.0, 0.5, 1.0])
def test_an_image_depends_on_its_own_generator_alone(pipe, fresh_noise):
    together = sample(pipe, refinement_noise=fresh_noise, tolerance=0)
    assert together.equal(sample(pipe, refinement_noise=fresh_noise, tolerance=0))
    for index in range(3):
        arguments = {"refinement_noise": fresh_noise, "tolerance": 0, "output_type": "latent"}
        (alone,) = pipe(index, generator=seeded(index + 1), **arguments).images
        torch.testing.assert_close(alone, together[index], rtol=0, atol=1e-5)
    assert together.equal(sample(pipe, tolerance=0)) == (fresh_noise == 0)


def test_strength_zero_leaves_the_sample_as_it_was_decoded(pipe):
    latents = random_latents(pipe.transformer)
    images = pipe([0, 1, 2], latents=latents, denoising_strength=0, output_type="latent").images
    assert images.equal(pipe.transformer.decode(latents, torch.tensor([0, 1, 2])))


def test_latents_of_an_image_decode_to_it(pipe):
    images = torch.rand(2, 1, 8, 8, generator=generator()) * 2 - 1
    for level in (None, 0.2):
        latents = pipe.invert(images, [0, 1], noise_level=level)
        levels = torch.full((2,), level or RANGE[1])
        decoded = pipe.transformer.decode(latents, torch.tensor([0, 1]), noise_level=levels, tolerance=0)
        torch.testing.assert_close(decoded, images, rtol=0, atol=1e-5)


def test_the_defaults_are_saved_and_fit_the_model(tmp_path):
    pipe = make_pipeline(guidance_rule="product", guidance_scale=1.7)
    pipe.save_pretrained(tmp_path)
    loaded = TarFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.num_refinement_steps, loaded.config.guidance_rule) == (4, "product")
    assert sample(loaded).equal(sample(pipe))
    assert not sample(loaded, guidance_rule="log_scale").equal(sample(pipe))
    assert not sample(loaded, num_refinement_steps=3).equal(sample(pipe))
    levels = [0.4, 0.3, 0.2, 0.1]
    assert (sample(loaded, refinement_levels=levels) - sample(pipe)).abs().max() < 1e-5
    assert not sample(loaded, refinement_levels=[0.4, 0.2]).equal(sample(pipe, num_refinement_steps=2))
    unset = make_pipeline(num_refinement_steps=None)
    assert sample(unset).equal(sample(pipe, num_refinement_steps=40, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_refinement_steps": 0}, r"num_steps \(num_refinement_steps\) must be at least 1, got 0"),
        ({"refinement_noise": 1.5}, r"fresh_noise \(refinement_noise\) must be from 0 to 1, got 1.5"),
        (
            {"refinement_levels": [0.2, 0.3]},
            r"refinement_levels must fall and be within \(0.1, 0.4\), got \[0.2, 0.3\]",
        ),
        ({"refinement_levels": [0.5, 0.3]}, "refinement_levels must fall and be within"),
        ({"refinement_levels": []}, r"refinement_levels must fall .* got \[\]"),
        (
            {"refinement_levels": [0.3], "num_refinement_steps": 1},
            r"give num_refinement_steps or refinement_levels, got 1 and \[0.3\]",
        ),
        ({"guidance_rule": "both"}, r"rule \(guidance_rule\) must be one of .* got 'both'"),
        ({"num_guided_blocks": 0}, "num_guided_blocks must be None or at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, **arguments)


def test_a_model_that_knows_one_level_takes_one_step():
    pipe = TarFlowPipeline(tiny_model(dtype=torch.float32))
    with pytest.raises(ValueError, match="num_refinement_steps must be 1 for a model without noise conditioning"):
        pipe(0, num_refinement_steps=2)
    with pytest.raises(ValueError, match="num_refinement_steps must be 1 .* got 3"):
        TarFlowPipeline(tiny_model(), num_refinement_steps=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"next_std": 0.3}, "next_std must be from 0 to noise_std=0.2, got 0.3"),
        ({"next_std": -0.1}, "next_std must be from 0 to noise_std=0.2, got -0.1"),
        ({"fresh_noise": -0.1}, "fresh_noise .* must be from 0 to 1, got -0.1"),
    ],
)
def test_steps_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        denoise(normal(0.2), torch.zeros(1, 1, 2, 2), 0.2, **arguments)

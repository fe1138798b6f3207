"""Edges that nothing else comes near: where rounding would leave a cell, one dimension, no parts."""

import pytest
import torch
from conftest import tiny_model

from tarflow_hf import Guidance, TarFlowConfig
from tarflow_hf.flow.likelihood import bits_per_dim, normal_log_prob
from tarflow_hf.flow.noise import add_gaussian_noise, dequantize
from tarflow_hf.flow.sampling.branches import Batch
from tarflow_hf.flow.sampling.settings import SamplingSettings, refinement_levels
from tarflow_hf.flow.signatures import arguments_of, documents_arguments
from tarflow_hf.images.processing import to_levels, to_pixel_values


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_levels_can_be_read_back_where_rounding_reaches_the_next_cell(dtype):
    # The noise reaches the end of a cell once in 2^5 draws in half precision, once in 2^18 in single.
    levels = torch.arange(256, dtype=torch.uint8).repeat(2**10)
    if dtype == torch.float32:
        levels = torch.tensor([127, 255], dtype=torch.uint8).repeat(2**21)
    noisy = dequantize(to_pixel_values(levels).to(dtype), generator=generator())
    assert noisy.dtype == dtype
    assert to_levels(noisy, "uniform").equal(levels)
    below_zero = noisy[levels == 127].max().double()
    assert -(2**-20) < below_zero < 0  # cut off there, and no earlier


def test_gaussian_noise_is_added():
    images = torch.rand(2, 1, 4, 4, generator=generator()) - 0.5
    noise = torch.empty_like(images).normal_(generator=generator(1))
    assert add_gaussian_noise(images, 0.25, generator=generator(1)).equal(images + 0.25 * noise)
    assert add_gaussian_noise(images, 0.0, generator=generator(1)).equal(images)


def test_a_variance_counts_in_the_precision_of_the_latents():
    latents = torch.randn(2, 4, 3, generator=generator(), dtype=torch.float64)
    variance = torch.rand(4, 3, generator=generator(1)) + 0.1
    assert normal_log_prob(latents, variance).equal(normal_log_prob(latents, variance.double()))


def test_one_dimension_has_bits():
    assert bits_per_dim(torch.zeros(1), 1).item() == 7


def test_a_batch_is_split_into_one_part_at_least():
    batch = Batch(torch.arange(6.0).view(3, 2, 1), torch.tensor([2, 1, 0]), None, torch.eye(3))
    for wanted, sizes in ((0, [3]), (1, [3]), (2, [2, 1]), (3, [1, 1, 1])):
        parts = batch.split(wanted)
        assert [len(part.latents) for part in parts] == sizes
        for field in ("latents", "labels", "condition"):
            assert torch.cat([getattr(part, field) for part in parts]).equal(getattr(batch, field))
        assert {part.noise_level for part in parts} == {None}


def test_some_images_of_a_batch_keep_what_is_theirs():
    batch = Batch(torch.arange(6.0).view(3, 2, 1), torch.tensor([2, 1, 0]), None, torch.eye(3))
    some = batch.take([2, 0])
    assert some.latents.flatten().tolist() == [4, 5, 0, 1]
    assert (some.labels.tolist(), some.condition.tolist()) == ([0, 2], [[0, 0, 1], [1, 0, 0]])
    assert some.noise_level is None


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_is_that_of_the_unlabelled_branch_alone(temperature):
    model = tiny_model(head_dim=4)  # four heads
    latents = torch.randn(2, 16, 4, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([0, 3])

    warm = model.decode(latents, labels, guidance=Guidance(2.0, "constant", temperature), tolerance=0, window=1)
    plain = model.decode(latents, labels, guidance=Guidance(2.0, "constant"), tolerance=0, window=1)
    assert (warm - plain).abs().max() > 1e-4
    barely = model.decode(
        latents, labels, guidance=Guidance(1.0 + 1e-9, "constant", temperature), tolerance=0, window=1
    )
    torch.testing.assert_close(barely, model.decode(latents, labels, tolerance=0, window=1), rtol=0, atol=1e-6)


def test_documentation_is_taken_from_one_place_and_put_into_another():
    class Size:
        """A size.

        Args:
            width: In pixels,
                as they are.
            height: Too.

        Example:
            >>> Size()
        """

    assert arguments_of(Size) == "width: In pixels,\n    as they are.\nheight: Too."
    assert arguments_of(type("Bare", (), {})) == ""

    def crop(width):
        """Crops.

        Args:
            <arguments>
        """
        return width

    documented = documents_arguments(arguments_of(Size))(crop)
    assert documented is crop
    assert crop.__doc__ == "Crops.\n\nArgs:\n    width: In pixels,\n        as they are.\n    height: Too."
    with pytest.raises(ValueError, match="the docstring of <lambda> must have the line '<arguments>'"):
        documents_arguments("x")(lambda: None)


def test_settings_without_any_argument_are_those_of_a_plain_call():
    plain = SamplingSettings()
    assert (plain.guidance_scale, plain.attention_temperature, plain.temperature) == (1.0, 1.0, 1.0)
    assert (plain.denoising_strength, plain.refinement_noise, plain.tolerance) == (0.0, 0.0, 1e-3)
    assert plain.guided_by(1.0) is plain.guided_by(0.5) is None
    assert plain.guided_by(1.5).scale == 1.5


def test_guidance_can_act_between_branches_that_differ():
    for temperature, labelled, acts in ((1.0, True, True), (1.0, False, False), (2.0, False, True), (0.5, True, True)):
        assert SamplingSettings(attention_temperature=temperature).can_guide(labelled=labelled) is acts


def test_all_blocks_may_be_guided_by_number_and_no_more():
    config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)
    for count in (None, 1, 2):
        SamplingSettings(num_guided_blocks=count).check(config)
    with pytest.raises(ValueError, match="num_guided_blocks must be at most num_blocks=2, got 3"):
        SamplingSettings(num_guided_blocks=3).check(config)


@pytest.mark.parametrize(("high", "steps"), [(0.004, 1), (0.016, 2), (0.3, 30), (1.0, 100)])
def test_there_is_a_refinement_step_for_each_hundredth_of_the_highest_level(high, steps):
    config = TarFlowConfig(
        image_size=8, num_channels=1, hidden_size=64, num_blocks=2, noise_conditioning=True, noise_range=(0.001, high)
    )
    assert len(refinement_levels(config)) == steps
    assert (
        refinement_levels(TarFlowConfig(noise_std=0.1)) == refinement_levels(TarFlowConfig(noise_std=0.1), 1) == [0.1]
    )
    with pytest.raises(
        ValueError, match="num_refinement_steps must be 1 for a model without noise conditioning, got 0"
    ):
        refinement_levels(TarFlowConfig(noise_std=0.1), 0)


def test_one_pass_is_one_step():
    config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=3, noise_std=0.1)
    for strength, steps in ((1.0, 4), (0.0, 3)):
        for decoder in ("exact", "refined"):
            assert SamplingSettings(decoder=decoder, denoising_strength=strength).num_steps(config) == steps
        assert SamplingSettings(decoder="one_pass", denoising_strength=strength).num_steps(config) == 1


@pytest.mark.parametrize("limit", [0, -1.0, -0.5, float("nan"), float("inf"), "0.1", True])
def test_a_largest_error_is_finite_and_above_0(limit):
    config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)
    for allowed in (1e-6, 0.5, 1, 2.0, None):
        SamplingSettings(decoder="one_pass", max_error=allowed).check(config)
    with pytest.raises(ValueError, match="max_error must be finite and above 0, got"):
        SamplingSettings(decoder="one_pass", max_error=limit).check(config)

"""What holds for every TarFlow model, tried on tiny random ones in float64."""

import tempfile

import torch
from conftest import random_images, random_latents, tiny_model
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tarflow_hf import Guidance, TarFlowModel, denoise
from tarflow_hf.flow.noise import add_gaussian_noise, dequantize, noise_levels

BATCH = 3
FEW = settings(max_examples=12)


@st.composite
def models(draw, **fixed):
    """A model of any small shape, its weights and the seed of its inputs random."""
    shape = {
        "image_size": draw(st.sampled_from([4, 6, (4, 8), (6, 4)])),
        "num_channels": draw(st.sampled_from([1, 3])),
        "num_blocks": draw(st.integers(1, 3)),
        "num_classes": draw(st.sampled_from([0, 3])),
        "noise_range": (0.1, 0.5),
    } | fixed
    kind = draw(st.sampled_from([None, "volume_preserving", "noise_conditioning"]))
    if kind is not None:
        shape[kind] = True
    return tiny_model(seed=draw(st.integers(0, 99)), layers_per_block=1, **shape)


def inputs(model):
    """Images, and the labels and noise levels that fit the model."""
    labels = torch.tensor([0, 2, -1]) if model.config.num_classes else None
    levels = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64) if model.config.noise_conditioning else None
    return random_images(model, BATCH), labels, levels


def decode(model, latents, labels, levels, **arguments):
    return model.decode(latents, labels, noise_level=levels, **({"tolerance": 0} | arguments))


@FEW
@given(model=models(), window=st.sampled_from([1, 2, None]))
def test_decoding_inverts_encoding_and_encoding_decoding(model, window):
    images, labels, levels = inputs(model)
    latents = model(images, labels, levels).latents
    variance = model.prior_variance.sqrt() if model.config.volume_preserving else 1.0
    decoded = decode(model, latents / variance, labels, levels, window=window)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-9)
    noise = random_latents(model, BATCH)
    again = model(decode(model, noise, labels, levels, window=window), labels, levels).latents
    torch.testing.assert_close(again, noise * variance, rtol=0, atol=1e-9)


@FEW
@given(model=models(num_blocks=1), place=st.integers(0, 3), backwards=st.booleans())
def test_a_token_moves_what_follows_it_alone_in_both_directions(model, place, backwards):
    """One block reads in raster order: a changed token changes itself and later ones, encoding as well as decoding."""
    images, labels, levels = inputs(model)
    tokens = random_latents(model, BATCH) if backwards else model.patchify(images)
    changed = tokens.clone()
    changed[:, place] += 0.5

    def run(patches):
        if backwards:
            return model.patchify(decode(model, patches, labels, levels))
        return model(model.unpatchify(patches), labels, levels).latents

    moved = (run(changed) - run(tokens)).abs().amax((0, 2)) > 1e-12
    assert not moved[:place].any()
    assert moved[place]
    if place < model.config.num_tokens - 1:
        assert moved[place + 1]


@settings(max_examples=8)
@given(model=models(image_size=4, num_channels=1))
def test_the_log_determinant_is_that_of_the_jacobian(model):
    images, labels, levels = inputs(model)
    output = model(images, labels, levels)
    for row in range(BATCH):
        label, level = (None if given is None else given[row : row + 1] for given in (labels, levels))
        jacobian = torch.autograd.functional.jacobian(
            lambda image, label=label, level=level: model(image, label, level).latents, images[row : row + 1]
        )
        _, log_det = torch.linalg.slogdet(jacobian.reshape(16, 16))
        torch.testing.assert_close(output.log_det[row], log_det, rtol=0, atol=1e-9)


@FEW
@given(model=models(), window=st.integers(2, 9), split=st.integers(1, BATCH), scale=st.sampled_from([1.0, 1.7]))
def test_neither_windows_nor_a_split_batch_change_an_image(model, window, split, scale):
    _, labels, levels = inputs(model)
    noise, guidance = random_latents(model, BATCH), Guidance(scale, attention_temperature=0.8)
    expected = decode(model, noise, labels, levels, guidance=guidance, window=1)
    decoded = decode(model, noise, labels, levels, guidance=guidance, window=window, max_batch=split)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-9)


@FEW
@given(
    model=models(num_classes=3),
    rule=st.sampled_from(["log_scale", "scale", "product"]),
    schedule=st.sampled_from(["linear", "constant"]),
    scale=st.floats(1.0, 1.3),
)
def test_guidance_of_nothing_is_none_and_all_rules_agree_on_it(model, rule, schedule, scale):
    """A scale of 1, a label that is none, and no guided part that differs: the plain sample."""
    _, labels, levels = inputs(model)
    noise = random_latents(model, BATCH)
    plain = decode(model, noise, labels, levels)
    assert decode(model, noise, labels, levels, guidance=Guidance(1.0, schedule, 0.5, rule=rule)).equal(plain)
    guided = decode(model, noise, labels, levels, guidance=Guidance(scale, schedule, rule=rule))
    torch.testing.assert_close(guided[2], plain[2], rtol=0, atol=1e-9)  # without a label both branches are the same
    shift, log_scale = torch.randn(2, 1, 4, 2, dtype=torch.float64).unbind(0)
    weights = torch.rand(4, dtype=torch.float64)
    combined = Guidance(2.0, rule=rule).combine((shift, log_scale), (shift, log_scale), weights)
    torch.testing.assert_close(combined, (shift, log_scale))


@settings(max_examples=6, phases=[Phase.generate])  # without the search for a smaller model
@given(model=models())
def test_what_is_saved_is_loaded(model):
    images, labels, levels = inputs(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = TarFlowModel.from_pretrained(folder, dtype=torch.float64).eval()
    latents, expected = (each(images, labels, levels).latents for each in (loaded, model))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 999), noise_std=st.floats(0.01, 2.0))
def test_noise_can_be_taken_off_again(seed, noise_std):
    """Dequantised levels are read back exactly; Gaussian noise by its own score, where one image is all there is."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, (2, 1, 4, 4), generator=generator)
    images = levels.double() / 127.5 - 1
    noisy = dequantize(images, generator=generator)
    assert noisy.min() >= -1
    assert noisy.max() < 1
    assert ((noisy + 1) * 128).floor().long().equal(levels)
    noisy = add_gaussian_noise(images, noise_std, generator=generator)
    clean = denoise(lambda x, rows: -0.5 * ((x - images[rows]) / noise_std).square().sum((1, 2, 3)), noisy, noise_std)
    torch.testing.assert_close(clean, images, rtol=0, atol=1e-9)
    kept = denoise(
        lambda x, rows: -0.5 * ((x - images[rows]) / noise_std).square().sum((1, 2, 3)),
        noisy,
        noise_std,
        next_std=noise_std / 2,
    )
    torch.testing.assert_close(kept, images + (noisy - images) / 2, rtol=0, atol=1e-9)


@given(fraction=st.floats(1e-6, 1 - 1e-6), sampling=st.sampled_from(["uniform", "linear", "edm"]))
def test_noise_levels_have_the_distribution_they_are_named_after(fraction, sampling):
    low, high = 0.1, 0.5
    (level,) = noise_levels(torch.tensor([fraction], dtype=torch.float64), sampling, (low, high))
    share = {
        "uniform": (level - low) / (high - low),
        "linear": (level**2 - low**2) / (high**2 - low**2),
        "edm": torch.special.ndtr(level.log() + 1.2),
    }[sampling]
    torch.testing.assert_close(share.item(), fraction, rtol=0, atol=1e-9)

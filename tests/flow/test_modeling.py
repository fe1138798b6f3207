"""The flow as a mathematical object: bijection, density, causality, gradients; against the literal oracle."""

import oracle
import pytest
import torch
from conftest import random_images, random_latents, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from tarflow_hf import Guidance, TarFlowModel
from tarflow_hf.flow.likelihood import normal_log_prob
from tarflow_hf.training.peak_memory import PeakMemory

LABELS = torch.tensor([0, 3, -1])


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 0}, {"volume_preserving": True}, {"num_channels": 3}])
def test_encoding_equals_the_oracle(overrides):
    model = tiny_model(**overrides)
    images = random_images(model, 2)
    labels = torch.tensor([2, -1]) if model.config.num_classes else None
    output = model(images, labels)
    for index, image in enumerate(images):
        latents, log_det = oracle.encode(model, image, None if labels is None else labels[index].item())
        torch.testing.assert_close(output.latents[index], latents, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.log_det[index], log_det, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [1, 3, 16, None])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "guidance",
    [
        None,
        Guidance(2.5),
        Guidance(2.0, "constant"),
        Guidance(1.7, "linear", 0.5),
        Guidance(1.7, "linear", 1.0, "shift"),
        Guidance(1.7, "constant", 1.5, "log_scale"),
    ],
)
def test_decoding_equals_the_oracle(window, labelled, guidance):
    model = tiny_model(num_blocks=2, layers_per_block=1)
    latents = random_latents(model, 2)
    labels = torch.tensor([1, -1]) if labelled else None
    images = model.decode(latents, labels, guidance=guidance, window=window, tolerance=0)
    parts = {"both": ("shift", "log_scale"), "shift": ("shift",), "log_scale": ("log_scale",)}
    for index in range(2):
        expected = oracle.decode(
            model,
            latents[index],
            labels[index].item() if labelled else None,
            weight=guidance.scale - 1 if guidance else 0.0,
            annealed=guidance is None or guidance.schedule == "linear",
            temperature=guidance.attention_temperature if guidance else 1.0,
            parts=parts[guidance.apply_to if guidance else "both"],
        )
        torch.testing.assert_close(images[index], expected, rtol=0, atol=1e-10)


@settings(max_examples=25)
@given(
    patch_size=st.sampled_from([1, 2, 3]),
    side=st.integers(1, 4),
    num_channels=st.integers(1, 4),
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    num_classes=st.sampled_from([0, 1, 5]),
    volume_preserving=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_decode_inverts_encode(patch_size, side, num_channels, depths, num_classes, volume_preserving, window, seed):
    model = tiny_model(
        seed=seed,
        image_size=patch_size * side,
        patch_size=patch_size,
        num_channels=num_channels,
        num_blocks=len(depths),
        layers_per_block=depths,
        num_classes=num_classes,
        volume_preserving=volume_preserving,
    )
    images = random_images(model, 2, seed=seed)
    labels = torch.tensor([0, -1]) if num_classes else None
    latents = model(images, labels).latents
    if volume_preserving:
        latents = latents / model.prior_variance.sqrt()
    decoded = model.decode(latents, labels, window=window, tolerance=0)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-9)


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_log_det_and_density_against_the_autograd_jacobian(volume_preserving):
    model = tiny_model(volume_preserving=volume_preserving, image_size=4)
    image, label = random_images(model, 1), torch.tensor([2])
    output = model(image, label)

    def encode(flat):
        return model(flat.view_as(image), label).latents.flatten()

    jacobian = torch.autograd.functional.jacobian(encode, image.flatten())
    sign, log_det = torch.linalg.slogdet(jacobian)
    torch.testing.assert_close(output.log_det[0], log_det, rtol=0, atol=1e-9)
    variance = model.prior_variance if volume_preserving else torch.ones_like(output.latents[0])
    normal = torch.distributions.Normal(0.0, variance.sqrt())
    expected = normal.log_prob(output.latents[0]).sum() + log_det
    torch.testing.assert_close(model.log_prob(image, label)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block", [0, 1])
def test_a_token_depends_on_no_later_one(model, block):
    """The Jacobian of a block is lower triangular in the block's own order."""
    layer, config = model.blocks[block], model.config
    tokens = random_latents(model, 1)

    def encode(flat):
        shift, log_scale = layer(flat.view_as(tokens), layer.condition(torch.tensor([1])))
        return torch.cat([shift, log_scale], dim=-1)[0].sum(-1)

    jacobian = torch.autograd.functional.jacobian(encode, tokens.flatten()).view(
        config.num_tokens, config.num_tokens, -1
    )
    later = torch.ones(config.num_tokens, config.num_tokens).triu(1).bool()
    assert jacobian[later].abs().max() == 0
    assert jacobian[~later].abs().amin(-1).min() > 0


def test_the_flow_is_the_identity_at_initialisation():
    model = TarFlowModel(tiny_config()).double()
    images = random_images(model)
    output = model(images, LABELS)
    torch.testing.assert_close(model.unpatchify(output.latents), images, rtol=0, atol=0)
    assert output.log_det.abs().max() == 0
    assert model.decode(output.latents).equal(images)


def test_the_loss_is_the_negative_log_likelihood_per_dimension(model):
    images = random_images(model)
    output = model(images, LABELS)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    expected = -model.log_prob(images, LABELS).mean() / model.config.num_dims - constant
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-12)
    assert normal_log_prob(output.latents).shape == (3,)


def test_no_label_is_the_mean_class(model):
    images = random_images(model)
    assert model(images).latents.equal(model(images, torch.tensor([-1, -1, -1])).latents)
    mixed = model(images, LABELS).latents
    torch.testing.assert_close(mixed[2], model(images).latents[2])
    assert not torch.allclose(mixed[0], model(images).latents[0])


def test_gradients_reach_every_parameter():
    model = tiny_model().train()
    model(random_images(model), LABELS).loss.backward()
    dead = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert dead == []


def test_gradients_agree_with_finite_differences(model):
    images = random_images(model, 2)
    assert torch.autograd.gradcheck(lambda x: model(x, LABELS[:2]).loss, images.requires_grad_(), eps=1e-6, atol=1e-7)


def test_activation_checkpointing_changes_no_gradient():
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(random_images(model), LABELS).loss.backward()
    for parameter, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-12)


def test_the_score_needs_less_memory_with_activation_checkpointing():
    def score(model):
        with PeakMemory() as memory:
            images = random_images(model).requires_grad_()
            (gradient,) = torch.autograd.grad(model.log_prob(images, LABELS).sum(), images)
        return gradient, memory.peak

    plain, checkpointed = (tiny_model(num_blocks=6, layers_per_block=2) for _ in range(2))
    checkpointed.activation_checkpointing_enable()
    (expected, all_blocks), (gradient, one_block) = score(plain), score(checkpointed)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert one_block < 0.5 * all_blocks


def test_eager_attention_agrees_with_sdpa(model):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    images, latents = random_images(model), random_latents(model)
    torch.testing.assert_close(eager(images, LABELS).latents, model(images, LABELS).latents, rtol=0, atol=1e-10)
    for window in (1, 5):
        decoded = eager.decode(latents, LABELS, guidance=Guidance(2.0), window=window, tolerance=0)
        expected = model.decode(latents, LABELS, guidance=Guidance(2.0), window=window, tolerance=0)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-10)


def test_nothing_the_caller_owns_is_written_to(model):
    images, latents, labels = random_images(model), random_latents(model), LABELS.clone()
    copies = images.clone(), latents.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    model(images, labels)
    model.decode(latents, labels, guidance=Guidance(2.0))
    assert images.equal(copies[0])
    assert latents.equal(copies[1])
    assert labels.equal(LABELS)
    assert all(value.equal(copies[2][name]) for name, value in model.state_dict().items())


def test_hidden_states_are_the_latents_after_each_block(model):
    output = model(random_images(model), LABELS, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert output.hidden_states[-1] is output.latents
    loss, latents, log_det = model(random_images(model), LABELS, return_dict=False)
    assert latents.equal(output.latents)
    assert loss.equal(output.loss)
    assert log_det.equal(output.log_det)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_affine_step_is_float32_whatever_the_dtype(dtype):
    model = tiny_model(dtype=dtype, hidden_size=32)
    images = random_images(model)
    output = model(images, LABELS)
    assert output.latents.dtype == output.log_det.dtype == torch.float32
    decoded = model.decode(output.latents, LABELS, window=1)
    assert decoded.dtype == torch.float32
    rms = (decoded - images).square().mean().sqrt()
    assert rms < (1e-5 if dtype == torch.float32 else 3e-3)


def test_mixed_precision_keeps_the_affine_step_in_float32():
    model = tiny_model(dtype=torch.float32)
    images = random_images(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, LABELS)
        decoded = model.decode(output.latents, LABELS)
    assert output.latents.dtype == output.log_det.dtype == decoded.dtype == torch.float32
    assert (decoded - images).square().mean().sqrt() < 3e-3


@pytest.mark.parametrize("volume_preserving", [False, True])
def test_save_and_load_keep_every_bit(tmp_path, volume_preserving):
    model = tiny_model(volume_preserving=volume_preserving, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    for loaded in (TarFlowModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is TarFlowModel
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
        images = random_images(model)
        assert loaded(images, LABELS).latents.equal(model(images, LABELS).latents)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()


def test_the_prior_variance_follows_the_latents():
    model = tiny_model(volume_preserving=True)
    before = model.prior_variance.clone()
    target = torch.full_like(before, 3.0)
    model.update_prior_variance(target)
    torch.testing.assert_close(model.prior_variance, 0.9 * before + 0.1 * target)
    with pytest.raises(ValueError, match="volume_preserving=True"):
        tiny_model().update_prior_variance(target)


def test_compiled_forward_agrees(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = random_images(model)
    torch.testing.assert_close(compiled(images, LABELS).latents, model(images, LABELS).latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 9), r"pixel_values must have shape .* got \(2, 1, 8, 9\)"),
        ((2, 3, 8, 8), r"pixel_values must have shape .* got \(2, 3, 8, 8\)"),
        ((1, 8, 8), r"pixel_values must have shape .* got \(1, 8, 8\)"),
    ],
)
def test_images_of_another_shape_are_refused(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 4]), r"class_labels must be in -1 \.\.\. 3, got 4"),
        (torch.tensor([0, 1, -2]), r"class_labels must be in -1 \.\.\. 3, got -2"),
        (torch.tensor([0, 1]), r"class_labels must be \(3,\) integers, got shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"class_labels must be \(3,\) integers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        model(random_images(model), labels)
    with pytest.raises(ValueError, match=message):
        model.decode(random_latents(model), labels)


def test_labels_for_an_unconditional_model_are_refused():
    model = tiny_model(num_classes=0)
    with pytest.raises(ValueError, match="class_labels must be None for an unconditional model"):
        model(random_images(model), LABELS)


def test_integer_images_and_bad_latents_are_refused(model):
    with pytest.raises(ValueError, match="pixel_values must be floating point"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents must have shape \(batch, tokens=16, patch_dim=4\)"):
        model.decode(torch.zeros(1, 16, 5))
    latents = random_latents(model)
    latents[0, 3, 1] = float("inf")
    with pytest.raises(ValueError, match="latents must be finite .* 1 non-finite"):
        model.decode(latents)


@pytest.mark.parametrize("window", [1, 4, 16, None])
def test_a_scale_that_guidance_turns_negative_is_refused_whatever_the_window(window):
    model = tiny_model(seed=4)
    with torch.no_grad():
        for block in model.blocks:
            block.class_embedding.weight.mul_(4)
    latents, labels = random_latents(model), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="rule='scale' .* made a scale that is not positive"):
        model.decode(latents, labels, guidance=Guidance(10.0, "constant", rule="scale"), window=window)
    for guidance in (Guidance(10.0, "constant", rule="product"), Guidance(1.05, "constant", rule="scale")):
        expected = model.decode(latents, labels, guidance=guidance, window=1, tolerance=0)
        images = model.decode(latents, labels, guidance=guidance, window=window, tolerance=0)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)
        assert images.isfinite().all()


def test_the_blocks_that_are_not_guided_decode_as_without_guidance(model):
    latents = random_latents(model)
    plain = [patches for patches, _ in model.decode_blocks(latents, LABELS, tolerance=0)]
    every = [patches for patches, _ in model.decode_blocks(latents, LABELS, guidance=Guidance(2.0), tolerance=0)]
    first = Guidance(2.0, num_guided_blocks=1)
    steps = model.decode_blocks(latents, LABELS, guidance=first, tolerance=0)
    assert next(steps)[0].equal(every[0])
    torch.testing.assert_close(steps.send(plain[0])[0], plain[1], rtol=0, atol=1e-10)
    assert model.decode(latents, LABELS, guidance=Guidance(2.0, num_guided_blocks=3), tolerance=0).equal(
        model.unpatchify(every[2])
    )


@pytest.mark.parametrize("window", [1, 4, 16, None])
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3, -1, 2, 1])])
def test_splitting_the_batch_changes_no_image(model, window, labels):
    latents = random_latents(model, 5)
    arguments = {"guidance": Guidance(2.0), "window": window, "tolerance": 0}
    whole = model.decode(latents, labels, **arguments)
    for max_batch in (1, 2, 4):
        split = model.decode(latents, labels, max_batch=max_batch, **arguments)
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="max_batch must be None or at least 1, got 0"):
        model.decode(latents, labels, max_batch=0)

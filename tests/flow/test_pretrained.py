"""How weights begin, and what transformers and diffusers may switch on in a model."""

import pytest
import torch
from conftest import random_images, tiny_config, tiny_model

from tarflow_hf import TarFlowModel

WIDE = {"image_size": 16, "hidden_size": 256, "head_dim": 64, "num_classes": 40, "condition_dim": 2}


@pytest.fixture
def new():
    torch.manual_seed(0)
    return TarFlowModel(tiny_config(**WIDE))


def test_small_embeddings_begin_normal_with_deviation_001(new):
    for name, count in (("position_embedding", 64 * 256), ("class_embedding.weight", 40 * 256)):
        for block in new.blocks:
            numbers = block.get_parameter(name)
            assert numbers.numel() == count
            assert numbers.std().item() == pytest.approx(0.01, rel=0.05)
            assert abs(numbers.mean().item()) < 5e-4
    none = torch.cat([block.condition_embedding.no_condition.flatten() for block in new.blocks])
    assert none.std().item() == pytest.approx(0.01, rel=0.2)
    assert abs(none.mean().item()) < 2e-3


def test_linear_layers_begin_uniform_within_one_over_the_root_of_their_inputs(new):
    linear = {name: module for name, module in new.named_modules() if isinstance(module, torch.nn.Linear)}
    seen = 0
    for name, module in linear.items():
        if name.endswith("proj_out") and name.count(".") == 2:  # a block's, which begins at zero
            assert not module.weight.any()
            assert not module.bias.any()
            continue
        bound = module.in_features**-0.5
        weight = module.weight.detach()
        assert weight.abs().max().item() <= bound * 1.000001
        if weight.numel() > 1000:
            seen += 1
            assert weight.min().item() == pytest.approx(-bound, rel=0.02)
            assert weight.max().item() == pytest.approx(bound, rel=0.02)
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        if module.bias is not None and module.bias.numel() > 100:
            assert module.bias.min().item() == pytest.approx(-bound, rel=0.1)
            assert module.bias.max().item() == pytest.approx(bound, rel=0.1)
    assert seen > 10


def test_a_new_model_is_the_identity_and_its_prior_standard(new):
    images = random_images(new, 2).float()
    latents = new(images, return_dict=True)
    torch.testing.assert_close(latents.log_det, torch.zeros(2))
    torch.testing.assert_close(latents.latents.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    constant = TarFlowModel(tiny_config(volume_preserving=True))
    assert (constant.prior_variance == 1).all()


def test_what_the_model_says_of_itself_to_transformers():
    assert not TarFlowModel.accepts_loss_kwargs  # its loss is a mean already, whatever the batch is split into
    model = TarFlowModel(tiny_config())
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert TarFlowModel._supports_attention_backend


def layers_that_recompute(model):
    return [layer.gradient_checkpointing for block in model.blocks for layer in block.layers]


def test_every_layer_recomputes_unless_some_are_asked_for():
    model = tiny_model()
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert all(layers_that_recompute(model))
    model.activation_checkpointing_enable(every_n_layers=2)
    assert not all(layers_that_recompute(model))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_gradients_enter_a_frozen_model_where_checkpointing_needs_them(reentrant):
    model = tiny_model().train().requires_grad_(False)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    model.activation_checkpointing_enable(options)
    seen = []
    model.blocks[0].layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    model(random_images(model), return_dict=True)
    assert seen[0] is bool(reentrant)
    model.disable_input_require_grads()
    model.disable_gradient_checkpointing()
    seen.clear()
    model(random_images(model), return_dict=True)
    assert seen[0] is False


def test_layers_stored_narrow_compute_in_the_model_s_type():
    model = tiny_model().eval()
    images = random_images(model, 1)
    rounded = tiny_model().eval()
    for layer in (layer for block in rounded.blocks for layer in block.layers):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.bfloat16().double()
                module.bias.data = module.bias.data.bfloat16().double()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16)
    assert model.blocks[0].layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(images, return_dict=True).latents, rounded(images, return_dict=True).latents)

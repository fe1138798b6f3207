"""The learned inverse as a model: what it takes and gives, how it is saved, and which flow it belongs to."""

import json

import pytest
import torch
from conftest import random_latents, tiny_config, tiny_model
from inverse_models import tiny_inverse
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from tarflow_hf import TarFlowInverseConfig, TarFlowInverseModel
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint, same_flow
from tarflow_hf.hub.model_files import expected_shapes

LABELS = torch.tensor([0, 3, -1])


@pytest.fixture
def flow():
    return tiny_model()


@pytest.fixture
def inverse(flow):
    return tiny_inverse(flow)


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 0}, {"image_size": (8, 4), "num_channels": 3}])
def test_it_gives_a_state_for_each_block_and_the_image(overrides):
    flow = tiny_model(**overrides)
    latents = random_latents(flow)
    output = tiny_inverse(flow)(latents, LABELS if flow.config.num_classes else None, guidance_scale=2.0)
    assert [state.shape for state in output.states] == [latents.shape] * flow.config.num_blocks
    assert output.patches.shape == latents.shape
    assert output.patches.dtype == torch.float64


def test_every_token_depends_on_every_other_labels_and_guidance(flow, inverse):
    latents = random_latents(flow, 1).requires_grad_()
    for token in (0, 7, 15):
        (gradient,) = torch.autograd.grad(inverse(latents).patches[0, token].sum(), latents)
        assert (gradient.abs().sum(-1) > 0).all()
    image = inverse(latents, LABELS[:1]).patches
    assert not torch.allclose(image, inverse(latents, LABELS[1:2]).patches)
    assert not torch.allclose(image, inverse(latents, LABELS[:1], guidance_scale=3.0).patches)


def test_an_image_depends_on_its_own_row_alone(flow, inverse):
    latents, scales = random_latents(flow), torch.tensor([1.0, 2.5, 4.0])
    together = inverse(latents, LABELS, guidance_scale=scales)
    for row in range(3):
        alone = inverse(latents[[row]], LABELS[[row]], guidance_scale=float(scales[row]))
        torch.testing.assert_close(alone.patches, together.patches[[row]], rtol=0, atol=1e-12)


def test_a_condition_is_heard_where_there_is_one():
    flow = tiny_model(num_classes=0, condition_dim=2, condition_mean=[1.0, -1.0], condition_std=[2.0, 0.5])
    inverse, latents = tiny_inverse(flow), random_latents(flow, 2)
    condition = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    given = inverse(latents, condition=condition).patches
    none = inverse(latents).patches
    masked = inverse(latents, condition=condition, condition_mask=torch.tensor([True, False])).patches
    assert not torch.allclose(given[0], none[0])
    torch.testing.assert_close(masked, torch.stack([given[0], none[1]]), rtol=0, atol=1e-12)


def test_eager_attention_and_activation_checkpointing_change_nothing(flow, inverse):
    latents = random_latents(flow)

    def gradients():
        inverse.zero_grad()
        inverse(latents, LABELS, guidance_scale=2.0).patches.square().sum().backward()
        return [parameter.grad.clone() for parameter in inverse.layers.parameters()]

    expected = gradients()
    inverse.set_attn_implementation("eager")
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    inverse.train().activation_checkpointing_enable()
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_it_comes_back_from_a_folder_through_the_auto_classes_too(tmp_path, flow, inverse):
    inverse.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TarFlowInverseConfig
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is TarFlowInverseModel
    assert not loaded.training
    assert loaded.config.flow.to_dict() == inverse.config.flow.to_dict()
    latents = random_latents(flow)
    assert loaded(latents, LABELS).patches.equal(inverse(latents, LABELS).patches)
    assert loaded(latents, LABELS).states[0].equal(inverse(latents, LABELS).states[0])


def test_the_shapes_expected_of_its_weights_are_those_it_has(inverse):
    shapes = {name: tuple(tensor.shape) for name, tensor in inverse.state_dict().items()}
    assert expected_shapes(inverse.config, "config.json") == shapes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("layers.3.mlp_norm.weight"), "its weights lack 1 tensors, among them layers.3.mlp"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 tensors that a model of its config.json has not"),
        (lambda state: state["proj_out.bias"].fill_(float("nan")), "4 of 4 numbers of proj_out.bias are not finite"),
    ],
)
def test_damaged_weights_are_named(tmp_path, inverse, damage, message):
    inverse.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=message):
        TarFlowInverseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1000}, "num_layers=1000, and the weights have no layers.4"),
        ({"hidden_size": 32}, "must be 4 x 32, got 4 x 16"),
        ({"num_layer": 4}, "no argument 'num_layer', did you mean 'num_layers'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tmp_path, inverse, change, message):
    inverse.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(OSError, match=message):
        TarFlowInverseModel.from_pretrained(tmp_path)


def test_the_fingerprint_tells_flows_apart_in_every_dtype():
    flow, other = tiny_model(), tiny_model(seed=1)
    ours = flow_fingerprint(flow.blocks)
    assert len(ours) == flow.config.num_blocks
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_flow(ours, flow_fingerprint(tiny_model().to(dtype).blocks))
    assert not same_flow(ours, flow_fingerprint(other.blocks))
    flow.blocks[1].proj_in.weight.data += 0.05 * torch.randn(flow.blocks[1].proj_in.weight.shape).to(flow.dtype)
    assert not same_flow(ours, flow_fingerprint(flow.blocks))


def test_parts_of_the_layers_are_even():
    for num_layers in (4, 7, 12):
        config = TarFlowInverseConfig(flow=tiny_config(), hidden_size=16, head_dim=8, num_layers=num_layers)
        ends = [*config.state_layers, num_layers]
        sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
        assert max(sizes) - min(sizes) <= 1 <= min(sizes)

"""What is cheap is made again for the backward pass: the same numbers to the bit, and less memory."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, tiny_model
from peft import LoraConfig
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from tarflow_hf.flow.blocks import TarFlowLayer
from tarflow_hf.flow.remaking import as_read, remaking
from tarflow_hf.training.peak_memory import PeakMemory


def keeping_all():
    """Other hooks of saved tensors, beside which nothing is made again."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def gradients(model, images, labels=None, *, around=nullcontext):
    """Of the loss, by the names of the parameters that it depends on."""
    model.zero_grad(set_to_none=True)
    with around():
        loss = model(images, labels).loss
    loss.backward()
    return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def assert_identical(found, expected):
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.fixture
def kept():
    """A function that gives the bytes that a layer's forward pass keeps for the backward pass, per row and channel."""

    def count(layer, hidden_states, *, around=nullcontext):
        with PeakMemory() as memory:
            with around():
                output = layer(hidden_states)
            live = memory.live
        assert output.requires_grad
        return live / hidden_states.numel()

    return count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [{}, {"num_classes": 3}, {"noise_conditioning": True, "noise_range": [0.1, 0.5]}])
def test_gradients_are_the_same_to_the_bit(dtype, changed):
    model = tiny_model(**changed).to(dtype).train()
    images = random_images(model).to(torch.promote_types(dtype, torch.float32))
    labels = torch.tensor([0, 1, 2]) if "num_classes" in changed else None
    given = {} if "noise_range" not in changed else {"noise_level": torch.full((3,), 0.2, dtype=images.dtype)}

    def called(images, labels):
        return model(images, labels, **given)

    called.zero_grad, called.named_parameters = model.zero_grad, model.named_parameters
    assert_identical(gradients(called, images, labels), gradients(called, images, labels, around=keeping_all))


def test_under_autocast_too():
    model = tiny_model(dtype=torch.float32).train()
    images = random_images(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, images)
        assert_identical(found, gradients(model, images, around=keeping_all))


def test_with_adapters_too():
    model = tiny_model(dtype=torch.float32).train()
    images = random_images(model).float()
    model.add_adapter(LoraConfig(target_modules=["up_proj", "down_proj", "qkv_proj"], lora_dropout=0.2, r=2))
    found = []
    for around in (nullcontext, keeping_all):
        torch.manual_seed(0)
        found.append({name: part.clone() for name, part in gradients(model, images, around=around).items()})
    assert_identical(*found)


@pytest.mark.parametrize(
    ("dtype", "autocast", "most"),
    [
        # numbers of a channel: two of the residual stream, q, k, v, attention's result, four before the GELU
        (torch.float32, False, 4 * (2 + 3 + 1 + 4 + 0.5)),
        (torch.bfloat16, False, 2 * 4 + 2 * (3 + 1 + 4) + 1),
        (torch.float32, True, 2 * 4 + 2 * (3 + 1 + 4) + 1),
    ],
)
def test_a_layer_keeps_ten_numbers_of_a_channel_in_place_of_sixteen(kept, dtype, autocast, most):
    torch.manual_seed(0)
    layer = TarFlowLayer(tiny_model(hidden_size=64).config, 0).to(dtype)
    hidden_states = torch.randn(8, 32, 64, requires_grad=True)
    layer(hidden_states).sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(hidden_states)  # the weights that autocast casts are not the layer's to keep
        found, whole = kept(layer, hidden_states), kept(layer, hidden_states, around=keeping_all)
    assert found <= most
    assert whole >= found + (6 if dtype == torch.float32 and not autocast else 5)


def test_gradients_have_gradients():
    torch.manual_seed(0)
    model = tiny_model(hidden_size=64)
    model.set_attn_implementation("eager")  # PyTorch's fused attention has no second derivatives
    layer = TarFlowLayer(model.config, 0).double()
    hidden_states = torch.randn(1, 3, 64, dtype=torch.float64, requires_grad=True)
    asked = [hidden_states, layer.attention_norm.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
    found = []
    for around in (nullcontext, keeping_all):
        with around():
            output = layer(hidden_states)
            first = torch.autograd.grad(output.sin().sum(), asked, create_graph=True)
            found.append(torch.autograd.grad(sum(part.square().sum() for part in first), asked))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def made_and_read(*, change=None):
    """A GELU that a product reads, of inputs that are changed after it."""
    torch.manual_seed(0)
    weight = torch.randn(3, 8, requires_grad=True)
    inputs = torch.randn(4, 8, requires_grad=True) * 1
    activated = F.gelu(inputs)
    with remaking(activated):
        product = F.linear(activated, weight)
    if change is not None:
        change(inputs)
    return product, weight, activated.detach().clone()


def test_the_graph_stays_where_it_is_to_be_used_again():
    product, weight, activated = made_and_read()
    for _ in range(2):
        (found,) = torch.autograd.grad(product.sum(), weight, retain_graph=True)
        assert torch.equal(found, activated.sum(0).expand(3, 8))


def test_a_second_backward_pass_is_refused_as_ever():
    product, weight, _ = made_and_read()
    torch.autograd.grad(product.sum(), weight)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(product.sum(), weight)


def test_inputs_that_were_written_to_are_refused_as_ever():
    product, weight, _ = made_and_read(change=lambda inputs: inputs.mul_(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(product.sum(), weight)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_keep_what_they_kept(reentrant):
    """The same gradients, for less memory than without: nothing holds what a checkpoint lets go."""
    model = tiny_model(dtype=torch.float32).train()
    images, peaks, found = random_images(model, batch=16).float(), [], []
    for change in (
        partial(model.activation_checkpointing_enable, {"use_reentrant": reentrant}),
        model.activation_checkpointing_disable,
    ):
        change()
        with PeakMemory() as memory:
            found.append({name: part.clone() for name, part in gradients(model, images).items()})
        peaks.append(memory.peak)
    assert_identical(*found)
    assert peaks[0] < 0.8 * peaks[1]


def test_saved_tensors_may_be_kept_elsewhere():
    model = tiny_model(dtype=torch.float32).train()
    images = random_images(model).float()
    assert_identical(gradients(model, images, around=save_on_cpu), gradients(model, images))


def test_functions_of_torch_func_find_nothing_in_the_way():
    layer = TarFlowLayer(tiny_model().config, 0).double()
    torch.manual_seed(0)
    hidden_states = torch.randn(2, 3, layer.attention_norm.weight.numel(), dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda given: layer(given).sum((0, 1)), hidden_states)
    found = torch.func.jacrev(lambda given: layer(given).sum((0, 1)))(hidden_states)
    torch.testing.assert_close(found, expected)


def test_graphs_of_a_compiler_are_whole():
    layer = TarFlowLayer(tiny_model().config, 0)
    torch.manual_seed(0)
    hidden_states = torch.randn(2, 3, layer.attention_norm.weight.numel(), requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(called(hidden_states).sin().sum(), hidden_states) for called in (compiled, layer)]
    torch.testing.assert_close(*found)


class OtherNorm(nn.Module):
    """Root mean square norm, which is none of those that are made again."""

    def forward(self, inputs):
        return inputs / inputs.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("norm", [nn.LayerNorm(32, eps=0.1), OtherNorm()])
def test_norms_that_a_user_puts_in_are_kept_or_made_as_theirs(norm):
    model = tiny_model(hidden_size=32, head_dim=8, dtype=torch.float32).train()
    images = random_images(model).float()
    for layer in model.blocks[0].layers:
        layer.attention_norm, layer.mlp_norm = copy.deepcopy(norm), copy.deepcopy(norm)
    assert_identical(gradients(model, images), gradients(model, images, around=keeping_all))


def test_what_was_not_made_is_kept():
    inputs = torch.ones(4, 8, requires_grad=True)
    for given in (inputs, inputs.detach(), inputs * 2, F.gelu(inputs[:0]), F.layer_norm(inputs, (8,))):
        assert type(remaking(given)) is nullcontext
    assert type(remaking(F.layer_norm(inputs, (8,)), 1e-5)) is not nullcontext
    assert as_read(inputs.detach()).dtype == torch.float32

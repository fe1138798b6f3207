"""What is cheap is made again for the backward pass: the same gradients for less memory, where nothing stands by."""

import copy
import gc
import math
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import random_images, tiny_model
from peft import LoraConfig
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from tarflow_hf.flow import products, remaking
from tarflow_hf.flow.blocks import TarFlowLayer, TarFlowLayerNorm, TarFlowMLP
from tarflow_hf.flow.products import call_linear
from tarflow_hf.flow.remaking import origin, remember
from tarflow_hf.training.peak_memory import PeakMemory

WIDTH = 64


class Remaking:
    """Counts the products whose inputs are made again, of however few numbers; `off()` keeps all inputs."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.count, whole = monkeypatch, 0, products._remade_product
        monkeypatch.setattr(remaking, "_LEAST", 1)

        def counted(*arguments):
            self.count += 1
            return whole(*arguments)

        monkeypatch.setattr(products, "_remade_product", counted)

    def off(self):
        self.monkeypatch.setattr(remaking, "_LEAST", math.inf)


@pytest.fixture
def remade(monkeypatch):
    return Remaking(monkeypatch)


def new_layer(*, dtype=torch.float64, attention="sdpa"):
    torch.manual_seed(0)
    model = tiny_model(hidden_size=WIDTH, mlp_ratio=4)
    model.set_attn_implementation(attention)
    return TarFlowLayer(model.config, 0).to(dtype)


def stream(*, dtype=torch.float64):
    """(2, 5, width) inputs of a layer that want gradients."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(called, parameters, *given):
    """Of a sum that weighs every number otherwise, by the parameters that it depends on."""
    output = called(*given)
    output = output.loss if hasattr(output, "loss") else output
    loss = (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).sum()
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


def assert_same(found, expected, *, rtol=1e-9, atol=1e-12):
    assert any(part is not None for part in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def beside_keeping_all(remade, called, parameters, *given, count, **tolerances):
    """Checks gradients against those where all is kept, and how many products made their inputs again."""
    parameters = list(parameters)
    found = gradients(called, parameters, *given)
    assert remade.count == count
    remade.off()
    assert_same(found, gradients(called, parameters, *given), **tolerances)
    assert remade.count == count


@pytest.mark.parametrize("changed", [{}, {"num_classes": 3}, {"volume_preserving": True}])
def test_gradients_of_a_model_are_those_of_keeping_all(remade, changed):
    model = tiny_model(num_blocks=2, layers_per_block=2, **changed).train()
    labels = torch.tensor([0, 1, -1]) if model.config.num_classes else None
    images = random_images(model).requires_grad_()
    beside_keeping_all(remade, model, [images, *model.parameters()], images, labels, count=2 * 2 * 3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_narrow_types_and_autocast(remade, weights, autocast):
    layer, given = new_layer(dtype=weights), stream(dtype=torch.float32)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        near = {"rtol": 0.02, "atol": 0.05} if autocast or weights != torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
        beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=3, **near)


def test_autocast_leaves_wider_types_alone(remade):
    layer, given = new_layer(), stream()
    with torch.autocast("cpu", torch.bfloat16):
        beside_keeping_all(remade, layer, layer.parameters(), given, count=0)


@pytest.mark.parametrize(
    ("dtype", "most", "saved"),
    [
        # numbers of a channel: two of the residual stream, q, k, v, attention's result, four before the GELU
        (torch.float32, 4 * (2 + 3 + 1 + 4 + 0.2), 4 * 5.9),
        (torch.bfloat16, 4 * 2 + 2 * (3 + 1 + 4) + 1, 2 * 5.9),
    ],
)
def test_a_layer_keeps_ten_numbers_of_a_channel_in_place_of_sixteen(remade, dtype, most, saved):
    layer, live = new_layer(dtype=dtype), []
    given = torch.randn(16, 64, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(2):
        with PeakMemory() as memory:
            output = layer(given)
            live.append((memory.live - output.nbytes) / given.numel())  # the next layer's, or the loss's, to keep
        remade.off()
    assert live[0] <= most
    assert live[1] - live[0] >= saved


def test_what_is_kept_under_autocast(remade):
    """The norms are float32 then, so that the copies which products read were kept beside them."""
    layer, live = new_layer(dtype=torch.float32), []
    given = torch.randn(16, 64, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            layer(given)  # casts weights, which autocast keeps
            with PeakMemory() as memory:
                output = layer(given)
                live.append((memory.live - output.nbytes) / given.numel())
        remade.off()
    assert live[1] - live[0] >= 2 * 5  # two norms and the activation, but for copies of weights


def test_adapters_and_what_stands_in_a_linear_layers_place_are_left_alone(remade):
    model = tiny_model(num_blocks=1, layers_per_block=1).train()
    model.add_adapter(LoraConfig(target_modules=["up_proj", "down_proj", "qkv_proj"], r=2, init_lora_weights=False))
    trained = [part for part in model.parameters() if part.requires_grad]
    beside_keeping_all(remade, model, trained, random_images(model), count=0)


def test_frozen_weights_keep_nothing_and_pay_nothing(remade):
    layer, given = new_layer().requires_grad_(False), stream()
    beside_keeping_all(remade, layer, [given], given, count=0)


def test_layers_without_biases(remade):
    layer, given = new_layer(), stream()
    layer.mlp.down_proj = nn.Linear(layer.mlp.down_proj.in_features, WIDTH, bias=False).double()
    beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=3)


def test_gradients_have_gradients(remade):
    layer, given = new_layer(attention="eager"), stream()  # PyTorch's fused attention has no second derivatives
    asked = [given, *layer.parameters()]

    def first(given):
        found = gradients_of_sines(layer, given, asked)
        return sum(part.square().sum() for part in found)

    beside_keeping_all(remade, first, asked, given, count=3, rtol=1e-7, atol=1e-9)


def gradients_of_sines(layer, given, asked):
    return torch.autograd.grad(layer(given).sin().sum(), asked, create_graph=True)


def read_once(*, change=None):
    """A product of a GELU, of inputs or of a weight that are changed after it."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 3, bias=False)
    inputs = torch.randn(4, 8, requires_grad=True) * 1
    activated = remember(F.gelu(inputs), F.gelu, inputs)
    product = call_linear(layer, activated)
    if change is not None:
        with torch.no_grad():
            change(inputs, layer.weight)
    return product, layer.weight, activated.detach().clone()


def test_the_graph_stays_where_it_is_to_be_used_again(remade):
    product, weight, activated = read_once()
    for _ in range(2):
        (found,) = torch.autograd.grad(product.sum(), weight, retain_graph=True)
        torch.testing.assert_close(found, activated.sum(0).expand(3, 8))
    assert remade.count == 1


def test_a_second_backward_pass_is_refused_as_ever(remade):
    product, weight, _ = read_once()
    torch.autograd.grad(product.sum(), weight)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(product.sum(), weight)


def test_what_comes_out_may_be_written_to(remade):
    mlp, given = new_layer().mlp, stream()
    beside_keeping_all(remade, lambda given: mlp(given).mul_(2), [given, *mlp.parameters()], given, count=1)


@pytest.mark.parametrize("changed", [0, 1])
def test_inputs_and_weights_that_were_written_to_are_refused_as_ever(remade, changed):
    product, weight, _ = read_once(change=lambda *parts: parts[changed].mul_(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(product.sum(), weight)


def test_nothing_outlives_a_forward_pass(remade):
    """Without a backward pass and without Python's collector of cycles."""
    gc.collect()
    gc.disable()
    try:
        layer = new_layer()
        watched = weakref.ref(layer.mlp.up_proj.weight)
        layer(stream())
        assert remade.count == 3
        del layer
        assert watched() is None
    finally:
        gc.enable()


def test_values_that_a_hook_writes_to_are_kept(remade):
    layer, given = new_layer(), stream()

    def double(module, inputs):
        with torch.no_grad():
            inputs[0].mul_(2)

    for module in (layer.attention, layer.mlp):
        module.register_forward_pre_hook(double)
    beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=1)


def test_values_that_a_hook_puts_in_are_kept(remade):
    layer, given = new_layer(), stream()
    layer.mlp_norm.register_forward_hook(lambda norm, inputs, output: F.layer_norm(inputs[0], (WIDTH,), eps=0.5))
    beside_keeping_all(remade, layer, [given, *layer.attention.parameters()], given, count=2)


def test_products_that_a_user_puts_in_are_theirs(remade):
    layer, given = new_layer(), stream()
    down = layer.mlp.down_proj
    layer.mlp.down_proj = nn.Sequential(nn.Hardtanh(inplace=True), down)
    beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=2)


def test_a_product_that_is_watched_is_pytorchs(remade):
    layer, given = new_layer(), stream()
    seen = []
    layer.mlp.up_proj.register_forward_hook(lambda *given: seen.append(given))
    beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=2)
    assert len(seen) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_keep_what_they_kept(remade, reentrant):
    """The same gradients, for less memory than without: nothing holds what a checkpoint lets go."""
    model = tiny_model(dtype=torch.float32).train()
    images, peaks, found = random_images(model, batch=16).float(), [], []
    for change in (
        partial(model.activation_checkpointing_enable, {"use_reentrant": reentrant}),
        model.activation_checkpointing_disable,
    ):
        change()
        model.zero_grad()
        with PeakMemory() as memory:
            model(images).loss.backward()
        peaks.append(memory.peak)
        found.append([part.grad for part in model.parameters()])
    assert_same(*found, rtol=1e-4, atol=1e-5)
    assert peaks[0] < 0.9 * peaks[1]


@pytest.mark.parametrize("part", ["attention_norm", "mlp_norm", "attention", "mlp"])
def test_a_checkpoint_around_a_part(remade, part):
    layer, given = new_layer(), stream()
    expected = gradients(layer, layer.parameters(), given)
    setattr(layer, part, checkpoint_wrapper(getattr(layer, part)))
    assert_same(gradients(layer, layer.parameters(), given), expected)


def test_saved_tensors_may_be_kept_elsewhere(remade):
    layer, given = new_layer(), stream()

    def called(given):
        with save_on_cpu():
            return layer(given)

    beside_keeping_all(remade, called, layer.parameters(), given, count=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's rules of forward mode
def test_functions_of_torch_func_and_forward_mode_find_nothing_in_the_way(remade):
    layer, given = new_layer(attention="eager"), stream().detach()
    expected = torch.autograd.functional.jvp(lambda given: layer(given).sum((0, 1)), given, torch.ones_like(given))[1]
    found = torch.func.jacrev(lambda given: layer(given).sum((0, 1)))(given)
    torch.testing.assert_close(found.flatten(1).sum(1), expected)
    _, found = torch.func.jvp(lambda given: layer(given).sum((0, 1)), (given,), (torch.ones_like(given),))
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        output = layer(forward_ad.make_dual(given, torch.ones_like(given))).sum((0, 1))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_graphs_of_a_compiler_are_whole(remade, part):
    layer, given = new_layer(dtype=torch.float32), stream(dtype=torch.float32)
    expected = gradients(layer, layer.parameters(), given)
    called = layer if part == "layer" else layer.mlp
    called.compile(backend="aot_eager", fullgraph=True)
    assert_same(gradients(layer, layer.parameters(), given), expected, rtol=1e-4, atol=1e-5)


def test_shards_of_single_parts(remade):
    """FSDP frees the norms' weights before the gradients of the products that read them are wanted."""
    layer, given = new_layer(), stream()
    expected = gradients(layer, layer.parameters(), given)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = copy.deepcopy(layer)
        for part in (sharded.attention_norm, sharded.mlp_norm, sharded):
            fully_shard(part)
        output = sharded(given.detach())
        (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        found = [part.grad.full_tensor() for part in sharded.parameters()]
    finally:
        dist.destroy_process_group()
    assert remade.count == 6
    assert_same(found, expected)


class OtherNorm(nn.Module):
    """Root mean square norm, which is none of those that are made again."""

    def forward(self, inputs):
        return inputs / inputs.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH, eps=0.1), OtherNorm()])
def test_norms_that_a_user_puts_in_are_kept(remade, norm):
    layer, given = new_layer(), stream()
    layer.attention_norm, layer.mlp_norm = copy.deepcopy(norm).double(), copy.deepcopy(norm).double()
    beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=1)


def test_a_norm_of_another_epsilon(remade):
    layer, given = new_layer(), stream()
    layer.mlp_norm.eps = 0.3
    beside_keeping_all(remade, layer, [given, *layer.parameters()], given, count=3)


def test_what_pays_nothing_is_not_remembered():
    inputs = torch.randn(2**15, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for given in (inputs, inputs[1:], inputs.detach()):
        made = remember(F.gelu(given), F.gelu, given)
        assert (origin(made) is not None) == (given is inputs)
    with torch.no_grad():
        assert origin(remember(F.gelu(inputs), F.gelu, inputs)) is None
    norm, mlp = TarFlowLayerNorm(WIDTH), TarFlowMLP(tiny_model(hidden_size=WIDTH).config)
    assert origin(norm(torch.ones(1, 1, WIDTH))) is None
    assert origin(norm(torch.ones(8, 64, WIDTH))) is not None
    assert mlp(torch.ones(1, 1, WIDTH)).requires_grad

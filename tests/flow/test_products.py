"""Products of linear layers by oneDNN: the numbers and gradients of PyTorch's own, and only where they are plain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tarflow_hf import TarFlowConfig, TarFlowModel
from tarflow_hf.flow import products
from tarflow_hf.flow.products import PackedLinear, call_linear, linear, onednn_is_faster

pytestmark = pytest.mark.usefixtures("onednn_chosen")
ROWS, INSIDE, OUTSIDE = 512, 48, 96  # above the least size of a product, and all different


class Products(TorchDispatchMode):
    """Sees the products of oneDNN by the shapes of their first factors."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    @property
    def count(self):
        return len(self.shapes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def parts(*, seed=0, inside=INSIDE, outside=OUTSIDE):
    """Inputs of two dimensions of rows, a weight and a bias, which want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, ROWS // 2, inside), (outside, inside), (outside,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("sizes", [(INSIDE, OUTSIDE), (OUTSIDE, INSIDE)])
def test_numbers_and_gradients_are_those_of_torch(with_bias, sizes):
    inputs, weight, bias = parts(inside=sizes[0], outside=sizes[1])
    given = (inputs, weight, bias if with_bias else None)
    asked = [part for part in given if part is not None]
    results = []
    for function in (linear, F.linear):
        with Products() as seen:
            output = function(*given)
            gradients = torch.autograd.grad(output.sin().sum(), asked)
        assert seen.count == (3 if function is linear else 0)
        results.append((output, *gradients))
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_asked_for_are_computed(wanted):
    given = [part.detach().requires_grad_(index in wanted) for index, part in enumerate(parts())]
    with Products() as seen:
        linear(*given).square().sum().backward()
    assert seen.count == 1 + sum(index < 2 for index in wanted)
    assert [part.grad is not None for part in given] == [index in wanted for index in range(3)]


def test_gradients_have_gradients():
    """Against PyTorch: the gradient of the squared gradient with regard to inputs and weight."""
    found = []
    for function in (linear, F.linear):
        given = parts(seed=1)
        first = torch.autograd.grad(function(*given).sin().sum(), given[:2], create_graph=True)
        found.append(torch.autograd.grad(sum(part.square().mean() for part in first), given))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_narrower_factor_is_the_one_that_is_copied():
    """Which of gradient and rows comes first in the product that gives the weight's gradient."""
    for inside, outside in ((INSIDE, OUTSIDE), (OUTSIDE, INSIDE)):
        inputs, weight, _ = parts(inside=inside, outside=outside)
        output = linear(inputs.detach(), weight, None)
        with Products() as seen:
            output.sum().backward()
        assert seen.shapes == [(INSIDE, ROWS)]


def test_nothing_is_kept_for_gradients_that_nobody_asks_for():
    inputs, weight, bias = parts()
    with torch.no_grad():
        assert linear(inputs, weight, bias).grad_fn is None
    assert linear(inputs.detach(), weight.detach(), bias.detach()).grad_fn is None


def test_rows_need_not_lie_in_order():
    inputs, weight, bias = (part.detach() for part in parts())
    across = inputs.flatten(0, 1).t().contiguous().t()
    with Products() as seen:
        torch.testing.assert_close(linear(across, weight, bias), F.linear(across, weight, bias), rtol=2e-5, atol=2e-4)
        torch.testing.assert_close(
            linear(across, weight.t().contiguous().t(), bias), F.linear(across, weight, bias), rtol=2e-5, atol=2e-4
        )
    assert seen.count == 2


class Subclass(torch.Tensor):
    """A tensor of another class, as quantised and distributed ones are."""


OTHERS = {
    "small": lambda inputs, weight, bias: linear(inputs[:, :2], weight, bias),
    "double": lambda *given: linear(*(part.double() for part in given)),
    "half": lambda *given: linear(*(part.bfloat16() for part in given)),
    "subclass": lambda inputs, weight, bias: linear(inputs, weight.as_subclass(Subclass), bias),
    "vmap": lambda inputs, weight, bias: torch.vmap(lambda row: linear(row, weight, bias))(inputs),
    "grad": lambda inputs, weight, bias: torch.func.grad(lambda w: linear(inputs, w, bias).sum())(weight),
    "jvp": lambda inputs, weight, bias: torch.func.jvp(lambda row: linear(row, weight, bias), (inputs,), (inputs,))[1],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of PyTorch's own, in forward mode
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_is_left_to_torch(name):
    given = [part.detach() for part in parts()]
    with Products() as seen:
        OTHERS[name](*given)
    assert seen.count == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_left_to_torch():
    inputs, weight, bias = (part.detach() for part in parts())
    with Products() as seen, torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs, torch.ones_like(inputs))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias)).tangent
    assert seen.count == 0
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(inputs), weight), rtol=2e-5, atol=2e-4)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_autocast_and_the_switch_of_the_library_are_heeded():
    inputs, weight, bias = (part.detach() for part in parts())
    with Products() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(inputs, weight, bias).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            linear(inputs, weight, bias)
    assert seen.count == 0


def test_where_mkl_is_as_fast_nothing_changes(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    with Products() as seen:
        linear(*parts()).sum().backward()
    assert seen.count == 0


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [("vendor_id : AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_the_library_is_chosen_by_the_processor(monkeypatch, processor, capability, expected):
    monkeypatch.setattr(products, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_is_faster.__wrapped__() is (expected and torch.backends.mkl.is_available())


def test_graphs_hold_torchs_own_products(monkeypatch):
    monkeypatch.undo()  # what chooses the library is no part of a graph
    inputs, weight, bias = (part.detach() for part in parts())
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs, weight, bias), F.linear(inputs, weight, bias))


def test_torchs_own_layers_are_taken_and_others_are_called():
    inputs, weight, bias = parts()
    layer = nn.Linear(INSIDE, OUTSIDE)
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    expected = F.linear(inputs, weight, bias)

    class Other(nn.Linear):
        pass

    other = Other(INSIDE, OUTSIDE)
    other.load_state_dict(layer.state_dict())
    for called, count in ((layer, 1), (other, 0)):
        with Products() as seen:
            torch.testing.assert_close(call_linear(called, inputs), expected, rtol=2e-5, atol=2e-4)
        assert seen.count == count


WATCHERS = {
    "hook": lambda layer, seen: layer.register_forward_hook(lambda *_: seen.append(1)),
    "pre-hook": lambda layer, seen: layer.register_forward_pre_hook(lambda *_: seen.append(1)),
    "gradient hook": lambda layer, seen: layer.register_full_backward_hook(lambda *_: seen.append(1)),
    "gradient pre-hook": lambda layer, seen: layer.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "forward": lambda layer, seen: setattr(layer, "forward", lambda inputs: seen.append(1) or F.relu(inputs)),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_who_watches_a_layer_is_called(name):
    layer, seen = nn.Linear(INSIDE, OUTSIDE), []
    WATCHERS[name](layer, seen)
    call_linear(layer, parts()[0]).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_what_is_set_on_torchs_class_is_called(monkeypatch, name):
    monkeypatch.setattr(nn.Linear, name, lambda self, inputs: inputs)
    inputs = parts()[0]
    assert call_linear(nn.Linear(INSIDE, OUTSIDE), inputs) is inputs


@pytest.mark.parametrize("packed", [False, True])
def test_a_bias_with_gaps_is_read_as_it_stands(packed):
    inputs, weight, _ = (part.detach() for part in parts())
    biases = [torch.randn(2 * OUTSIDE)[::2], torch.randn(1).expand(OUTSIDE), torch.tensor(2.0), torch.randn(1)]
    for bias in biases:
        with torch.no_grad():
            if packed:
                assert not PackedLinear.pays(weight, bias, ROWS)
            else:
                assert torch.equal(linear(inputs, weight, bias), F.linear(inputs, weight, bias))


WRONG = {
    "width": lambda inputs, weight, bias: (inputs[..., 1:], weight, bias),
    "bias": lambda inputs, weight, bias: (inputs, weight, bias[1:]),
    "bias of another type": lambda inputs, weight, bias: (inputs, weight, bias.bfloat16()),
    "bias of another device": lambda inputs, weight, bias: (inputs, weight, torch.empty(OUTSIDE, device="meta")),
    "weight of three dimensions": lambda inputs, weight, bias: (inputs, weight.view(OUTSIDE, 2, -1), bias),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_as_torch_does(name):
    given = WRONG[name](*(part.detach() for part in parts()))
    with pytest.raises(RuntimeError) as expected:
        F.linear(*given)
    with pytest.raises(type(expected.value)) as found:
        linear(*given)
    assert str(found.value) == str(expected.value)


def test_one_row_without_a_dimension_of_rows():
    inputs, weight, bias = (part.detach() for part in parts(inside=1500, outside=1500))
    given = [part.requires_grad_() for part in (inputs[0, 0].clone(), weight / 1500**0.5, bias)]
    with Products() as seen:
        found = torch.autograd.grad(linear(*given).sin().sum(), given)
    expected = torch.autograd.grad(F.linear(*given).sin().sum(), given)
    assert seen.count == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-4)


def test_what_comes_out_may_be_written_to():
    """As adapters and hooks do."""
    inputs, weight, bias = parts()
    linear(inputs, weight, bias).mul_(2).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((OUTSIDE,), 2.0 * ROWS))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_no_more_is_kept_than_the_gradients_need(wanted):
    """What they do not need may be written to before they are computed, or come from torch's inference mode."""
    given = [part.detach().requires_grad_(index == wanted) for index, part in enumerate(parts())]
    output = linear(*given)
    with torch.no_grad():
        given[min(wanted, 1)].add_(1)
    output.sum().backward()
    if wanted == 2:
        with torch.inference_mode():
            inputs = torch.randn(2, ROWS // 2, INSIDE)
        linear(inputs, given[1], given[2]).sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_under_vmap(create_graph):
    inputs, weight, bias = parts()
    directions = torch.randn(3, 2, ROWS // 2, OUTSIDE, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (linear, F.linear):
        output = function(inputs, weight, bias)
        pull = torch.vmap(lambda v, o=output: torch.autograd.grad(o, inputs, v, create_graph=create_graph)[0])
        found.append(pull(directions))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-4)


def test_graphs_of_any_batch_hold_no_condition_on_it():
    model = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=1)).eval()
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=2048)}}
    exported = torch.export.export(model, (torch.rand(8, 1, 8, 8),), dynamic_shapes=sizes, strict=True)
    assert exported.module()(torch.rand(300, 1, 8, 8)).latents.shape[0] == 300


def test_a_symbolic_trace_finds_the_layers():
    mlp = tiny_model().blocks[0].layers[0].mlp
    traced = torch.fx.symbolic_trace(mlp)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["up_proj", "down_proj"]


def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(*parts()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * ROWS * INSIDE * OUTSIDE


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_training_step_is_that_of_torchs_products():
    """Losses and gradients of a model whose layers are large enough, and its activations recomputed."""
    config = TarFlowConfig(image_size=16, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=2)
    torch.manual_seed(0)
    model = TarFlowModel(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    other, images = copy.deepcopy(model), torch.rand(8, 1, 16, 16) * 2 - 1
    model.activation_checkpointing_enable()
    with Products() as seen:
        loss = model(images).loss
        loss.backward()
    assert seen.count > 2 * 4 * 2 * 2
    with torch.backends.mkldnn.flags(enabled=False):
        expected = other(images).loss
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_flow_is_made_of_torchs_own_layers():
    layers = [part for part in tiny_model(num_classes=2).modules() if isinstance(part, nn.Linear)]
    assert layers
    assert all(type(part) is nn.Linear for part in layers)

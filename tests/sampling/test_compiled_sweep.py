"""Sweeps of fixed shapes, one at a time: what they read, solve and leave, uncompiled; what is a graph of its own."""

import copy
import pickle

import pytest
import torch
from conftest import random_latents, tiny_model
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

from tarflow_hf import Guidance
from tarflow_hf.flow.sampling import compiled
from tarflow_hf.flow.sampling.compiled import CompiledSweep, LooseBiases, owned
from tarflow_hf.flow.sampling.solver import solve

BATCH, DIM = 2, 3
LABELS = torch.tensor([0, 3])


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def halves(read, start):
    """Each token is its latent and half of the token before."""
    return 0.5 * read, torch.zeros_like(read)


def system(num_tokens):
    """Latents, their solution, and tokens that are no solution anywhere."""
    shape = (BATCH, num_tokens, DIM)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = latents.clone()
    for place in range(1, num_tokens):
        solution[:, place] += 0.5 * solution[:, place - 1]
    return latents, solution, latents + 7.0


def swept(sweep, tokens, latents, solved, width, predict=halves):
    with torch.compiler.set_stance("force_eager"):
        return sweep(predict, tokens, latents, solved, width, False)


@pytest.mark.parametrize(("wanted", "width"), [(1, 1), (2, 4), (6, 4), (7, 16), (24, 16), (25, 48), (49, 48)])
def test_windows_are_rounded_to_a_width(wanted, width):
    assert CompiledSweep().width(wanted, num_tokens=49) == width


@pytest.mark.parametrize(
    ("layers_per_graph", "depth", "run"), [(1, 1, 1), (4, 1, 4), (16, 5, 3), (8, 2, 4), (8, 9, 1)]
)
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 6, 12])
def test_where_one_token_is_wanted_several_are_solved_or_those_that_are_left(num_tokens, layers_per_graph, depth, run):
    def predict(read, start):
        return halves(read, start)

    predict.num_layers = depth
    latents, solution, guess = system(num_tokens)
    for solved in range(1, num_tokens):
        tokens = torch.cat([solution[:, :solved], guess[:, solved:]], 1)
        accepted, seen = swept(CompiledSweep({}, layers_per_graph), tokens, latents, solved, 1, predict)
        assert (accepted, seen) == (min(run, num_tokens - solved), None)
        assert tokens[:, : solved + accepted].equal(solution[:, : solved + accepted])
        assert tokens[:, solved + accepted :].equal(guess[:, solved + accepted :])


@pytest.mark.parametrize(("num_tokens", "width"), [(3, 2), (5, 4), (6, 4), (12, 4), (17, 16), (20, 16)])
def test_a_window_is_updated_at_once_and_begins_earlier_at_the_end(num_tokens, width):
    latents, solution, guess = system(num_tokens)
    for solved in range(1, num_tokens):
        stop = min(solved + width, num_tokens)
        before = torch.cat([solution[:, :solved], guess[:, solved:]], 1)
        tokens = before.clone()
        accepted, seen = swept(CompiledSweep(), tokens, latents, solved, width)
        expected = before.clone()
        expected[:, solved:stop] = latents[:, solved:stop] + 0.5 * before[:, solved - 1 : stop - 1]
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-12)
        assert tokens[:, :solved].equal(solution[:, :solved])
        assert accepted == 1
        changed = (expected - before)[:, solved:stop].abs().amax((0, 2)).tolist()
        assert seen == pytest.approx(changed, abs=1e-12)


@pytest.mark.parametrize(
    ("solved", "width", "reads"), [(1, 1, [0, 1, 2, 3]), (6, 1, [4, 5, 6, 7]), (2, 4, [1]), (7, 4, [4]), (1, 8, [0])]
)
def test_all_reads_of_a_width_have_one_shape(solved, width, reads):
    latents, _, guess = system(9)
    seen = []

    def predict(read, start):
        seen.append((start.item(), tuple(read.shape)))
        return halves(read, start)

    swept(CompiledSweep({}, layers_per_graph=4), guess, latents, solved, width, predict)
    assert seen == [(start, (BATCH, width, DIM)) for start in reads]


@pytest.mark.parametrize(("width", "finite"), [(1, False), (4, True)])
def test_guesses_are_read_without_what_is_not_finite_and_solved_tokens_as_they_are(width, finite):
    latents, _, tokens = system(9)
    tokens[:, :5] = torch.inf
    reads = []

    def predict(read, start):
        reads.append(bool(read.isfinite().all()))
        return halves(read, start)

    swept(CompiledSweep(), tokens, latents, 1, width, predict)
    assert reads[0] is finite


@pytest.mark.parametrize("window", [None, 1, 4, 5, 30])
@pytest.mark.parametrize("num_tokens", [2, 5, 23])
def test_solving_by_such_sweeps_gives_the_solution(window, num_tokens):
    latents, solution, _ = system(num_tokens)
    with torch.compiler.set_stance("force_eager"):
        found, sweeps = solve(halves, latents, window=window, tolerance=0, sweep=CompiledSweep())
    torch.testing.assert_close(found, solution, rtol=0, atol=1e-12)
    assert sweeps <= num_tokens - 1


class Graphs(list):
    """A backend of `torch.compile` that runs graphs as they are and keeps their numbers of rows."""

    def __call__(self, graph, inputs):
        self.append({len(value) for value in inputs if value.ndim == 3})  # no input is a size that may vary
        return graph.forward


def rows_of(rows, num_tokens=6):
    return torch.zeros(rows, num_tokens, DIM), torch.ones(rows, num_tokens, DIM)


def test_a_width_and_a_number_of_rows_are_one_graph_each():
    graphs = Graphs()
    sweep = CompiledSweep({"backend": graphs})
    for rows in (2, 3, 2):
        for solved, width in ((1, 1), (3, 1), (1, 4), (2, 4), (1, 4)):
            sweep(halves, *rows_of(rows), solved, width, False)
    assert graphs == [{2}, {2}, {3}, {3}]


def test_a_block_that_is_no_single_graph_is_refused():
    def broken(read, start):
        torch._dynamo.graph_break()
        return halves(read, start)

    with pytest.raises(Unsupported):
        CompiledSweep({"backend": "eager"})(broken, *rows_of(2), 1, 1, False)


def test_the_graphs_of_one_width_leave_room_for_those_of_another(monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_GRAPHS", 2)
    sweep = CompiledSweep({"backend": "eager"})
    for width in (1, 4):
        for rows in (2, 3):
            sweep(halves, *rows_of(rows), 1, width, False)
    with pytest.raises(FailOnRecompileLimitHit):
        sweep(halves, *rows_of(4), 1, 1, False)


def test_a_copy_has_the_options_and_no_graphs():
    sweep = CompiledSweep({"backend": "eager"}, layers_per_graph=4)
    swept(sweep, *rows_of(2), 1, 1)
    for other in (copy.deepcopy(sweep), pickle.loads(pickle.dumps(sweep))):
        assert type(other) is CompiledSweep
        assert other.options == {"backend": "eager"}
        assert swept(other, *rows_of(2), 1, 1) == (4, None)
    assert CompiledSweep().options == CompiledSweep(None).options == {}


def test_a_copy_without_gaps_has_no_past():
    values = torch.arange(6.0).view(2, 3).requires_grad_()
    for given in (values, values.T, values.detach()):
        copied = owned(given)
        assert copied.equal(given)
        assert copied.is_contiguous()
        assert not copied.requires_grad
        assert copied.data_ptr() != given.data_ptr()


@pytest.mark.parametrize("guided", [False, True])
def test_a_model_decodes_by_them_until_that_is_ended(guided):
    model = tiny_model(num_blocks=2, layers_per_block=1)
    latents, guidance = random_latents(model, 2), Guidance(2.0) if guided else None
    expected = model.decode(latents, LABELS, guidance=guidance, window=4, tolerance=0)
    assert model.compiled_sweep is None
    model.compile_decoding(backend="eager")
    with torch.compiler.set_stance("force_eager"):
        found = model.decode(latents, LABELS, guidance=guidance, window=4, tolerance=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.compiled_sweep._graphs.keys() == {(4, "cpu")}
    model.compiled_sweep = None
    assert model.decode(latents, LABELS, guidance=guidance, window=4, tolerance=0).equal(expected)


def test_hooks_within_blocks_hinder_compiled_decoding_alone():
    model = tiny_model(num_blocks=1, layers_per_block=1)
    model.blocks[0].layers[0].mlp.register_forward_hook(lambda module, inputs, output: None)
    model.decode(random_latents(model, 2), LABELS)
    model.compile_decoding(backend="eager")
    with pytest.raises(ValueError, match="compiled decoding needs blocks whose weights are in place"):
        model.decode(random_latents(model, 2), LABELS)


def test_a_compiler_is_needed_for_the_processor_alone_and_by_the_backend_that_writes_c():
    for options in ({}, {"backend": "inductor"}, {"options": {"cpp_wrapper": True}}):
        model = tiny_model()
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
            with pytest.raises(RuntimeError, match="compile_decoding needs a C\\+\\+ compiler"):
                model.compile_decoding(**options)
            assert model.compiled_sweep is None
            model.compile_decoding(backend="eager")
            assert model.compiled_sweep.options == {"backend": "eager"}
            model.to("meta").compile_decoding(**options)
            assert model.compiled_sweep.options == options


@pytest.mark.parametrize("name", ["fullgraph", "dynamic", "recompile_limit", "isolate_recompiles"])
def test_what_sweeps_set_by_themselves_is_refused(name):
    model = tiny_model()
    with pytest.raises(ValueError, match=rf"compile_decoding sets \['{name}'\] by itself"):
        model.compile_decoding(backend="eager", **{name: True})
    assert model.compiled_sweep is None


@pytest.mark.parametrize("layers", [0, -1, 1.5, True, "16", None])
def test_a_graph_has_a_layer_at_least(layers):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"layers_per_graph must be a whole number of at least 1, got {layers!r}"):
        model.compile_decoding(backend="eager", layers_per_graph=layers)
    assert model.compiled_sweep is None


def test_biases_are_added_after_products_and_factors_are_left():
    addmm = torch.ops.aten.addmm.default
    traced = torch.fx.symbolic_trace(lambda b, x, w: addmm(b, x, w) - addmm(b, x, w, beta=2))
    LooseBiases()(traced.graph)
    traced.recompile()
    targets = [node.target for node in traced.graph.find_nodes(op="call_function", target=addmm)]
    assert len(targets) == 1
    bias, rows, weight = torch.randn(5).double(), torch.randn(2, 3).double(), torch.randn(3, 5).double()
    torch.testing.assert_close(traced(bias, rows, weight), -bias.expand(2, 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, True),
        ({"backend": "inductor", "mode": None, "options": None}, True),
        ({"options": {"cpp_wrapper": True}}, True),
        ({"options": {"post_grad_custom_post_pass": None, "memory_planning": False}}, False),
        ({"backend": "eager"}, False),
        ({"mode": "reduce-overhead"}, False),
    ],
)
def test_what_the_caller_asks_of_the_compiler_comes_first(options, added):
    given = copy.deepcopy(options)
    found = compiled._on_a_cpu(options)
    assert options == given
    own = found.get("options") or {}
    assert isinstance(own.get("post_grad_custom_post_pass"), LooseBiases) is added
    assert own.get("memory_planning", False) is bool((options.get("options") or {}).get("cpp_wrapper"))
    assert (found.get("options") or {}).get("cpp_wrapper") == (options.get("options") or {}).get("cpp_wrapper")
    assert found.items() >= {key: value for key, value in options.items() if key != "options"}.items()

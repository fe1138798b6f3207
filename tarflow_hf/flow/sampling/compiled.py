"""Sweeps in a handful of fixed shapes, compiled: a graph for each width, which all blocks of equal depth share."""

import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.exc import InvalidCxxCompiler

from tarflow_hf.flow.affine import affine_step
from tarflow_hf.flow.inputs import is_whole
from tarflow_hf.flow.kv_cache import span
from tarflow_hf.flow.offloading import is_hooked
from tarflow_hf.flow.sampling.solver import Predict, Sweep, changes, readable

_GROWTH = 4  # of a width over the next smaller one
_MOST_GRAPHS = 64  # of one width: a graph for each number of rows and depth of a block


class CompiledSweep(Sweep):
    """A [`Sweep`] whose shapes do not depend on where it starts, compiled by `torch.compile`.

    It updates 1, 4, 16, 64, ... or all tokens that can be updated, whose places it reads from a tensor, and attends to
    all slots of the cache, of which a mask hides those to come. Where one token is wanted one graph solves several,
    one after another: a call costs as much as a few tokens do. Near the end of the sequence a sweep begins earlier
    and leaves the tokens that are solved as they are. There is a graph for each width, number of rows and depth of a
    block; labels, guidance scales, seeds and places need no other one.

    Args:
        options: Arguments of `torch.compile`.
        layers_per_graph: Layers that the graph of one-token sweeps has at most, if not fewer than the block: it solves
            so many tokens one after another.

    Example:
        >>> CompiledSweep().width(5, num_tokens=50), CompiledSweep().width(50, num_tokens=50)
        (4, 49)
    """

    def __init__(self, options: dict[str, Any] | None = None, layers_per_graph: int = 16) -> None:
        self.options = options or {}
        self.layers_per_graph = layers_per_graph
        self._graphs: dict[tuple[int, str], Callable[..., torch.Tensor | None]] = {}
        self._places: dict[tuple[int, torch.device, bool], torch.Tensor] = {}

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any], int]]:  # a copy compiles anew
        return CompiledSweep, (self.options, self.layers_per_graph)

    def width(self, wanted: int, num_tokens: int) -> int:
        """The smallest of the widths that is at least two thirds of what is wanted.

        Args:
            wanted: At least 1.
            num_tokens: T, the length of the sequence.
        """
        width = 1
        while 3 * width < 2 * wanted:
            width *= _GROWTH
        return min(width, num_tokens - 1)

    def __call__(
        self, predict: Predict, tokens: torch.Tensor, latents: torch.Tensor, solved: int, width: int, wild: bool
    ) -> tuple[int, list[float] | None]:
        """See [`Sweep`].

        Args:
            predict: A [`branches.Predictor`] with a cache from `TarFlowBlock.zero_cache`; what does not say its
                `num_layers` counts as one.
            tokens: (batch, T, dim) x, written to.
            latents: (batch, T, dim) z.
            solved: How many tokens are solved, at least 1.
            width: What [`width`] gave.
            wild: Not asked for: all guesses are read as if they were.
        """
        num_tokens = tokens.shape[1]
        most = max(self.layers_per_graph // getattr(predict, "num_layers", 1), 1)
        run = min(most, num_tokens - 1) if width == 1 else 1
        first = min(solved, num_tokens - width * run)
        places = self._places_of(num_tokens, tokens.device)
        found = self._graph(width, tokens.device.type)(
            predict, tokens, latents, places[first - 1], places[solved], width, run
        )
        return (first + run - solved, None) if found is None else (1, found[solved - first :].tolist())

    def _graph(self, width: int, device: str) -> Callable[..., torch.Tensor | None]:
        key = (width, device)
        if key not in self._graphs:
            fixed: dict[str, Any] = {"fullgraph": True, "dynamic": False}
            limits: dict[str, Any] = {"recompile_limit": _MOST_GRAPHS, "isolate_recompiles": True}
            options = _on_a_cpu(self.options) if device == "cpu" else self.options
            self._graphs[key] = torch.compile(updates, **fixed, **limits, **options)
        return self._graphs[key]

    def _places_of(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """0 ... T - 1, made once, so that no sweep moves a number to the device."""
        key = (num_tokens, device, torch.is_inference_mode_enabled())
        if key not in self._places:
            self._places[key] = torch.arange(num_tokens, device=device)
        return self._places[key]


class LooseBiases(CustomGraphPass):
    """A pass of PyTorch's compiler that takes `addmm(bias, x, w)` apart into `mm(x, w) + bias`.

    On a CPU a call of `addmm` copies the bias first, which with few rows takes as long as the product; a sum becomes
    part of the loop that follows. On a GPU the compiler does so by itself.

    Example:
        >>> graph = torch.fx.symbolic_trace(lambda b, x, w: torch.ops.aten.addmm.default(b, x, w)).graph
        >>> LooseBiases()(graph)
        >>> [node.name for node in graph.nodes]
        ['b', 'x', 'w', 'mm_default', 'add_tensor', 'output']
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Changes the graph in place.

        Args:
            graph: Of ATen operations.
        """
        aten = torch.ops.aten
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if node.kwargs:  # factors
                continue
            bias, rows, weight = node.args
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (rows, weight))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            for new in (product, total):
                new.meta.update(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What the compiler's cache on disk knows the pass by."""
        return get_hash_for_files((__file__,))


def _on_a_cpu(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `torch.compile` with what is faster on a CPU, where the backend knows it and no mode says the rest.

    That is [`LooseBiases`], and with `cpp_wrapper` one piece of memory for all that a graph keeps while it runs.
    """
    if options.get("backend", "inductor") != "inductor" or options.get("mode") is not None:
        return options
    given = options.get("options") or {}
    own = {"post_grad_custom_post_pass": LooseBiases()} | (
        {"memory_planning": True} if given.get("cpp_wrapper") else {}
    )
    return options | {"options": own | given}


class CompilesDecoding(nn.Module):
    """A model whose decoding may be compiled.

    Example:
        >>> config = TarFlowConfig(image_size=8, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model = TarFlowModel(config).eval()
        >>> model.compile_decoding(options={"cpp_wrapper": True})  # later calls compile what they meet first
        >>> model.compiled_sweep.options
        {'options': {'cpp_wrapper': True}}
    """

    compiled_sweep: CompiledSweep | None = None

    def compile_decoding(self, *, layers_per_graph: int = 16, **options: Any) -> None:  # noqa: ANN401
        """Compiles the sweeps of decoding, in place, as `compile_repeated_blocks` compiles the blocks of encoding.

        Each width of a sweep (1, 4, 16, ... tokens; other windows are rounded to one of them), number of images and
        depth of a block is compiled when it is first met, which takes seconds to a minute; PyTorch keeps what it
        compiled on disk, for other processes as well. Other labels, guidance scales, seeds and conditions compile
        nothing anew. Images are those of uncompiled decoding up to rounding, and up to `tolerance` where windows are
        used. `model.compiled_sweep = None` ends it.

        Args:
            layers_per_graph: How many layers the graph of one-token sweeps may have, at least 1: it solves as many
                tokens one after another as fit. More take longer to compile, and less time for each token.
            **options: Of `torch.compile`, such as `options={"cpp_wrapper": True}` for the shortest calls on a CPU.

        Raises:
            ValueError: If `fullgraph` or `dynamic` is given, which are fixed, or `layers_per_graph` is below 1.
            RuntimeError: If the CPU is to be compiled for and there is no C++ compiler (`g++` or `clang++`, or what
                the environment's `CXX` names).
        """
        if fixed := sorted(options.keys() & {"fullgraph", "dynamic", "recompile_limit", "isolate_recompiles"}):
            raise ValueError(f"compile_decoding sets {fixed} by itself: leave out what it sets")
        if not (is_whole(layers_per_graph) and layers_per_graph >= 1):
            raise ValueError(f"layers_per_graph must be a whole number of at least 1, got {layers_per_graph!r:.80}")
        on_cpu = next(self.parameters()).device.type == "cpu"
        if on_cpu and options.get("backend", "inductor") == "inductor":
            _check_compiler()
        self.compiled_sweep = CompiledSweep(options, layers_per_graph)

    def _sweep(self) -> CompiledSweep | None:
        """How decoding sweeps: None for uncompiled. Raises ValueError where weights may not be in place."""
        if self.compiled_sweep is not None and is_hooked(cast(nn.Module, self.blocks)):
            raise ValueError(
                "compiled decoding needs blocks whose weights are in place, and hooks run around parts of them "
                "(offloading by group or leaf, casting by layer): remove those, or set the model's compiled_sweep to "
                "None"
            )
        return self.compiled_sweep


def _check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compile_decoding needs a C++ compiler for the CPU, such as g++ (apt install g++) or clang++; the "
            f"environment's CXX may name one, and is {os.environ.get('CXX', 'not set')}"
        ) from error


def updates(
    predict: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    latents: torch.Tensor,
    start: torch.Tensor,
    solved: torch.Tensor,
    width: int,
    run: int,
) -> torch.Tensor | None:
    """What a [`CompiledSweep`] compiles: updates of the tokens start + 1 ... start + width, and of those that follow.

    Args:
        predict: The block.
        tokens: (batch, T, dim) x, written to.
        latents: (batch, T, dim) z.
        start: 0-d, the place of the first token that is read.
        solved: 0-d, the place of the first token that may change.
        width: How many tokens are read at once.
        run: How many updates there are, each of the tokens after those of the one before.

    Returns:
        (width,) the largest change of each; None if they are updated one by one.

    Example:
        >>> tokens, latents, one = torch.zeros(1, 3, 1), torch.ones(1, 3, 1), torch.tensor(1)
        >>> def halves(read, start):
        ...     return 0.5 * read, torch.zeros_like(read)
        >>> updates(halves, tokens, latents, one - 1, solved=one, width=2, run=1)
        tensor([1., 1.])
        >>> updates(halves, tokens, latents, one - 1, solved=one, width=1, run=2)
        >>> tokens.flatten()
        tensor([0.0000, 1.0000, 1.5000])
    """
    found = None
    for number in range(run):
        found = _update(predict, tokens, latents, start + number * width, solved, width)
    return found


def _update(
    predict: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    latents: torch.Tensor,
    start: torch.Tensor,
    solved: torch.Tensor,
    width: int,
) -> torch.Tensor | None:
    read, before = span(tokens, start, width, 1), span(tokens, start + 1, width, 1)
    shift, log_scale = predict(read if width == 1 else readable(read), start)
    updated = affine_step(span(latents, start + 1, width, 1), shift, log_scale)
    places = start + 1 + torch.arange(width, device=start.device)
    updated = updated.where((places >= solved)[:, None], before)
    tokens.index_copy_(1, places, updated)
    return changes(updated, before) if width > 1 else None


def owned(values: torch.Tensor) -> torch.Tensor:
    """A copy without gaps, which no graph tells from another by where it came from.

    Args:
        values: Of any shape.

    Example:
        >>> owned(torch.zeros(2, 3).T).is_contiguous()
        True
    """
    return values.detach().clone(memory_format=torch.contiguous_format)


__all__ = ["CompiledSweep", "CompilesDecoding", "LooseBiases", "owned", "updates"]

"""Inverting one block under guidance: the solver sees its labelled and unlabelled branch as one batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from tarflow_hf.flow.bare import bare
from tarflow_hf.flow.blocks import TarFlowBlock
from tarflow_hf.flow.kv_cache import KeyValueCache, span
from tarflow_hf.flow.precision import forget_autocast
from tarflow_hf.flow.sampling.compiled import CompiledSweep, owned
from tarflow_hf.flow.sampling.guidance import Guidance, Prediction
from tarflow_hf.flow.sampling.solver import solve


@dataclass(frozen=True)
class Batch:
    """Images on their way back, and what conditions each of them.

    Args:
        latents: (batch, tokens, patch_dim) what a block is inverted at, in the block's own order.
        labels: (batch,) classes, -1 for none; None for an unconditional model.
        noise_level: (batch,) standard deviations; None for a model without noise conditioning.
        condition: (batch, condition_dim) standardised, NaN for none; None for a model without conditions.
        guess: (batch, tokens, patch_dim) what the block is expected to be solved to; None: nothing is.
    """

    latents: torch.Tensor
    labels: torch.Tensor | None
    noise_level: torch.Tensor | None
    condition: torch.Tensor | None = None
    guess: torch.Tensor | None = None

    def split(self, num_parts: int) -> "list[Batch]":
        """The batch in parts of about the same size, one at least."""
        num_parts = max(num_parts, 1)
        columns = (
            [None] * num_parts if values is None else values.tensor_split(num_parts)
            for values in (self.labels, self.noise_level, self.condition, self.guess)
        )
        return [Batch(*part) for part in zip(self.latents.tensor_split(num_parts), *columns, strict=True)]

    def take(self, images: list[int]) -> "Batch":
        """Some of the images.

        Args:
            images: Their places.
        """
        columns = (self.labels, self.noise_level, self.condition, self.guess)
        return Batch(self.latents[images], *(None if values is None else values[images] for values in columns))


def invert_block(
    block: TarFlowBlock,
    batch: Batch,
    guidance: Guidance | None,
    cache: KeyValueCache,
    compiled: CompiledSweep | None = None,
    *,
    window: int | None,
    tolerance: float,
    token_cost: float,
) -> tuple[torch.Tensor, int]:
    """Solves a block for the tokens that it encodes as `batch.latents`.

    Args:
        block: The block.
        batch: What it is inverted at.
        guidance: How the branches combine; None for the labelled one alone.
        cache: Where the block keeps the keys and values of the tokens it has read.
        compiled: Compiled sweeps, which keep keys and values of their own; None: sweeps of any width.
        window: See [`solver.solve`], as for the arguments after it.
        tolerance: Largest change that counts as none.
        token_cost: What one more token in a sweep costs.

    Returns:
        (batch, tokens, patch_dim) in the block's own order, and the sweeps used.
    """
    positions: torch.Tensor | None
    rows = len(batch.latents) * (1 if guidance is None else 2)
    if compiled is not None:
        batch = replace(batch, latents=owned(batch.latents))
        cache = block.zero_cache(rows)
        called, positions = block, owned(block.positions)
    else:
        called = bare(block, rows)
        positions = None if called is block else block.positions
    return solve(
        replace(predictor(block, batch, guidance, cache, positions), block=called),
        batch.latents,
        guess=batch.guess,
        window=window,
        tolerance=tolerance,
        token_cost=token_cost,
        sweep=compiled,
    )


def invert_in_parts(
    block: TarFlowBlock,
    batch: Batch,
    guidance: Guidance | None,
    cache: KeyValueCache,
    compiled: CompiledSweep | None = None,
    *,
    most: int,
    gradient_free: Callable[[], AbstractContextManager[object]],
    window: int | None,
    tolerance: float,
    token_cost: Callable[..., float],
) -> tuple[torch.Tensor, int]:
    """Solves a block as [`invert_block`] does, a part of the batch at a time, so that memory is bounded.

    Args:
        block: See [`invert_block`], as for the arguments not named here.
        batch: All images.
        guidance: How the branches combine.
        cache: Keys and values, with room for the largest part.
        compiled: Compiled sweeps.
        most: Most images of a part.
        gradient_free: The context in which parts are solved.
        window: Most tokens solved at once.
        tolerance: Largest change that counts as none.
        token_cost: What one more token in a sweep costs, by the number of its `rows`.

    Returns:
        (batch, tokens, patch_dim) in the block's own order, and the most sweeps of a part.
    """
    solved = []
    for part in batch.split(-(-len(batch.latents) // most)):
        cost = token_cost(rows=(1 if guidance is None else 2) * len(part.latents))
        with gradient_free():
            found = invert_block(
                block, part, guidance, cache, compiled, window=window, tolerance=tolerance, token_cost=cost
            )
        solved.append(found)
        forget_autocast(batch.latents.device)
    return torch.cat([tokens for tokens, _ in solved]), max(sweeps for _, sweeps in solved)


@dataclass(frozen=True)
class Predictor:
    """The block as the solver sees it; under guidance both branches run as one batch of twice the size.

    Args:
        block: The block, or what computes as it does.
        cache: Where it keeps the keys and values of the tokens it has read.
        positions: (tokens, hidden) its positions, in its own order; None: it reads them itself, as it must where hooks
            bring its weights in.
        condition: (rows, 1, hidden) what conditions each row; None for nothing.
        guidance: How the branches combine; None for the labelled one alone.
        weights: (tokens,) strength of guidance at each token.
        query_scale: (rows, 1, 1, 1) inverse attention temperature of each row; None for 1.
    """

    block: TarFlowBlock
    cache: KeyValueCache
    positions: torch.Tensor | None
    condition: torch.Tensor | None
    guidance: Guidance | None
    weights: torch.Tensor | None
    query_scale: torch.Tensor | None

    @property
    def num_layers(self) -> int:
        """Depth of the block."""
        return len(self.block.layers)

    def __call__(self, tokens: torch.Tensor, start: int | torch.Tensor) -> Prediction:
        """See [`solver.Predict`]; a tensor that says where the tokens start gives all shapes their largest size.

        Args:
            tokens: (batch, n, patch_dim) tokens to read.
            start: Position of the first.
        """
        rows = tokens if self.guidance is None else torch.cat([tokens, tokens])
        shift, log_scale = self.block(
            rows,
            self.condition,
            start=start,
            positions=self.positions,
            query_scale=self.query_scale,
            past_key_values=self.cache,
        )
        if self.guidance is None or self.weights is None:
            return shift, log_scale
        labelled, unlabelled = zip(shift.chunk(2), log_scale.chunk(2), strict=True)
        return self.guidance.combine(labelled, unlabelled, span(self.weights, start + 1, tokens.shape[1]))


def predictor(
    block: TarFlowBlock,
    batch: Batch,
    guidance: Guidance | None,
    cache: KeyValueCache,
    positions: torch.Tensor | None = None,
) -> Predictor:
    """The block as the solver sees it, conditioned as the batch says.

    Args:
        block: See [`invert_block`], as for the arguments not named here.
        batch: What it is inverted at.
        guidance: How the branches combine.
        cache: Keys and values.
        positions: See [`Predictor`].
    """
    labels, noise_level, (rows, num_tokens, _) = batch.labels, batch.noise_level, batch.latents.shape
    if guidance is None:
        condition = block.condition(labels, noise_level, batch.condition)
        return Predictor(block, cache, positions, condition, None, None, None)
    condition = block.condition(
        None if labels is None else torch.cat([labels, torch.full_like(labels, -1)]),
        None if noise_level is None else noise_level.repeat(2),
        None if batch.condition is None else torch.cat([batch.condition, torch.full_like(batch.condition, torch.nan)]),
    )
    weights = guidance.weights(0, num_tokens, num_tokens, dtype=batch.latents.dtype, device=batch.latents.device)
    query_scale = None
    if guidance.attention_temperature != 1:
        query_scale = batch.latents.new_ones(2 * rows, 1, 1, 1)
        query_scale[rows:] /= guidance.attention_temperature
    return Predictor(block, cache, positions, condition, guidance, weights, query_scale)


__all__ = ["Batch", "Predictor", "invert_block", "invert_in_parts", "predictor"]

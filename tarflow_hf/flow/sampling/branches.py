"""Inverting one block under guidance: the solver sees its labelled and unlabelled branch as one batch."""

import torch

from tarflow_hf.flow.blocks import TarFlowBlock
from tarflow_hf.flow.kv_cache import KeyValueCache
from tarflow_hf.flow.sampling.guidance import Guidance
from tarflow_hf.flow.sampling.solver import Predict, solve


def invert_block(
    block: TarFlowBlock,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    noise_level: torch.Tensor | None,
    guidance: Guidance | None,
    cache: KeyValueCache,
    *,
    window: int | None,
    tolerance: float,
    token_cost: float,
) -> tuple[torch.Tensor, int]:
    """Solves a block for the tokens that it encodes as `latents`.

    Args:
        block: See [`predictor`], as for the arguments up to `cache`.
        latents: (batch, tokens, patch_dim) in the block's own order.
        labels: (batch,) classes.
        noise_level: (batch,) standard deviations.
        guidance: How the branches combine.
        cache: Keys and values.
        window: See [`solver.solve`], as for the arguments after it.
        tolerance: Largest change that counts as none.
        token_cost: What one more token in a sweep costs.

    Returns:
        (batch, tokens, patch_dim) in the block's own order, and the sweeps used.

    Raises:
        ValueError: If guidance made a scale that is not positive.
    """
    not_positive = torch.zeros(latents.shape[1], dtype=torch.bool, device=latents.device)
    predict = predictor(block, latents, labels, noise_level, guidance, cache, not_positive)
    tokens, sweeps = solve(predict, latents, window=window, tolerance=tolerance, token_cost=token_cost)
    if guidance is not None:
        guidance.check_scales(not_positive)
    return tokens, sweeps


def predictor(
    block: TarFlowBlock,
    latents: torch.Tensor,
    labels: torch.Tensor | None,
    noise_level: torch.Tensor | None,
    guidance: Guidance | None,
    cache: KeyValueCache,
    not_positive: torch.Tensor,
) -> Predict:
    """The block as the solver sees it; under guidance both branches run as one batch of twice the size.

    Args:
        block: The block to invert.
        latents: (batch, tokens, patch_dim) what it is inverted at, in the block's own order.
        labels: (batch,) classes, -1 for none; None for an unconditional model.
        noise_level: (batch,) standard deviations; None for a model without noise conditioning.
        guidance: How the branches combine; None for the labelled one alone.
        cache: Where the block keeps the keys and values of the tokens it has read.
        not_positive: (tokens,) bool, written to: whether the scale that the token got last was not positive.

    Returns:
        [`solver.Predict`].
    """
    if guidance is None:
        condition = block.condition(labels, noise_level)
        return lambda tokens, start: block(tokens, condition, start=start, past_key_values=cache)

    rule, (batch, num_tokens, _) = guidance, latents.shape
    condition = block.condition(
        None if labels is None else torch.cat([labels, torch.full_like(labels, -1)]),
        None if noise_level is None else noise_level.repeat(2),
    )
    weights = rule.weights(0, num_tokens, num_tokens, dtype=latents.dtype, device=latents.device)
    query_scale = None
    if rule.attention_temperature != 1:
        query_scale = latents.new_ones(2 * batch, 1, 1, 1)
        query_scale[batch:] /= rule.attention_temperature

    def predict(tokens: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([tokens, tokens])
        shift, log_scale = block(both, condition, start=start, query_scale=query_scale, past_key_values=cache)
        labelled, unlabelled = zip(shift.chunk(2), log_scale.chunk(2), strict=True)
        updated = slice(start + 1, start + 1 + tokens.shape[1])
        shift, log_scale = rule.combine(labelled, unlabelled, weights[updated])
        if rule.rule == "scale":
            not_positive[updated] = log_scale.isneginf().any(2).any(0)
        return shift, log_scale

    return predict


__all__ = ["invert_block", "predictor"]

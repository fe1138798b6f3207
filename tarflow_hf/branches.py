"""One block as the window solver sees it: the labelled and the unlabelled branch of guidance in one batch."""

import torch

from .blocks import TarFlowBlock
from .decoding import Predict
from .guidance import Guidance
from .kv_cache import KeyValueCache


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
        [`decoding.Predict`].
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


__all__ = ["predictor"]

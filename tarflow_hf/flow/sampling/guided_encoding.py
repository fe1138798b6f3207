"""The latents that guided decoding would turn into given patches: a parallel pass, exact for every scale."""

from dataclasses import replace
from typing import Any

import torch

from tarflow_hf.flow.affine import inverse_affine_step
from tarflow_hf.flow.inputs import checked_condition, checked_labels
from tarflow_hf.flow.kv_cache import KeyValueCache
from tarflow_hf.flow.offloading import bring_in, held
from tarflow_hf.flow.sampling.branches import Batch, predictor
from tarflow_hf.flow.sampling.guidance import Guidance
from tarflow_hf.flow.sampling.memory import decoding_max_batch


def checked_batch(
    model: Any,  # noqa: ANN401  # a TarFlowModel, which is defined above this room
    patches: torch.Tensor,
    class_labels: torch.Tensor | None,
    condition: torch.Tensor | None,
    condition_mask: torch.Tensor | None = None,
) -> Batch:
    """Patches and what conditions them, as the blocks of a model take it; images with noise carry its highest level.

    Args:
        model: The flow.
        patches: (batch, tokens, patch_dim) in raster order.
        class_labels: (batch,) integer classes; -1 or None is no label.
        condition: (batch, condition_dim) numbers, in the units of the data they come from; None is none.
        condition_mask: (batch,) bool, False for the images without a condition.

    Raises:
        ValueError: If labels or conditions do not fit the model.
    """
    config = model.config
    labels = checked_labels(class_labels, patches, config, check_range=True)
    levels = patches.new_full(patches.shape[:1], config.noise_range[1]) if config.noise_conditioning else None
    return Batch(patches, labels, levels, checked_condition(condition, condition_mask, patches, config))


@torch.no_grad()
def guided_latents(
    model: Any,  # noqa: ANN401
    batch: Batch,
    guidance: Guidance | None,
) -> torch.Tensor:
    """z such that decoding z under guidance gives these patches: v_i = (u_i - b_i) exp(-a_i) block by block.

    (b, a) are the guided predictions. Each depends on the tokens before it alone, which are all there, so that a block
    is one pass over both branches, as it is in encoding without guidance.

    Args:
        model: The flow.
        batch: Patches of noisy images, in raster order, and what conditions them, see [`checked_batch`].
        guidance: How the branches combine; None for the labelled one alone.

    Returns:
        (batch, tokens, patch_dim) latents in raster order.
    """
    bring_in(model)
    most = decoding_max_batch(model.config, 1 if guidance is None else 2, model.dtype, batch.latents.device)
    return torch.cat([_latents_of_part(model, part, guidance) for part in batch.split(-(-len(batch.latents) // most))])


def _latents_of_part(model: Any, batch: Batch, guidance: Guidance | None) -> torch.Tensor:  # noqa: ANN401
    patches, last = batch.latents, len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        acts = guidance is not None and guidance.guides(last - index) and guidance.acts(labelled=block.is_conditioned)
        rule = guidance if acts else None
        tokens = block.in_order(patches)
        with held(block):
            if tokens.shape[1] > 1:
                predict = predictor(block, replace(batch, latents=tokens), rule, KeyValueCache(tokens.shape[1]))
                shift, log_scale = predict(tokens[:, :-1], 0)
                tokens = torch.cat([tokens[:, :1], inverse_affine_step(tokens[:, 1:], shift, log_scale)], dim=1)
        patches = block.in_order(tokens)
    if model.config.volume_preserving:
        with held(model, recurse=False):
            patches = patches / model.prior_variance.to(patches.dtype).sqrt()
    return patches


__all__ = ["checked_batch", "guided_latents"]

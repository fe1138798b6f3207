"""One flow block: a causal transformer that predicts the affine step of each token from the tokens before it.

From the tokens up to i it predicts the shift b and the log-scale a of token i + 1. The same forward serves both
directions: encoding reads the whole sequence at once, decoding a window of it against a key-value cache. The residual
stream and the prediction are float32 (or wider) whatever the weights' dtype, and under autocast.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.inputs import is_transformed
from tarflow_hf.flow.kv_cache import KeyValueCache, span
from tarflow_hf.flow.precision import is_autocast, without_autocast, working_dtype
from tarflow_hf.flow.products import call_linear, linear
from tarflow_hf.flow.remaking import remember


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T scaling) v; of a causal module causal where there is no mask and more than one query, as sdpa."""
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and getattr(module, "is_causal", True) and query.shape[2] > 1:
        attention_mask = logits.new_full(logits.shape[2:], float("-inf")).triu(1)
    if attention_mask is not None:
        logits = logits + attention_mask
    logits = logits.to(working_dtype(logits.dtype))
    weights = F.dropout(logits.softmax(-1).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TarFlowLayerNorm(nn.LayerNorm):
    """Layer norm of a float32 residual stream; the result has the dtype of the weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = partial(_wide_layer_norm, self.normalized_shape, self.eps)
        normed = norm(hidden_states, self.weight, self.bias)
        if normed.dtype != self.weight.dtype:
            normed = normed.to(self.weight.dtype)
        return remember(normed, norm, hidden_states, copied=(self.weight, self.bias))


def _wide_layer_norm(
    shape: tuple[int, ...], eps: float, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    if inputs.dtype != weight.dtype:
        weight, bias = weight.to(inputs.dtype), bias.to(inputs.dtype)
    return torch.layer_norm(inputs, shape, weight, bias, eps)


class TarFlowProjection(nn.Module):
    """A linear layer that computes in float32 or wider, whatever its weights' dtype and under autocast.

    It stands where patches enter a block and predictions leave it. There rounding to bfloat16 would be lost to the
    inverse: decoding repeats what encoding computed only as far as both see the same numbers. It is no `nn.Linear`, so
    that what replaces or wraps all of those (quantisation, storage in 8 bits, adapters) leaves it as it is.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if inputs.dtype == weight.dtype == bias.dtype == torch.float32 and not is_autocast(inputs.device):
            return linear(inputs, weight, bias)
        dtype = working_dtype(inputs.dtype, weight.dtype)
        with without_autocast(inputs.device):
            return linear(inputs.to(dtype), weight.to(dtype), bias.to(dtype))


class TarFlowAttention(nn.Module):
    """Multi-head causal self-attention through transformers' attention interface."""

    def __init__(self, config: TarFlowConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    @property
    def module(self) -> nn.Module:
        """What attention functions are given: this module, also by what stands for it, see [`bare.bare`]."""
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        query_scale: torch.Tensor | None,
        past_key_values: KeyValueCache | None,
        start: int | torch.Tensor,
    ) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        # (batch, tokens, 3 * hidden) -> (batch, 3 * heads, tokens, head_dim): the heads of q, of k and of v
        qkv = call_linear(self.qkv_proj, hidden_states)
        qkv = qkv.view(batch, tokens, 3 * self.num_heads, self.head_dim).transpose(1, 2)
        query, key_value = qkv.split([self.num_heads, 2 * self.num_heads], dim=1)
        if batch == 0:  # which attention functions do not take
            return call_linear(self.out_proj, query.transpose(1, 2).flatten(2))
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        if past_key_values is not None:
            key_value = past_key_values.update(key_value, self.layer_idx, start)
        key, value = key_value.chunk(2, dim=1)
        # torch.func has no rules for fused attention: gradients of samples would go one by one, forward mode fails;
        # sweeps of fixed shapes are compiled, which on a CPU makes loops of it that cost less than one fused call
        plain = is_transformed(query) or (isinstance(start, torch.Tensor) and query.device.type == "cpu")
        implementation = "eager" if plain else self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, _ = attention(self.module, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        return call_linear(self.out_proj, attended.reshape(batch, tokens, -1))


class TarFlowMLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_ratio * config.hidden_size)
        self.down_proj = nn.Linear(config.mlp_ratio * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = call_linear(self.up_proj, hidden_states)
        activated = remember(F.gelu(hidden_states), F.gelu, hidden_states)
        return call_linear(self.down_proj, activated)


class TarFlowLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer: h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: TarFlowConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = TarFlowLayerNorm(config.hidden_size)
        self.attention = TarFlowAttention(config, layer_idx)
        self.mlp_norm = TarFlowLayerNorm(config.hidden_size)
        self.mlp = TarFlowMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        start: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, attention_mask, query_scale, past_key_values, start)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class TarFlowClassEmbedding(nn.Module):
    """A table of class vectors; the label -1 (no label) gets the mean over all classes."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, hidden_size))

    def forward(self, class_labels: torch.Tensor) -> torch.Tensor:
        """(batch,) labels -> (batch, 1, hidden)"""
        vectors = self.weight[class_labels.clamp(min=0)]
        return torch.where(class_labels[:, None] < 0, self.weight.mean(0), vectors)[:, None]


class TarFlowNoiseEmbedding(nn.Module):
    """MLP([sin(tau f_j), cos(tau f_j)]) of tau = log noise_level, with f_j = 10000^(-2j / hidden), j < hidden / 2.

    Reference: arXiv 2604.20041.
    """

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.half_size = config.hidden_size // 2
        self.mlp = TarFlowMLP(config)

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        """(batch,) standard deviations, float32 or wider -> (batch, 1, hidden)"""
        index = torch.arange(self.half_size, dtype=noise_level.dtype, device=noise_level.device)
        phase = noise_level.log()[:, None] * 10000.0 ** (-index / self.half_size)
        waves = torch.cat([phase.sin(), phase.cos()], dim=1)
        return self.mlp(waves.to(self.mlp.up_proj.bias.dtype))[:, None]


class TarFlowConditionEmbedding(nn.Module):
    """MLP(c) of a standardised condition c; a learned vector stands for none, which is a row of NaN."""

    def __init__(self, condition_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(condition_dim, hidden_size)
        self.down_proj = nn.Linear(hidden_size, hidden_size)
        self.no_condition = nn.Parameter(torch.empty(hidden_size))

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        """(batch, condition_dim), float32 or wider -> (batch, 1, hidden)"""
        given = condition.nan_to_num().to(self.up_proj.bias.dtype)
        vectors = self.down_proj(F.gelu(self.up_proj(given)))
        return torch.where(condition[:, :1].isnan(), self.no_condition.to(vectors.dtype), vectors)[:, None]


class TarFlowBlock(nn.Module):
    """One autoregressive flow block: a causal transformer over the tokens in the block's own order.

    Even blocks read the patches in raster order, odd ones (`reverse`) from the last to the first. Positions belong to
    the place in the image, so an odd block meets them in reverse.
    """

    def __init__(self, config: TarFlowConfig, block_idx: int) -> None:
        super().__init__()
        self.reverse = block_idx % 2 == 1
        self.volume_preserving = config.volume_preserving
        self.proj_in = TarFlowProjection(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, config.hidden_size))
        width, told = config.hidden_size, config.is_conditioned(block_idx)
        classes, numbers = (config.num_classes, config.condition_dim) if told else (0, 0)
        self.class_embedding = TarFlowClassEmbedding(classes, width) if classes else None
        self.noise_embedding = TarFlowNoiseEmbedding(config) if config.noise_conditioning else None
        self.condition_embedding = TarFlowConditionEmbedding(numbers, width) if numbers else None
        self.layers = nn.ModuleList(TarFlowLayer(config, index) for index in range(config.block_depths[block_idx]))
        self.proj_out = TarFlowProjection(
            config.hidden_size, config.patch_dim * (1 if config.volume_preserving else 2)
        )

    def forward(
        self,
        patches: torch.Tensor,
        condition: torch.Tensor | None = None,
        *,
        start: int | torch.Tensor = 0,
        positions: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicts the affine steps of the tokens start + 1 ... start + n, each from the tokens before it.

        Args:
            patches: (batch, n, patch_dim) tokens at the positions start ... start + n - 1 of the block's order.
            condition: (batch, 1, hidden_size) vector added to every token, from [`condition`].
            start: Position of the first token; above 0 only with a cache that holds the tokens before it. A 0-d tensor
                makes all shapes the same wherever it starts, see [`KeyValueCache`].
            positions: The block's `positions`, for whoever calls it many times; None: they are brought in order anew.
            query_scale: (batch, 1, 1, 1) inverse attention temperature of each row of the batch; None for 1.
            past_key_values: Keys and values of the tokens before `start`; those of these tokens are written to it.

        Returns:
            shift b and log_scale a, each (batch, n, patch_dim), float32 or wider.
        """
        tokens = patches.shape[1]
        positions = self.positions if positions is None else positions
        hidden_states = self.proj_in(patches) + span(positions, start, tokens)
        if condition is not None:
            hidden_states = hidden_states + condition
        mask = None if past_key_values is None else past_key_values.mask(start, tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, query_scale, past_key_values, start)
        output = self.proj_out(hidden_states)
        if self.volume_preserving:
            return output, torch.zeros_like(output)
        log_scale, shift = output.chunk(2, dim=-1)
        return shift, log_scale

    def condition(
        self,
        labels: torch.Tensor | None,
        noise_level: torch.Tensor | None = None,
        vector: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The sum of what conditions every token.

        Args:
            labels: (batch,) classes, -1 for none; None for an unconditional model.
            noise_level: (batch,) standard deviations; None for a model without noise conditioning.
            vector: (batch, condition_dim) standardised conditions, NaN for none; None for a model without them.

        Returns:
            (batch, 1, hidden) vectors to add to every token; None where nothing conditions the model.
        """
        parts = []
        if self.class_embedding is not None and labels is not None:
            parts.append(self.class_embedding(labels))
        if self.noise_embedding is not None and noise_level is not None:
            parts.append(self.noise_embedding(noise_level))
        if self.condition_embedding is not None and vector is not None:
            parts.append(self.condition_embedding(vector))
        return sum(parts[1:], parts[0]) if parts else None

    @property
    def is_conditioned(self) -> bool:
        """Whether class or condition can change what the block predicts."""
        return self.class_embedding is not None or self.condition_embedding is not None

    @property
    def positions(self) -> torch.Tensor:
        """(tokens, hidden) position embeddings in the block's own order."""
        return self.position_embedding.flip(0) if self.reverse else self.position_embedding

    def zero_cache(self, rows: int) -> KeyValueCache:
        """Keys and values for sweeps that start where a tensor says, see [`KeyValueCache`].

        Args:
            rows: Batch of the sweeps.
        """
        layer = cast(TarFlowLayer, self.layers[0])
        weight, attention = layer.attention_norm.weight, layer.attention
        device = weight.device
        like = weight.new_empty(0, dtype=torch.get_autocast_dtype(device.type) if is_autocast(device) else None)
        sizes = (attention.num_heads, self.position_embedding.shape[0], attention.head_dim)
        return KeyValueCache.zeros(len(self.layers), rows, *sizes, like=like)

    def in_order(self, patches: torch.Tensor) -> torch.Tensor:
        """Brings raster order into the block's own order, and back."""
        return patches.flip(1) if self.reverse else patches


__all__ = ["TarFlowBlock", "TarFlowClassEmbedding", "TarFlowConditionEmbedding", "TarFlowNoiseEmbedding"]

"""The transformer of a learned inverse: latents, condition and guidance scale in; states and the image out."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from tarflow_hf.flow.blocks import (
    TarFlowClassEmbedding,
    TarFlowConditionEmbedding,
    TarFlowLayer,
    TarFlowLayerNorm,
    TarFlowNoiseEmbedding,
    TarFlowProjection,
)
from tarflow_hf.flow.inputs import check_latents, checked_condition, checked_labels, is_traced
from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig
from tarflow_hf.flow.precision import working_dtype
from tarflow_hf.flow.pretrained import initialise


@dataclass
class TarFlowInverseOutput(ModelOutput):
    """What [`TarFlowInverseModel.forward`] returns.

    Args:
        patches: (batch, tokens, patch_dim) patches of the clean image, in raster order.
        states: For each block of the flow, from noise to image, (batch, tokens, patch_dim) what the block is to be
            decoded to, in raster order; the last are the patches of the noisy image.

    Example:
        >>> flow = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)
        >>> model = TarFlowInverseModel(TarFlowInverseConfig(flow=flow, hidden_size=64, num_layers=3))
        >>> output = model(torch.zeros(5, 16, 4))
        >>> output.patches.shape, len(output.states)
        (torch.Size([5, 16, 4]), 2)
    """

    patches: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] | None = None


class TarFlowInverseTransformer(PreTrainedModel):
    """A bidirectional transformer over the latents of all tokens; [`TarFlowInverseModel`] documents it.

    h = W_in z + positions + class + condition + guidance; layers as in the flow, without the causal mask; after its
    part of the layers block k's state is u = s_k R_k norm(h), and the image is W_out norm(h) after the last.
    """

    config: TarFlowInverseConfig
    state_scale: torch.Tensor

    config_class = TarFlowInverseConfig
    base_model_prefix = "inverse"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["TarFlowLayer"]

    def __init__(self, config: TarFlowInverseConfig) -> None:
        super().__init__(config)
        flow, sizes = config.flow_config, cast(Any, config)  # which has what the parts of a flow block read of it
        self.proj_in = TarFlowProjection(flow.patch_dim, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(flow.num_tokens, config.hidden_size))
        self.guidance_embedding = TarFlowNoiseEmbedding(sizes)
        self.class_embedding = (
            TarFlowClassEmbedding(flow.num_classes, config.hidden_size) if flow.num_classes else None
        )
        self.condition_embedding = (
            TarFlowConditionEmbedding(flow.condition_dim, config.hidden_size) if flow.condition_dim else None
        )
        self.layers = nn.ModuleList(TarFlowLayer(sizes, index) for index in range(config.num_layers))
        for layer in self.layers:
            cast(TarFlowLayer, layer).attention.is_causal = False
        self.norm = TarFlowLayerNorm(config.hidden_size)
        self.state_out = nn.ModuleList(
            TarFlowProjection(config.hidden_size, flow.patch_dim) for _ in range(flow.num_blocks)
        )
        self.proj_out = TarFlowProjection(config.hidden_size, flow.patch_dim)
        self.register_buffer("state_scale", torch.ones(flow.num_blocks))  # s_k, in the order of the states
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As a flow's parts begin; the image and the states begin as 0, the scales as 1."""
        initialise(module)
        if isinstance(module, TarFlowInverseTransformer):
            init.normal_(module.position_embedding, std=0.01)
            for projection in (*module.state_out, module.proj_out):
                init.zeros_(cast(TarFlowProjection, projection).weight)
                init.zeros_(cast(TarFlowProjection, projection).bias)
            init.ones_(module.state_scale)

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | float = 1.0,
        return_dict: bool | None = None,
    ) -> TarFlowInverseOutput | tuple[torch.Tensor, ...]:
        """Turns latents into the clean image and into what the flow's blocks would be decoded to on the way.

        Args:
            latents: (batch, tokens, patch_dim) z ~ N(0, 1), in raster order.
            class_labels: (batch,) integer classes; -1 or None is no label.
            condition: (batch, condition_dim) numbers, in the units of the data they come from; None is none.
            condition_mask: (batch,) bool, False for the images without a condition.
            guidance_scale: (batch,) or one number, from 1 (none) to the configuration's `max_guidance_scale`.
            return_dict: Whether to return a [`TarFlowInverseOutput`] or a tuple. None: as the configuration says.

        Raises:
            ValueError: If an argument does not fit the configuration.
        """
        config, flow = self.config, self.config.flow_config
        check_latents(latents, flow)
        labels = checked_labels(class_labels, latents, flow, check_range=latents.device.type == "cpu")
        vector = checked_condition(condition, condition_mask, latents, flow)
        latents = latents.to(working_dtype(latents.dtype, self.position_embedding.dtype))
        hidden_states = self.proj_in(latents) + self.position_embedding
        hidden_states = hidden_states + self.guidance_embedding(checked_scale(guidance_scale, latents, config))
        if self.class_embedding is not None and labels is not None:
            hidden_states = hidden_states + self.class_embedding(labels)
        if self.condition_embedding is not None and vector is not None:
            hidden_states = hidden_states + self.condition_embedding(vector)
        states: list[torch.Tensor] = []
        ends = config.state_layers
        for count, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states)
            while len(states) < len(ends) and ends[len(states)] == count:
                read = self.state_out[len(states)](self.norm(hidden_states))
                states.append(read * self.state_scale[len(states)].to(read.dtype))
        output = TarFlowInverseOutput(self.proj_out(self.norm(hidden_states)), tuple(states))
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def checked_scale(
    guidance_scale: torch.Tensor | float, latents: torch.Tensor, config: TarFlowInverseConfig
) -> torch.Tensor:
    """(batch,) guidance scales in the dtype of the latents, after checking them.

    Raises:
        ValueError: If they are not one number, or one for each image, from 1 to what the inverse has learned.
    """
    scale = torch.as_tensor(guidance_scale, dtype=latents.dtype, device=latents.device)
    if scale.ndim > 1 or scale.numel() not in (1, len(latents)):
        raise ValueError(f"guidance_scale must be one number, or {len(latents)} of them, got {tuple(scale.shape)}")
    if scale.device.type == "cpu" and not is_traced(scale):
        wrong = scale[~((scale >= 1) & (scale <= config.max_guidance_scale))]
        if wrong.numel():
            raise ValueError(
                f"guidance_scale must be from 1 to {config.max_guidance_scale}, what the inverse has learned, "
                f"got {wrong.flatten()[0].item():.4g}"
            )
    return scale.expand(len(latents))


__all__ = ["TarFlowInverseOutput", "TarFlowInverseTransformer"]

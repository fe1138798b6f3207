"""What transformers asks of a model: how its weights begin, and how gradients pass where its own weights take none."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN, apply_layerwise_casting
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.blocks import (
    TarFlowBlock,
    TarFlowClassEmbedding,
    TarFlowConditionEmbedding,
    TarFlowProjection,
)
from tarflow_hf.flow.signatures import takes_arguments_of


class TarFlowPreTrainedModel(PreTrainedModel):
    """What a [`TarFlowModel`] is to transformers, apart from what it computes."""

    config: TarFlowConfig
    blocks: nn.ModuleList
    prior_variance: torch.Tensor  # a buffer that volume-preserving models alone have

    config_class = TarFlowConfig
    base_model_prefix = "transformer"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["TarFlowLayer"]

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None, as there is no table of token embeddings; asked for by accelerate when it shards the model."""
        return None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # what `to`, `half` and the like go through
        made_so = any(weight.is_inference() for weight in self.parameters())
        # The score needs gradients, which weights made in inference mode never let pass.
        with torch.inference_mode(made_so and torch.is_inference_mode_enabled()):
            return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Small embeddings, zero output projections (the flow starts as the identity), torch's defaults elsewhere.

        position and class embeddings N(0, 0.01^2) · proj_out 0 · linear layers U(+-1/sqrt(fan_in)) · norms 1 and 0 ·
        prior variance 1.
        """
        initialise(module)
        if isinstance(module, TarFlowBlock):
            init.normal_(module.position_embedding, std=0.01)
            init.zeros_(module.proj_out.weight)
            init.zeros_(module.proj_out.bias)
        elif isinstance(module, TarFlowPreTrainedModel) and self.config.volume_preserving:
            init.ones_(self.prior_variance)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """`is_activation_checkpointing` by its former name, which PEFT asks for."""
        return self.is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Lets gradients flow through the entrance of every block, whose weights take none under an adapter.

        Reentrant checkpointing recomputes only layers whose input has a gradient. transformers and PEFT call this
        where they enable it.
        """
        self.disable_input_require_grads()

        def require_grad(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        blocks = cast(Sequence[TarFlowBlock], self.blocks)
        self._require_grads_hooks = [block.proj_in.register_forward_hook(require_grad) for block in blocks]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Has layers recompute their activations in the backward pass.

        Args:
            activation_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: Which layers, see transformers.
            offload: Whether what is kept goes to the host's memory.
        """
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            self.enable_input_require_grads()

    def enable_gradient_checkpointing(self) -> None:
        """`activation_checkpointing_enable()` by the name that diffusers' models have for it."""
        self.activation_checkpointing_enable()

    def disable_gradient_checkpointing(self) -> None:
        """`activation_checkpointing_disable()` by the name that diffusers' models have for it."""
        self.activation_checkpointing_disable()

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Stores the linear layers in a narrow type and widens each while it computes, as diffusers' models do.

        Args:
            storage_dtype: Of the weights between their uses.
            compute_dtype: Of the computation; None: the model's.
            **kwargs: Of `diffusers.hooks.apply_layerwise_casting`. What it skips by default, and embeddings of noise
                levels and conditions, are not stored so.
        """
        skipped = (*DEFAULT_SKIP_MODULES_PATTERN, "noise_embedding", "condition_embedding", "guidance_embedding")
        kwargs.setdefault("skip_modules_pattern", skipped)
        apply_layerwise_casting(self, storage_dtype, compute_dtype or self.dtype, **kwargs)

    @takes_arguments_of(apply_group_offloading)
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Offloads the weights in groups between their uses, as diffusers' models do.

        Decoding brings in a block at a time, and the score, which takes gradients, all of them: with
        `denoising_strength=0` no more than a block has to have room. Training needs the weights in place.
        """
        apply_group_offloading(self, *args, **kwargs)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Compiles the blocks one by one, as diffusers' models do: `compile_repeated_blocks(dynamic=True)`.

        Args:
            *args: Of `torch.compile`.
            **kwargs: By name.
        """
        for block in self.blocks:
            block.compile(*args, **kwargs)


def initialise(module: nn.Module) -> None:
    """Weights of the parts that a flow and its learned inverse share: torch's defaults, and small embeddings.

    class embeddings and what stands for no condition N(0, 0.01^2) · linear layers U(+-1/sqrt(fan_in)) · norms 1 and 0.

    Args:
        module: Any module; what is none of these is left as it is.
    """
    if isinstance(module, (nn.Linear, TarFlowProjection)):
        bound = module.in_features**-0.5
        init.uniform_(module.weight, -bound, bound)
        init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, TarFlowClassEmbedding):
        init.normal_(module.weight, std=0.01)
    elif isinstance(module, TarFlowConditionEmbedding):
        init.normal_(module.no_condition, std=0.01)


__all__ = ["TarFlowPreTrainedModel", "initialise"]

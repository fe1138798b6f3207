"""TarFlowModel: images to patches, through the flow blocks to latents and their log-density, and back.

Affine steps and log-determinants are float32 (or wider) whatever the weights' dtype. The blocks are in `blocks.py`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers import PreTrainedModel as PreTrainedModel  # the name that diffusers looks for beside the model's

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.affine import inverse_affine_step
from tarflow_hf.flow.blocks import TarFlowBlock
from tarflow_hf.flow.inputs import (
    check_conditioning,
    check_density,
    check_guesses,
    check_latents,
    check_pixel_values,
    checked_condition,
    checked_labels,
    checked_noise_levels,
)
from tarflow_hf.flow.kv_cache import KeyValueCache
from tarflow_hf.flow.likelihood import nats_per_dim, normal_log_prob
from tarflow_hf.flow.offloading import bring_in, held, is_hooked
from tarflow_hf.flow.outputs import LossWithoutLabels, TarFlowOutput
from tarflow_hf.flow.precision import working_dtype
from tarflow_hf.flow.pretrained import TarFlowPreTrainedModel
from tarflow_hf.flow.sampling.branches import Batch, invert_in_parts
from tarflow_hf.flow.sampling.compiled import CompilesDecoding
from tarflow_hf.flow.sampling.guidance import Guidance
from tarflow_hf.flow.sampling.memory import decoding_max_batch
from tarflow_hf.flow.sampling.nonfinite import advice, find_nonfinite, tell
from tarflow_hf.flow.sampling.solver import check_solver_arguments
from tarflow_hf.flow.sampling.windows import token_cost
from tarflow_hf.flow.signatures import takes_arguments_of
from tarflow_hf.flow.training_hints import hint_at_training
from tarflow_hf.hub.models import HubModel
from tarflow_hf.images.image_processor import TarFlowImageProcessor


class TarFlowModel(HubModel, CompilesDecoding, TarFlowPreTrainedModel, metaclass=LossWithoutLabels):
    """The TarFlow normalizing flow: an invertible map between images x in [-1, 1] and latents z ~ N(0, 1).

    z = f_K(... f_1(patches(x))), each block transforming token i by v_i = (u_i - b_i) exp(-a_i), where (b_i, a_i)
    depend on the tokens before i in the block's order and the first token is copied. Hence
    log p(x) = log N(z) - sum a.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329.

    Example:
        >>> config = TarFlowConfig(
        ...     image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1, num_classes=10
        ... )
        >>> model = TarFlowModel(config).eval()
        >>> images = torch.zeros(3, 1, 8, 8)
        >>> model.log_prob(images, class_labels=torch.tensor([0, 7, -1])).shape
        torch.Size([3])
        >>> output = model(images)
        >>> model.decode(output.latents).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(TarFlowBlock(config, index) for index in range(config.num_blocks))
        if config.volume_preserving:
            self.register_buffer("prior_variance", torch.ones(config.num_tokens, config.patch_dim))
        self.post_init()

    @takes_arguments_of(PreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: object, **kwargs: object) -> None:
        """Saves weights and configuration, and the image processor that does what training did to an image.

        Args:
            save_directory: The folder; made if missing.
            *args: As of `PreTrainedModel.save_pretrained`, and so are the others.
            **kwargs: By name.
        """
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process and self.config.num_channels in (1, 3):
            TarFlowImageProcessor.of(self.config).save_pretrained(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[arg-type]

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cuts images into patches: (batch, channels, height, width) -> (batch, tokens, patch_dim).

        Tokens are in raster order; inside a token the order is channel, row, column.
        """
        (rows, columns), patch = self.config.grid_size, self.config.patch_size
        patches = pixel_values.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Puts patches together, the inverse of `patchify`: (batch, tokens, patch_dim) -> images."""
        config, patch = self.config, self.config.patch_size
        grid = patches.unflatten(2, (config.num_channels, patch, patch)).unflatten(1, config.grid_size)
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def forward(
        self,
        pixel_values: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        labels: torch.Tensor | None = None,
        update_prior: bool = True,
        return_loss: bool = True,
    ) -> TarFlowOutput | tuple[torch.Tensor, ...]:
        """Encodes images into latents and computes the training loss.

        loss = mean(1/2 z^2) - mean(log_det) / (tokens * patch_dim), in nats per dimension.

        In training mode a volume-preserving model learns its prior on the way, as [`update_prior_variance`] does.

        Args:
            pixel_values: (batch, channels, height, width) images, nominally in [-1, 1], with the training noise on.
            class_labels: (batch,) integer classes; -1 or None is no label (the mean class embedding).
            noise_level: (batch,) standard deviation of the noise on each image, above 0; for a model with
                `noise_conditioning` and for no other.
            condition: (batch, condition_dim) numbers, in the units of the data they come from; None is none (a learned
                vector).
            condition_mask: (batch,) bool, False for the images without a condition; None: all have the one given.
            output_hidden_states: Whether to return the latents after each block. None: as the configuration says.
            return_dict: Whether to return a [`TarFlowOutput`] or a tuple of it. None: as the configuration says.
            labels: `class_labels` by the name that transformers' Trainer gives to a column `label`.
            update_prior: Whether training mode updates the prior variance; False for a loop that does so by itself.
            return_loss: Whether the output has the loss.

        Raises:
            ValueError: If the images, labels or noise levels do not fit the configuration.

        Reference: arXiv 2412.06329 (block autoregressive flows).
        """
        config = self.config
        if class_labels is not None and labels is not None:
            raise ValueError("class_labels and labels are two names for the same: give one of them, got both")
        check_pixel_values(pixel_values, config)
        given, on_cpu = labels if class_labels is None else class_labels, pixel_values.device.type == "cpu"
        labels = checked_labels(given, pixel_values, config, check_range=on_cpu)
        levels = checked_noise_levels(noise_level, pixel_values, config)
        vector = checked_condition(condition, condition_mask, pixel_values, config)
        if self.training:
            hint_at_training(pixel_values, given, config)
        patches = self._to_working_dtype(self.patchify(pixel_values))
        hidden_states, log_det = self._encode(patches, labels, levels, vector)
        latents = hidden_states[-1]
        if len(latents) and update_prior and self._learns_prior():
            self.update_prior_variance(latents.detach().square().mean(0))
        nats = nats_per_dim(latents, log_det)
        loss = None if not return_loss else nats.mean() if len(nats) else nats.sum()
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = TarFlowOutput(latents, log_det, loss, hidden_states if wanted else None)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def log_prob(
        self,
        pixel_values: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-density of images: log p(x) = log N(z; 0, prior variance) + log_det.

        Args:
            pixel_values: (batch, channels, height, width) images in the [-1, 1] pixel space.
            class_labels: (batch,) integer classes; -1 or None is no label.
            noise_level: (batch,) as in [`forward`]: the density is that of images with this much noise.
            condition: (batch, condition_dim) as in [`forward`].
            condition_mask: (batch,) as in [`forward`].

        Returns:
            (batch,) log-density in nats.

        Raises:
            ValueError: If an image has no finite log-density or is far outside of [-1, 1] (outside of `torch.compile`
                and `torch.func`), or does not fit the configuration.
        """
        check_conditioning(pixel_values, class_labels, condition, condition_mask, self.config)
        inputs = (pixel_values, class_labels, noise_level, condition, condition_mask)
        log_prob = self.log_prob_of(self(*inputs, return_dict=True, update_prior=False))
        check_density(log_prob, pixel_values, self.config)
        return log_prob

    @apply_forward_hook
    def log_prob_of(self, output: TarFlowOutput) -> torch.Tensor:
        """(batch,) log-density in nats of the images that a forward pass encoded, finite or not.

        Args:
            output: What [`forward`] returned.
        """
        latents, log_det = cast(torch.Tensor, output.latents), cast(torch.Tensor, output.log_det)
        with held(self, recurse=False):
            return normal_log_prob(latents, self._prior_variance()) + log_det

    def lowest_noise_level(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """The level at which images without noise are measured: the lowest that the model knows.

        Args:
            pixel_values: (batch, channels, height, width) images.

        Returns:
            (batch,) standard deviations, or None for a model without noise conditioning, which takes none.
        """
        if not self.config.noise_conditioning:
            return None
        return pixel_values.new_full(pixel_values.shape[:1], self.config.noise_range[0])

    @apply_forward_hook
    @torch.no_grad()
    def decode_blocks(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        *,
        noise_level: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        guidance: Guidance | Callable[[], Guidance | None] | None = None,
        window: int | None = None,
        tolerance: float = 1e-3,
        max_batch: int | None = None,
        guesses: Sequence[torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Decodes block by block, for whoever wants to look in between; [`decode`] has the arguments.

        Yields:
            After each block, from noise to image: (batch, tokens, patch_dim) patches in raster order, and its sweeps.
            Patches sent to the generator replace those for the next block. Lost images are yielded like others.
        """
        check_latents(latents, self.config)
        labels = checked_labels(class_labels, latents, self.config, check_range=True)
        check_solver_arguments(window, tolerance, max_batch)
        check_guesses(guesses, latents, self.config)
        if not (guidance is None or callable(guidance) or isinstance(guidance, Guidance)):
            raise ValueError(f"guidance must be a Guidance, a function that gives one or None, got {guidance!r:.80}")
        latents = self._of_prior(self._to_working_dtype(latents))
        if noise_level is None and self.config.noise_conditioning:
            noise_level = latents.new_full(latents.shape[:1], self.config.noise_range[1])
        levels = checked_noise_levels(noise_level, latents, self.config)
        vector = checked_condition(condition, condition_mask, latents, self.config, check_finite=True)
        labelled = class_labels is not None or condition is not None
        ask = guidance if callable(guidance) else lambda: guidance
        branches = 2 if callable(guidance) or (guidance is not None and guidance.acts(labelled=labelled)) else 1
        most = max_batch or decoding_max_batch(self.config, branches, self.dtype, latents.device)
        cache = KeyValueCache(self.config.num_tokens)
        rule: Guidance | None = None
        compiled, gradient_free = self._sweep(), torch.no_grad if is_hooked(self) else torch.inference_mode
        cost = partial(token_cost, self.config, dtype=self.dtype, device=latents.device, compiled=compiled is not None)
        for step, block in enumerate(reversed(cast(Sequence[TarFlowBlock], self.blocks))):
            former, now = rule, ask()
            rule = (
                now if now is not None and now.acts(labelled and block.is_conditioned) and now.guides(step) else None
            )
            if step and former is None and rule is not None:
                cache = KeyValueCache(self.config.num_tokens)  # with room for the second branch
            guess = None if guesses is None else block.in_order(guesses[step].to(latents.dtype))
            bring_in(self)  # whoever looked in between may have called another model
            with held(block):
                tokens, sweeps = invert_in_parts(
                    block,
                    Batch(block.in_order(latents), labels, levels, vector, guess),
                    rule,
                    cache,
                    compiled,
                    most=most,
                    gradient_free=gradient_free,
                    window=window,
                    tolerance=tolerance,
                    token_cost=cost,
                )
            replacement = yield (latents := block.in_order(tokens)), sweeps
            latents = latents if replacement is None else replacement

    @torch.no_grad()
    @takes_arguments_of(decode_blocks)
    def decode(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Turns latents into images, the inverse of encoding. No gradients.

        Args:
            latents: (batch, tokens, patch_dim) z ~ N(0, 1), in raster order. Not written to.
            class_labels: (batch,) integer classes; -1 or None is no label.
            noise_level: (batch,) standard deviation of the noise that the images shall have; None: the highest that a
                model with `noise_conditioning` knows.
            condition: (batch, condition_dim) numbers, in the units of the data they come from; None is none.
            condition_mask: (batch,) bool, False for the images without a condition.
            guidance: See [`Guidance`]; None for none. A function is asked anew at each block.
            window: Most tokens solved at once, see [`solver.solve`]; 1 is sequential, None chooses.
            tolerance: Largest change that counts as none; 0 gives the sequential answer for every window.
            max_batch: Most images decoded at once, at least 1, which bounds memory; None: as many as have room.
            guesses: For each block, from noise to image, (batch, tokens, patch_dim) patches that it is expected to
                give, in raster order: where the solver starts. None: at the block's input. The result is the same.

        Returns:
            (batch, channels, height, width) images, float32 or wider, not clipped to [-1, 1].

        Raises:
            ValueError: If an argument does not fit the configuration or is out of range.
            NonFiniteError: If images stop being finite; it says where. [`decode_blocks`] goes on with them.
        """
        for step, (patches, _) in enumerate(self.decode_blocks(*args, **kwargs), start=1):
            if (found := find_nonfinite(patches, self.config.num_blocks - step)) is not None:
                tell(advice(kwargs.get("guidance"), self.dtype), False, found)
        return self.unpatchify(patches)

    @torch.no_grad()
    def update_prior_variance(self, mean_square: torch.Tensor, momentum: float = 0.1) -> None:
        """Moves the prior variance of a volume-preserving model towards that of the latents.

        v <- (1 - momentum) v + momentum * mean_square. The forward pass does it in training mode; a loop that averages
        over several passes or processes calls the model with `update_prior=False`, and this once per step.

        Args:
            mean_square: (tokens, patch_dim) mean of z^2 over the whole batch, of all processes.
            momentum: Weight of the new value, in (0, 1].

        Raises:
            ValueError: If the model is not volume preserving: then its prior is the standard normal.
        """
        if not self.config.volume_preserving:
            raise ValueError("update_prior_variance needs a model with volume_preserving=True, got False")
        self.prior_variance.lerp_(mean_square.to(self.prior_variance.dtype), momentum)

    def _encode(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        levels: torch.Tensor | None,
        vector: torch.Tensor | None,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """All blocks: the latents after each, and the summed log-determinant."""
        hidden_states, log_det = [], latents.new_zeros(latents.shape[0])
        # In training mode each layer recomputes its own activations, in eval mode (denoising) each block does.
        recompute = not self.training and torch.is_grad_enabled() and self.is_activation_checkpointing
        encode = partial(checkpoint, self._encode_block, use_reentrant=False) if recompute else self._encode_block
        for block in cast(Sequence[TarFlowBlock], self.blocks):
            latents, block_log_det = encode(block, latents, labels, levels, vector)
            log_det = log_det + block_log_det
            hidden_states.append(latents)
        return tuple(hidden_states), log_det

    def _encode_block(
        self,
        block: TarFlowBlock,
        patches: torch.Tensor,
        labels: torch.Tensor | None,
        noise_level: torch.Tensor | None,
        vector: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """v_i = (u_i - b_i) exp(-a_i), v_0 = u_0, and the log-determinant -sum a; raster order in and out."""
        if patches.shape[1] == 1:  # a lone token is copied
            return patches, patches.new_zeros(patches.shape[0])
        tokens = block.in_order(patches)
        with held(block):
            condition = block.condition(labels, noise_level, vector)
            shift, log_scale = block(tokens[:, :-1], condition)  # the last has no successor
        encoded = torch.cat([tokens[:, :1], inverse_affine_step(tokens[:, 1:], shift, log_scale)], dim=1)
        return block.in_order(encoded), -log_scale.sum((1, 2))

    def _to_working_dtype(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the type that holds it, the weights and float32: where inputs of other types are reconciled."""
        return tensor.to(working_dtype(tensor.dtype, self._first_block.position_embedding.dtype))

    @property
    def _first_block(self) -> TarFlowBlock:
        return cast(TarFlowBlock, self.blocks[0])

    def _learns_prior(self) -> bool:
        """Whether this pass trains a volume-preserving model itself, not only an adapter on it."""
        trains = self.training and torch.is_grad_enabled() and self._first_block.position_embedding.requires_grad
        return self.config.volume_preserving and trains

    def _of_prior(self, latents: torch.Tensor) -> torch.Tensor:
        """z ~ N(0, 1) with the variance of the prior."""
        with held(self, recurse=False):
            variance = self._prior_variance()
            return latents if variance is None else latents * variance.to(latents.dtype).sqrt()

    def _prior_variance(self) -> torch.Tensor | None:
        """(tokens, patch_dim) variance of the prior, or None for the standard normal."""
        return self.prior_variance if self.config.volume_preserving else None


AutoModel.register(TarFlowConfig, TarFlowModel, exist_ok=True)

__all__ = ["TarFlowModel", "TarFlowOutput"]

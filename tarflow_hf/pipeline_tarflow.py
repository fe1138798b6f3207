"""TarFlowPipeline: from class labels to images, with guidance, denoising and the conventions of diffusers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.choices import Decoder, GuidanceRule, GuidanceSchedule, OnNonFinite
from tarflow_hf.flow.inputs import ClassLabel, check_callback, check_density, count_latents
from tarflow_hf.flow.offloading import OffloadingPipeline, held
from tarflow_hf.flow.sampling.branches import Batch
from tarflow_hf.flow.sampling.denoising import denoise
from tarflow_hf.flow.sampling.memory import denoising_chunk_size
from tarflow_hf.flow.sampling.nonfinite import MOST_REDRAWS, FreshNoise, NonFinite, Steps, advice, finite_steps, tell
from tarflow_hf.flow.sampling.one_pass import MOST_REJECTIONS, OnePass, check_decoder, check_inverse, rejection
from tarflow_hf.flow.sampling.preparing import Condition, Generators
from tarflow_hf.flow.sampling.running import Running, call_back
from tarflow_hf.flow.sampling.settings import CALL_ARGUMENTS, SamplingSettings, refinement_levels
from tarflow_hf.flow.signatures import documents_arguments
from tarflow_hf.hub.adapters import AdapterPipeline
from tarflow_hf.hub.inverse_model import TarFlowInverseModel
from tarflow_hf.hub.repositories import HubPipeline
from tarflow_hf.images.latents import Autoencoder, check_autoencoder
from tarflow_hf.images.pipeline_images import PipelineImages
from tarflow_hf.modeling_tarflow import TarFlowModel

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[..., dict[str, torch.Tensor] | None]
Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor

logger = logging.get_logger(__name__)


class TarFlowPipeline(Running, OnePass, PipelineImages, AdapterPipeline, OffloadingPipeline, HubPipeline):
    """Samples images from a [`TarFlowModel`], of pixels or of the latents of an autoencoder.

    Guidance and denoising defaults belong to a checkpoint: they are saved in `model_index.json`, and a call uses them
    wherever its own argument is None.

    Args:
        transformer: The [`TarFlowModel`].
        guidance_scale: Default guidance, at least 1; 1 is none. It is 1 + the paper's guidance weight w.
        guidance_schedule: Default schedule of guidance along the sequence, `"linear"` (the paper's annealed one) or
            `"constant"`.
        attention_temperature: Default attention temperature of the unlabelled branch, above 0; other than 1 it guides
            without labels.
        denoising_strength: Default multiplier of the denoising step, at least 0. None is 1 for a model trained with
            Gaussian noise and 0 for one trained with uniform noise.
        guidance_rule: Default rule by which guidance extrapolates, see [`Guidance`]. None is `"log_scale"`.
        num_refinement_steps: Default number of denoising steps. None is 1, and for a model with noise conditioning one
            for each hundredth of its highest noise level (the authors' choice).
        temperature: Default standard deviation of the latents that are drawn, above 0; 1 is the model's own
            distribution.
        vae: A diffusers autoencoder with a fixed grid of latents, which the transformer models, standardised by the
            autoencoder's own scaling: AutoencoderKL, AutoencoderTiny, AutoencoderDC. None: it models pixels.
        image_size: Side of the images, or (height, width), to cut the autoencoder's images to. None: not at all.
        inverse: A [`TarFlowInverseModel`] of this transformer, for `decoder="one_pass"` and `"refined"`. None: the
            exact decoder alone.

    Raises:
        ValueError: If a default is out of range, or the inverse is one of another flow.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329; for
    refinement arXiv 2604.20041.

    Example:
        >>> config = TarFlowConfig(
        ...     image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1, num_classes=10
        ... )
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(class_labels=[7, 3], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0].size
        (8, 8)
        >>> image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
        >>> decoded = pipe(latents=pipe.invert(image), denoising_strength=0.0, output_type="latent").images
        >>> torch.allclose(decoded, image, atol=1e-5)
        True
    """

    transformer: TarFlowModel
    inverse: TarFlowInverseModel | None
    _optional_components = ["vae", "inverse"]
    model_cpu_offload_seq = "inverse->transformer->vae"  # type: ignore[assignment]  # declared as None by diffusers
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: TarFlowModel,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        attention_temperature: float = 1.0,
        denoising_strength: float | None = None,
        guidance_rule: str | None = None,
        num_refinement_steps: int | None = None,
        vae: Autoencoder | None = None,
        image_size: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        inverse: TarFlowInverseModel | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(getattr(transformer, "config", None), TarFlowConfig):
            raise ValueError(f"transformer must be a TarFlowModel, got {type(transformer).__name__}")
        if inverse is not None and not hasattr(inverse, "config"):
            raise ValueError(f"inverse must be a TarFlowInverseModel, got {type(inverse).__name__}")
        check_autoencoder(vae, transformer.config, image_size)
        check_inverse(inverse, transformer)
        self.register_modules(transformer=transformer, vae=vae, inverse=inverse)
        if denoising_strength is None:
            denoising_strength = 1.0 if transformer.config.noise_type == "gaussian" else 0.0
        defaults = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "attention_temperature": attention_temperature,
            "denoising_strength": denoising_strength,
            "guidance_rule": guidance_rule,
            "num_refinement_steps": num_refinement_steps,
            "temperature": temperature,
        }
        SamplingSettings.of(defaults, {}).check(transformer.config)
        defaults = {name: value.item() if hasattr(value, "item") else value for name, value in defaults.items()}
        self.register_to_config(**defaults, image_size=image_size)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    @documents_arguments(CALL_ARGUMENTS)
    def __call__(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] | torch.Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        attention_temperature: float | None = None,
        denoising_strength: float | None = None,
        guidance_rule: GuidanceRule | None = None,
        num_guided_blocks: int | None = None,
        num_refinement_steps: int | None = None,
        refinement_noise: float = 0.0,
        refinement_levels: Sequence[float] | None = None,
        window: int | None = None,
        tolerance: float = 1e-3,
        on_nonfinite: OnNonFinite | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        condition: Condition | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        temperature: float | None = None,
        decoder: Decoder | None = None,
        max_error: float | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Images]:
        """Draws latents, decodes them block by block and denoises the result by the model's own score.

        Args:
            <arguments>

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them alone. After an interrupt, the images as they
            stand.

        Raises:
            ValueError: If an argument is out of range or does not fit the model.
        """
        settings = SamplingSettings.of(self.config, locals())
        self.check_inputs(settings, output_type)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        wanted = MOST_REDRAWS if settings.on_nonfinite == "redraw" else 0
        most_redraws = 0 if latents is not None else wanted if settings.max_error is None else MOST_REJECTIONS
        there = None if latents is None else count_latents(latents)
        labels = self.prepare_class_labels(class_labels, num_images_per_label, there)
        num_labels = None if labels is None else len(labels) // num_images_per_label
        vectors = self.prepare_condition(condition, num_images_per_label, num_labels)
        without = num_images_per_label if there is None or num_images_per_label > 1 else there
        batch = next((len(given) for given in (labels, vectors) if given is not None), without)
        drawn = self.prepare_latents(batch, generator, latents, settings.temperature)
        steps = self._finite_steps(Batch(drawn, labels, None, vectors), settings, generator, most_redraws)
        guides = settings.can_guide(labelled=labels is not None or vectors is not None)
        if guidance_scale is not None and guidance_scale > 1 and not guides:
            logger.warning("guidance_scale=%s has no effect on images without labels or conditions", guidance_scale)
        num_steps = settings.num_steps(self.transformer.config)
        with self.running(settings.guidance_scale, num_timesteps=num_steps, can_guide=guides):
            latents = self._run(steps, callback_on_step_end, warn=settings.on_nonfinite == "warn")
        images = self._output(self.transformer.unpatchify(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _finite_steps(
        self, batch: Batch, settings: SamplingSettings, generator: Generators | None, most_redraws: int
    ) -> Steps:
        """The steps, in which lost images are drawn anew, refused or said aloud, as the settings want it."""
        fresh = FreshNoise(generator, batch.latents)

        def start(images: list[int], redraws: int) -> Steps:
            if redraws == 0:
                return self._steps(batch, settings, generator)
            generators = fresh.of(images)
            drawn = self.prepare_latents(len(images), generators, temperature=settings.temperature)
            return self._steps(replace(batch.take(images), latents=drawn), settings, generators)

        acts = settings.guidance.acts(labelled=batch.labels is not None or batch.condition is not None)
        hint = advice(settings.guidance if acts else None, self.transformer.dtype)
        fail: Callable[[NonFinite], None] = partial(tell, hint, settings.on_nonfinite == "warn")
        if settings.max_error is not None:
            fail = rejection(settings.max_error)
        return finite_steps(start, list(range(len(batch.latents))), fail, most_redraws=most_redraws)

    def _steps(self, batch: Batch, settings: SamplingSettings, generator: Generators | None) -> Steps:
        """Decodes block by block, then denoises level by level; or does all that in one pass."""
        if settings.decoder == "one_pass":
            yield from self._one_pass_steps(batch, settings)
            return
        blocks = self.transformer.decode_blocks(
            batch.latents,
            batch.labels,
            condition=batch.condition,
            guidance=lambda: settings.guided_by(self.guidance_scale),
            window=settings.window,
            tolerance=settings.tolerance,
            guesses=self._predict(batch, settings).states if settings.decoder == "refined" else None,
        )
        latents, _ = next(blocks)
        for block in reversed(range(1, self.transformer.config.num_blocks)):
            latents, _ = blocks.send((yield block, latents))
        latents = yield 0, latents
        levels = settings.noise_levels(self.transformer.config)
        for index, (level, next_level) in enumerate(pairwise([*levels, 0.0])):
            images = self.transformer.unpatchify(latents)
            strength, fresh_noise = settings.denoising_strength, settings.refinement_noise
            own = (batch.labels, strength, level, next_level, fresh_noise, generator, batch.condition)
            with held(self.transformer):  # the score needs the weights until its backward pass
                images = self.denoise(images, *own)
            latents = yield -1 - index, self.transformer.patchify(images)

    def _run(self, steps: Steps, callback: StepCallback | None, *, warn: bool) -> torch.Tensor:
        """The patches after the last step, or after the one that the callback interrupted."""
        num_steps = self.num_timesteps
        with self.progress_bar(total=num_steps) as progress:
            block, latents = next(steps)
            for step in range(num_steps):
                progress.update()
                if callback is not None:
                    latents = call_back(callback, self, step, block, latents, warn=warn)
                if self.interrupt or step == num_steps - 1:
                    break
                block, latents = steps.send(latents)
        return latents

    def check_inputs(self, settings: SamplingSettings, output_type: str) -> None:
        """Raises ValueError for what is out of range; labels and latents are checked where they are prepared."""
        settings.check(self.transformer.config)
        check_decoder(settings, self.config, self.inverse, self.transformer)
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type must be one of {get_args(OutputType)}, got {output_type!r}")
        if output_type == "pil" and self.transformer.config.value_scale is not None:
            raise ValueError(
                "output_type='pil' needs a model of 8-bit images, this one is of arrays: use 'np' or 'pt'"
            )
        if output_type == "pil" and (channels := self.num_channels) not in (1, 3):
            raise ValueError(f"output_type='pil' needs a model of 1 or 3 channels, got num_channels={channels}")

    def denoise(
        self,
        images: torch.Tensor,
        class_labels: torch.Tensor | None,
        strength: float,
        noise_level: float | None = None,
        next_level: float = 0.0,
        fresh_noise: float = 0.0,
        generator: Generators | None = None,
        condition: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step along the model's score, x + strength * noise_level^2 grad log p(x | y), without guidance.

        The score is computed in the model's dtype, a chunk of images at a time so that memory stays bounded. After
        `pipe.transformer.activation_checkpointing_enable()` only one block's activations live at a time: the step
        computes a third more, and a chunk has room for more images.

        Args:
            images: (images, channels, height, width) samples in [-1, 1].
            class_labels: (images,) class ids or None.
            strength: At least 0; 1 is Tweedie's formula.
            noise_level: Standard deviation of the noise on the images. None: what the model was trained with, or the
                highest level of a model with noise conditioning.
            next_level: Standard deviation of the noise to keep, see [`denoising.denoise`].
            fresh_noise: How much of that is drawn anew, from 0 to 1.
            generator: Source of the new noise, or one per image.
            condition: (images, condition_dim) numbers or None.
            condition_mask: (images,) bool, False for the images without a condition; None: all have the one given.

        Raises:
            ValueError: If the model was made in torch's inference mode, whose weights let no gradients pass.
        """
        if any(weight.is_inference() for weight in self.transformer.parameters()):
            raise ValueError(
                "transformer must be made outside of torch.inference_mode() to give the score that denoises: load it "
                "again, or take denoising_strength=0"
            )
        level = refinement_levels(self.transformer.config, 1)[0] if noise_level is None else noise_level

        def log_prob(pixel_values: torch.Tensor, rows: slice) -> torch.Tensor:
            labels, vectors, mask = (
                None if given is None else given[rows] for given in (class_labels, condition, condition_mask)
            )
            levels = None
            if self.transformer.config.noise_conditioning:
                levels = pixel_values.new_full((len(pixel_values),), level)
            inputs = (pixel_values, labels, levels, vectors, mask)
            return self.transformer.log_prob_of(self.transformer(*inputs, return_dict=True, update_prior=False))

        return denoise(
            log_prob,
            images,
            level,
            next_std=next_level,
            strength=strength,
            fresh_noise=fresh_noise,
            generator=generator,
            chunk_size=denoising_chunk_size(
                self.transformer.config,
                self.transformer.dtype,
                self._execution_device,
                recompute=self.transformer.is_activation_checkpointing,
            ),
        )

    @torch.no_grad()
    def invert(
        self,
        images: PIL.Image.Image | Sequence[PIL.Image.Image] | torch.Tensor,
        class_labels: ClassLabel | Sequence[ClassLabel] | torch.Tensor | None = None,
        noise_level: float | None = None,
        condition: Condition | None = None,
    ) -> torch.Tensor:
        """Encodes images into latents; without guidance and denoising they are decoded to the same images.

        That is `pipe(labels, latents=..., guidance_scale=1, denoising_strength=0)`, whatever is saved; with an
        autoencoder it gives what that makes of the images.

        Args:
            images: Images of any size and mode, which are converted, resized and cropped as in training; or a (images,
                channels, height, width) tensor in [-1, 1] of the model's own size, which is taken as it is.
            class_labels: Class id, name or several of them, one per image; None: no labels.
            noise_level: Standard deviation of the noise that a model with noise conditioning takes the images to have;
                None: the highest it knows, which is the one of decoding.
            condition: As in a call.

        Returns:
            (images, tokens, patch_dim) latents, float32 or wider.

        Raises:
            ValueError: If labels and images differ in number, or do not fit the model.
        """
        config = self.transformer.config
        images = self._flow_input(images)
        labels = self.prepare_class_labels(class_labels, num_images=len(images))
        noise = None
        if config.noise_conditioning or noise_level is not None:
            level = config.noise_range[1] if noise_level is None else noise_level
            noise = torch.full((images.shape[0],), float(level), device=self._execution_device)
        vectors = self.prepare_condition(condition, num_labels=len(images))
        latents: torch.Tensor = self.transformer(images, labels, noise, vectors, return_dict=True).latents
        check_density(latents, images, config, of="invert")
        return latents


__all__ = ["TarFlowPipeline"]

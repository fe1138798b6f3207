"""TarFlowPipeline: from class labels to images, with guidance, denoising and the conventions of diffusers."""

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from tarflow_hf.flow.inputs import ClassLabel, check_latents, class_id
from tarflow_hf.flow.sampling.denoising import denoise
from tarflow_hf.flow.sampling.guidance import GuidanceRule, GuidanceSchedule
from tarflow_hf.flow.sampling.memory import denoising_chunk_size
from tarflow_hf.flow.sampling.settings import CALL_ARGUMENTS, SamplingSettings, refinement_levels
from tarflow_hf.flow.signatures import documents_arguments
from tarflow_hf.hub.repositories import HubPipeline
from tarflow_hf.images.processing import ImageFormat, preprocess_image, to_pixel_values
from tarflow_hf.modeling_tarflow import TarFlowModel

OutputType = Literal["pil", "np", "pt", "latent"]
Condition = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | torch.Tensor
Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor


class TarFlowPipeline(HubPipeline):
    """Samples images from a [`TarFlowModel`].

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

    Raises:
        ValueError: If a default is out of range.

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
    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]  # declared as None by diffusers
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
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        if denoising_strength is None:
            denoising_strength = 1.0 if transformer.config.noise_type == "gaussian" else 0.0
        defaults = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "attention_temperature": attention_temperature,
            "denoising_strength": denoising_strength,
            "guidance_rule": guidance_rule,
            "num_refinement_steps": num_refinement_steps,
        }
        SamplingSettings.of({}, defaults).check(transformer.config)
        self.register_to_config(**defaults)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop after its present step; set `pipe._interrupt = True` in a callback."""
        return self._interrupt

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        condition: Condition | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
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
        self.check_inputs(settings, output_type, callback_on_step_end_tensor_inputs)
        labels = self.prepare_class_labels(class_labels, num_images_per_label)
        num_labels = None if labels is None else len(labels) // num_images_per_label
        vectors = self.prepare_condition(condition, num_images_per_label, num_labels)
        batch = self._num_images(vectors if labels is None else labels, num_images_per_label, latents)
        latents = self.prepare_latents(batch, generator, latents)
        self._interrupt = False
        steps = self._steps(latents, labels, vectors, settings, generator)
        latents = self._run(steps, settings, callback_on_step_end)
        self.maybe_free_model_hooks()
        images = self.transformer.unpatchify(latents)
        images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _steps(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        condition: torch.Tensor | None,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Generator[tuple[int, torch.Tensor], torch.Tensor, None]:
        """Decodes block by block, then denoises level by level.

        Yields:
            After each step, the block, or -1, -2, ... for a denoising step, and the (images, tokens, patch_dim)
            patches. Those that are sent go into the next step.
        """
        blocks = self.transformer.decode_blocks(
            latents,
            labels,
            condition=condition,
            guidance=settings.guidance,
            window=settings.window,
            tolerance=settings.tolerance,
        )
        latents, _ = next(blocks)
        for block in reversed(range(1, self.transformer.config.num_blocks)):
            latents, _ = blocks.send((yield block, latents))
        latents = yield 0, latents
        levels = settings.noise_levels(self.transformer.config)
        for index, (level, next_level) in enumerate(pairwise([*levels, 0.0])):
            images = self.transformer.unpatchify(latents)
            strength, fresh_noise = settings.denoising_strength, settings.refinement_noise
            images = self.denoise(images, labels, strength, level, next_level, fresh_noise, generator, condition)
            latents = yield -1 - index, self.transformer.patchify(images)

    def _run(
        self,
        steps: Generator[tuple[int, torch.Tensor], torch.Tensor, None],
        settings: SamplingSettings,
        callback: Callable[..., dict[str, torch.Tensor] | None] | None,
    ) -> torch.Tensor:
        """The patches after the last step, or after the one that the callback interrupted."""
        config = self.transformer.config
        num_steps = config.num_blocks + len(settings.noise_levels(config))
        with self.progress_bar(total=num_steps) as progress:
            block, latents = next(steps)
            for step in range(num_steps):
                progress.update()
                if callback is not None:
                    latents = (callback(self, step, block, {"latents": latents}) or {}).get("latents", latents)
                if self.interrupt or step == num_steps - 1:
                    break
                block, latents = steps.send(latents)
        return latents

    def check_inputs(
        self, settings: SamplingSettings, output_type: str, callback_on_step_end_tensor_inputs: Sequence[str]
    ) -> None:
        """Raises ValueError for what is out of range; labels and latents are checked where they are prepared."""
        settings.check(self.transformer.config)
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type must be one of {get_args(OutputType)}, got {output_type!r}")
        num_channels = self.transformer.config.num_channels
        if output_type == "pil" and num_channels not in (1, 3):
            raise ValueError(f"output_type='pil' needs a model of 1 or 3 channels, got num_channels={num_channels}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )

    def prepare_class_labels(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] | torch.Tensor | None,
        num_images_per_label: int = 1,
    ) -> torch.Tensor | None:
        """Class ids or names as (images,) int64 ids on the pipeline's device, or None.

        Raises:
            ValueError: If the model is unconditional, the list is empty, or a class is unknown.
        """
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label must be at least 1, got {num_images_per_label}")
        if class_labels is None:
            return None
        if self.transformer.config.num_classes == 0:
            raise ValueError(f"class_labels must be None for an unconditional model, got {class_labels!r}")
        labels = np.atleast_1d(np.asarray(class_labels, dtype=object)).tolist()
        if not labels:
            raise ValueError("class_labels must name at least one class, got an empty list")
        ids = [class_id(label, self.transformer.config) for label in labels for _ in range(num_images_per_label)]
        return torch.tensor(ids, device=self._execution_device)

    def prepare_condition(
        self, condition: Condition | None, num_images_per_label: int = 1, num_labels: int | None = None
    ) -> torch.Tensor | None:
        """Conditions as (images, condition_dim) float32 numbers on the pipeline's device, or None.

        Raises:
            ValueError: If the model has no condition, or these have another length, a NaN, or another number than the
                labels.
        """
        if condition is None:
            return None
        size = self.transformer.config.condition_dim
        if size == 0:
            raise ValueError("condition must be None for a model without one (condition_dim=0)")
        vectors = torch.as_tensor(condition, dtype=torch.float32)
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != size or not vectors.numel():
            raise ValueError(f"condition must have condition_dim={size} numbers an image, got {tuple(vectors.shape)}")
        if not vectors.isfinite().all():
            raise ValueError(f"condition must be finite, got {vectors.tolist()}")
        if vectors.ndim == 1:
            vectors = vectors.expand(num_labels or 1, size)
        if num_labels not in (None, len(vectors)):
            raise ValueError(f"condition must be one, or one for each of {num_labels} labels, got {len(vectors)}")
        return vectors.repeat_interleave(num_images_per_label, 0).to(self._execution_device)

    def prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, tokens, patch_dim) float32 latents on the pipeline's device: those given, or z ~ N(0, 1).

        Raises:
            ValueError: If the latents given have another shape or are not finite, or if there is not one generator
                per image.
        """
        config = self.transformer.config
        if latents is None:
            if isinstance(generator, list) and len(generator) != batch:
                raise ValueError(
                    f"generator must be one or one per image: {batch} images, {len(generator)} generators"
                )
            shape = (batch, config.num_tokens, config.patch_dim)
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        check_latents(latents, config, batch)
        return latents.to(self._execution_device, torch.float32)

    def denoise(
        self,
        images: torch.Tensor,
        class_labels: torch.Tensor | None,
        strength: float,
        noise_level: float | None = None,
        next_level: float = 0.0,
        fresh_noise: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        condition: torch.Tensor | None = None,
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
        """
        level = refinement_levels(self.transformer.config, 1)[0] if noise_level is None else noise_level

        def log_prob(pixel_values: torch.Tensor, rows: slice) -> torch.Tensor:
            labels, vectors = (None if given is None else given[rows] for given in (class_labels, condition))
            levels = None
            if self.transformer.config.noise_conditioning:
                levels = pixel_values.new_full((len(pixel_values),), level)
            return self.transformer.log_prob(pixel_values, labels, levels, vectors)

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
        """Encodes images into latents, which `pipe(latents=..., denoising_strength=0)` decodes to the same images.

        Args:
            images: Images of any size and mode, which are converted, resized and cropped as in training; or a (images,
                channels, height, width) tensor in [-1, 1] of the model's own size, which is taken as it is.
            class_labels: Class id, name or several of them, one per image; None: no labels.
            noise_level: Standard deviation of the noise that a model with noise conditioning takes the images to have;
                None: the highest it knows, which is the one of decoding.
            condition: As in a call.

        Returns:
            (images, tokens, patch_dim) float32 latents.

        Raises:
            ValueError: If labels and images differ in number, or do not fit the model.
        """
        config = self.transformer.config
        if not isinstance(images, torch.Tensor):
            images = [images] if isinstance(images, PIL.Image.Image) else list(images)
            image_format = ImageFormat(config.image_size, config.num_channels)
            images = to_pixel_values(torch.stack([preprocess_image(image, image_format) for image in images]))
        labels = self.prepare_class_labels(class_labels)
        levels = None
        if config.noise_conditioning or noise_level is not None:
            level = config.noise_range[1] if noise_level is None else noise_level
            levels = torch.full((images.shape[0],), float(level), device=self._execution_device)
        vectors = self.prepare_condition(condition, num_labels=len(images))
        return self.transformer(images.to(self._execution_device), labels, levels, vectors).latents

    def _num_images(self, labels: torch.Tensor | None, num_images_per_label: int, latents: torch.Tensor | None) -> int:
        if labels is not None:
            return labels.shape[0]
        if latents is not None and num_images_per_label == 1:
            return latents.shape[0]
        return num_images_per_label


__all__ = ["TarFlowPipeline"]

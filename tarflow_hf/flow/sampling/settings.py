"""What a sampling call goes by: its arguments, where they are None the saved defaults, and what follows from both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.choices import Decoder, GuidanceRule, GuidanceSchedule, OnNonFinite
from tarflow_hf.flow.inputs import is_finite
from tarflow_hf.flow.sampling.denoising import check_fresh_noise, check_levels, even_levels
from tarflow_hf.flow.sampling.guidance import Guidance
from tarflow_hf.flow.sampling.solver import check_solver_arguments
from tarflow_hf.flow.signatures import arguments_of


@dataclass(frozen=True)
class SamplingSettings:
    """How latents become images, whatever the labels and the latents are.

    Args:
        guidance_scale: At least 1; 1 is no guidance. It is 1 + the paper's weight w. None: the saved default.
        guidance_schedule: `"linear"` or `"constant"`, see [`Guidance`]. None: the saved default.
        attention_temperature: Above 0; of the unlabelled branch, see [`Guidance`]. None: the saved default.
        denoising_strength: At least 0; 0 is off, 1 is Tweedie's formula, see [`denoising.denoise`]. None: the
            saved default.
        guidance_rule: `"log_scale"`, `"scale"` or `"product"`, see [`Guidance`]. None: the saved default.
        temperature: Standard deviation of the latents that are drawn, above 0. 1 is the model's own distribution,
            less makes images that vary less and are likelier. None: the saved default.
        num_guided_blocks: How many blocks are guided, the first ones in sampling; at most all. None: all.
        num_refinement_steps: At least 1; denoising steps of a model with noise conditioning, which go from its
            highest noise level down to none. Any other model takes one. None: the saved default.
        refinement_noise: From 0 (deterministic: the probability flow ODE) to 1 (the SDE): how much of the noise
            that a refinement step leaves is drawn anew.
        refinement_levels: Noise levels at the start of each refinement step, falling and within the model's range,
            in place of `num_refinement_steps`. None: evenly spaced, see [`denoising.even_levels`].
        window: Most tokens solved at once, see [`solver.solve`]; 1 is sequential, None chooses.
        tolerance: Largest change of a token, in the units of [-1, 1] pixels, that counts as none when decoding.
        decoder: `"exact"`: the flow's blocks are solved one after the other. `"one_pass"`: the image of the pipeline's
            learned inverse, without noise; guidance from 1 to what it has learned. `"refined"`: exact, and the solver
            starts at what the inverse expects each block to give.
        max_error: With `decoder="one_pass"`: images whose `reconstruction_error` is larger are drawn anew, at most 20
            times; what remains is an error, as it is at once with `latents`. None: all are taken.
        on_nonfinite: What happens to images that become infinite or no numbers. `"redraw"`: they alone are drawn anew,
            at most three times, with noise from their own generators (where there is one for all or none, from ones
            that their lost latents seed), and the others are as without it; what remains is an error, as it is at
            once with `latents`. `"raise"`: an error. `"warn"`: a warning, and the call goes on with them.

    Example:
        >>> saved = {"guidance_scale": 2.0, "denoising_strength": 1.0}
        >>> settings = SamplingSettings.of(saved, {"guidance_scale": None, "window": 4})
        >>> settings.guidance.scale, settings.noise_levels(TarFlowConfig(noise_std=0.1))
        (2.0, [0.1])
    """

    guidance_scale: float = 1.0
    guidance_schedule: GuidanceSchedule = "linear"
    attention_temperature: float = 1.0
    denoising_strength: float = 0.0
    guidance_rule: GuidanceRule | None = None
    temperature: float = 1.0
    num_guided_blocks: int | None = None
    num_refinement_steps: int | None = None
    refinement_noise: float = 0.0
    refinement_levels: Sequence[float] | None = None
    window: int | None = None
    tolerance: float = 1e-3
    decoder: Decoder = "exact"
    max_error: float | None = None
    on_nonfinite: OnNonFinite = "redraw"

    @classmethod
    def of(cls, defaults: Mapping[str, Any], arguments: Mapping[str, Any]) -> "SamplingSettings":
        """The arguments of a call, with defaults in place of those that are None.

        Args:
            defaults: What a pipeline was saved with, by name.
            arguments: Those of the call, by name. Others than the settings may be among them.

        Raises:
            ValueError: If both the number of refinement steps and their levels are given, or temperature and latents.
        """
        if arguments.get("temperature") is not None and arguments.get("latents") is not None:
            raise ValueError("give temperature or latents: it is that of latents which are drawn, got both")
        steps, levels = arguments.get("num_refinement_steps"), arguments.get("refinement_levels")
        if steps is not None and levels is not None:
            raise ValueError(f"give num_refinement_steps or refinement_levels, got {steps} and {levels}")
        names = [field.name for field in fields(cls)]
        saved = {name: defaults[name] for name in names if name in defaults}
        given = {name: arguments[name] for name in names if arguments.get(name) is not None}
        return cls(**(saved | given))

    @cached_property
    def guidance(self) -> Guidance:
        """How guidance acts. Raises ValueError if a value is out of range."""
        return Guidance(
            self.guidance_scale,
            self.guidance_schedule,
            self.attention_temperature,
            rule="log_scale" if self.guidance_rule is None else self.guidance_rule,
            num_guided_blocks=self.num_guided_blocks,
        )

    def guided_by(self, scale: float) -> Guidance | None:
        """How guidance acts at another scale; None where that is 1 or less.

        Args:
            scale: The scale of the blocks to come.
        """
        return replace(self.guidance, scale=scale) if scale > 1 else None

    def can_guide(self, *, labelled: bool) -> bool:
        """Whether the two branches of a call differ, so that guidance can act at a scale above 1.

        Args:
            labelled: Whether the call has labels or conditions.
        """
        return labelled or self.attention_temperature != 1

    def noise_levels(self, config: TarFlowConfig) -> list[float]:
        """The noise level at the start of each denoising step that is taken.

        Args:
            config: Of the model, for the levels that it knows.
        """
        levels = refinement_levels(config, self.num_refinement_steps, self.refinement_levels)
        return levels if self.denoising_strength else []

    def num_steps(self, config: TarFlowConfig) -> int:
        """The steps of a call: one for each block and each noise level, or the one pass of a learned inverse.

        Args:
            config: Of the model.
        """
        return 1 if self.decoder == "one_pass" else config.num_blocks + len(self.noise_levels(config))

    def check(self, config: TarFlowConfig) -> None:
        """Raises ValueError for what is out of range or does not fit the model.

        Args:
            config: Of the model.
        """
        _ = self.guidance
        check_temperature(self.temperature)
        if self.num_guided_blocks is not None and self.num_guided_blocks > config.num_blocks:
            raise ValueError(
                f"num_guided_blocks must be at most num_blocks={config.num_blocks}, got {self.num_guided_blocks}"
            )
        check_denoising_strength(self.denoising_strength, config)
        self.noise_levels(config)
        check_fresh_noise(self.refinement_noise)
        check_solver_arguments(self.window, self.tolerance)
        if self.decoder not in get_args(Decoder):
            raise ValueError(f"decoder must be one of {get_args(Decoder)}, got {self.decoder!r}")
        if self.max_error is not None and not (is_finite(self.max_error) and self.max_error > 0):
            raise ValueError(f"max_error must be finite and above 0, got {self.max_error!r}")
        if self.on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"on_nonfinite must be one of {get_args(OnNonFinite)}, got {self.on_nonfinite!r}")


CALL_ARGUMENTS = f"""\
class_labels: Class id, class name (of `transformer.config.id2label`) or several of them, an image each; -1
    is no label. None: images without labels.
num_images_per_label: Images for each label (or condition), at least 1, next to each other in the result.
{arguments_of(SamplingSettings)}
generator: Source of the latents and of the refinement noise, or one per image: an image then depends on
    its own generator alone (up to `tolerance`), not on the others of its batch.
latents: (images, tokens, patch_dim) latents to use, as they are, instead of drawing them.
condition: (images, condition_dim) numbers, in the units of the data they come from, for a model with a
    `condition_dim`; one vector alone is for every label. None: images without a condition.
output_type: `"pil"`, `"np"` ((images, height, width, channels) in [0, 1]), `"pt"` ((images, channels,
    height, width) in [0, 1]), both in float64 and the units of the data where these are arrays; or `"latent"`:
    the sample as the model gives it, in [-1, 1] and not clipped; with an autoencoder its latents, scaled as
    elsewhere in diffusers: `vae.decode` takes `latents / scaling_factor + shift_factor`.
return_dict: Whether to return an `ImagePipelineOutput` or a tuple.
callback_on_step_end: Called as f(pipe, step, block, tensors) after each block (steps 0, 1, ...; `block`
    counts down to 0) and after each denoising step (`block` is -1, -2, ...). A returned dict may replace
    `latents`.
callback_on_step_end_tensor_inputs: Names of the tensors it gets; `"latents"` are (images, tokens,
    patch_dim) patches in raster order.
"""
"""What each argument of a pipeline's call means."""


def refinement_levels(
    config: TarFlowConfig, num_steps: int | None = None, levels: Sequence[float] | None = None
) -> list[float]:
    """The noise level at the start of each denoising step.

    Args:
        config: Of the model, for the levels that it knows.
        num_steps: At least 1, and no more for a model without noise conditioning. None: one for each hundredth of the
            highest level.
        levels: The levels themselves, which are checked. None: evenly spaced.

    Returns:
        Standard deviations, falling.

    Raises:
        ValueError: If number or levels do not fit the model.

    Reference: arXiv 2604.20041.

    Example:
        >>> refinement_levels(TarFlowConfig(noise_conditioning=True, noise_range=(0.25, 0.75)), num_steps=3)
        [0.75, 0.5, 0.25]
    """
    low, high = config.noise_range if config.noise_conditioning else (config.noise_std, config.noise_std)
    if levels is not None:
        check_levels(levels, (low, high))
        return list(levels)
    if not config.noise_conditioning and num_steps not in (None, 1):
        raise ValueError(f"num_refinement_steps must be 1 for a model without noise conditioning, got {num_steps}")
    default = max(1, round(100 * high)) if config.noise_conditioning else 1
    return even_levels((low, high), default if num_steps is None else num_steps)


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless a temperature is finite and above 0.

    Example:
        >>> check_temperature(0.0)
        Traceback (most recent call last):
            ...
        ValueError: temperature must be finite and above 0, got 0.0
    """
    if not (is_finite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature!r}")


def check_denoising_strength(strength: float, config: TarFlowConfig) -> None:
    """Raises ValueError unless the strength is finite, at least 0, and fits the noise of the model's training.

    Example:
        >>> check_denoising_strength(1.0, TarFlowConfig(noise_type="uniform"))
        Traceback (most recent call last):
            ...
        ValueError: denoising_strength must be 0 for a model trained with uniform noise, got 1.0: the score removes ...
    """
    if not (is_finite(strength) and strength >= 0):
        raise ValueError(f"denoising_strength must be finite and at least 0, got {strength!r}")
    if strength > 0 and config.noise_type != "gaussian":
        raise ValueError(
            f"denoising_strength must be 0 for a model trained with {config.noise_type} noise, got {strength}: "
            "the score removes Gaussian noise"
        )


__all__ = ["CALL_ARGUMENTS", "SamplingSettings", "check_denoising_strength", "check_temperature", "refinement_levels"]

"""Sampling with a learned inverse: the image in one pass, how far it is from the exact one, and first guesses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tarflow_hf.flow.choices import Decoder
from tarflow_hf.flow.inputs import ClassLabel, count_latents
from tarflow_hf.flow.inverse.configuration import LEARNED_SETTINGS
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint, same_flow
from tarflow_hf.flow.sampling.branches import Batch
from tarflow_hf.flow.sampling.guided_encoding import checked_batch, guided_latents
from tarflow_hf.flow.sampling.nonfinite import NonFinite, Steps
from tarflow_hf.flow.sampling.preparing import Condition, Preparing
from tarflow_hf.flow.sampling.settings import SamplingSettings

MOST_REJECTIONS = 20
"""How often an image is drawn anew whose error is above `max_error`."""

_MEANT_BY_NONE = {"guidance_rule": "log_scale", "num_refinement_steps": 1}  # of a flow with one noise level
_OF_THE_SOLVER = ("num_guided_blocks", "refinement_levels", "window")


class InverseMismatchError(ValueError):
    """A learned inverse does not belong to the flow that it stands beside, or has learned nothing yet."""


class OnePass(Preparing):
    """The part of a pipeline that decodes with a learned inverse.

    Example:
        >>> flow = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)).eval()
        >>> config = TarFlowInverseConfig(flow=flow.config, hidden_size=64, num_layers=3, num_training_steps=1)
        >>> pipe = TarFlowPipeline(transformer=flow, inverse=TarFlowInverseModel(config).eval())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> latents = torch.randn(4, 16, 4)
        >>> pipe(latents=latents, decoder="one_pass", output_type="pt").images.shape
        torch.Size([4, 1, 8, 8])
        >>> pipe.reconstruction_error(latents).shape
        torch.Size([4])
    """

    inverse: Any  # a TarFlowInverseModel, or None
    config: Any

    @torch.no_grad()
    def reconstruction_error(
        self,
        latents: torch.Tensor,
        class_labels: ClassLabel | Sequence[ClassLabel] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        condition: Condition | None = None,
    ) -> torch.Tensor:
        """How far the image of one pass is from the exact one, per image: e = rms(F(u) - z).

        z are the latents asked for, u is the noisy image that the inverse makes of them, before it takes the noise
        away, and F encodes it with the exact flow, under guidance where there is any: one parallel pass. 0 means that
        exact decoding would give the same; sqrt(2) is what latents have that know nothing of each other.

        Args:
            latents: (images, tokens, patch_dim) z.
            class_labels: Class id, name or several of them, one per image; None: no labels.
            guidance_scale: At least 1; None: the pipeline's default.
            condition: As in a call.

        Returns:
            (images,) errors in standard deviations of the latents, float32 or wider.

        Raises:
            ValueError: If the pipeline has no trained inverse of its flow, or an argument does not fit.
        """
        settings = SamplingSettings.of(self.config, {"guidance_scale": guidance_scale, "decoder": "one_pass"})
        settings.check(self.transformer.config)
        check_decoder(settings, self.config, self.inverse, self.transformer)
        latents = self.prepare_latents(count_latents(latents), latents=latents)
        labels = self.prepare_class_labels(class_labels, num_images=len(latents))
        vectors = self.prepare_condition(condition, num_labels=len(latents))
        batch = Batch(latents, labels, None, vectors)
        return self._error(self._predict(batch, settings).states[-1], batch, settings)

    def _predict(self, batch: Batch, settings: SamplingSettings) -> Any:  # noqa: ANN401  # a TarFlowInverseOutput
        """The image and the states that the inverse makes of latents."""
        labelled = batch.labels is not None or batch.condition is not None
        scale = settings.guidance_scale if settings.guidance.acts(labelled=labelled) else 1.0
        device = batch.latents.device  # as a tensor, since torch.compile makes a graph for each number
        given = torch.tensor(scale, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        return self.inverse(batch.latents, batch.labels, batch.condition, guidance_scale=given, return_dict=True)

    def _error(self, noisy: torch.Tensor, batch: Batch, settings: SamplingSettings) -> torch.Tensor:
        """See [`reconstruction_error`]."""
        labelled = batch.labels is not None or batch.condition is not None
        rule = settings.guidance if settings.guidance.acts(labelled=labelled) else None
        encoded = guided_latents(
            self.transformer, checked_batch(self.transformer, noisy, batch.labels, batch.condition), rule
        )
        return (encoded - batch.latents.to(encoded.dtype)).square().mean((1, 2)).sqrt()

    def _one_pass_steps(self, batch: Batch, settings: SamplingSettings) -> Steps:
        """One step, which gives the image; those whose error is above `max_error` become NaN, and so are redrawn."""
        output = self._predict(batch, settings)
        patches = output.patches
        if settings.max_error is not None:
            rejected = ~(self._error(output.states[-1], batch, settings) <= settings.max_error)
            patches = patches.masked_fill(rejected[:, None, None], float("nan"))
        yield 0, patches


def rejection(max_error: float) -> Callable[[NonFinite], None]:
    """What happens to images that no redrawing brought below the largest error: an error that says which.

    Args:
        max_error: The largest error.

    Example:
        >>> from tarflow_hf.flow.sampling.nonfinite import NonFinite
        >>> rejection(0.1)(NonFinite([3], block=0, position=0, redraws=20))
        Traceback (most recent call last):
            ...
        ValueError: max_error=0.1: images [3] had a larger error 21 times: raise it, or take decoder='refined'
    """

    def fail(found: NonFinite) -> None:
        tries = "" if found.redraws == 0 else f" {found.redraws + 1} times"
        raise ValueError(
            f"max_error={max_error}: images {found.images} had a larger error{tries}: raise it, or take "
            "decoder='refined'"
        )

    return fail


def check_inverse(inverse: Any, transformer: Any) -> None:  # noqa: ANN401  # models, which are defined above this room
    """Raises InverseMismatchError unless an inverse belongs to a flow.

    Compared are shape, classes and conditions, and a fingerprint of the flow's weights.

    Args:
        inverse: The inverse, or None.
        transformer: The flow.

    Example:
        >>> flow = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2))
        >>> other = TarFlowConfig(image_size=16, num_channels=1, hidden_size=64, num_blocks=2)
        >>> check_inverse(TarFlowInverseModel(TarFlowInverseConfig(flow=other, hidden_size=64, num_layers=3)), flow)
        Traceback (most recent call last):
            ...
        tarflow_hf.flow.sampling.one_pass.InverseMismatchError: inverse is one of a flow with image_size=16, ...
    """
    if inverse is None:
        return
    if not hasattr(inverse.config, "flow_config"):
        raise InverseMismatchError(f"inverse must be a TarFlowInverseModel, got {type(inverse).__name__}")
    ours, its = transformer.config, inverse.config.flow_config
    for name in (
        "image_size num_channels patch_size num_blocks num_classes condition_dim condition_mean condition_std "
        "volume_preserving noise_type noise_std noise_conditioning noise_range"
    ).split():
        here, there = getattr(ours, name), getattr(its, name)
        if here != there:
            raise InverseMismatchError(
                f"inverse is one of a flow with {name}={there}, and the transformer has {name}={here}"
            )
    fingerprint = inverse.config.flow_fingerprint
    if fingerprint is not None and not same_flow(fingerprint, flow_fingerprint(transformer.blocks)):
        raise InverseMismatchError(
            "inverse was trained for another flow: the weights of the transformer are not those it has learned to "
            "invert; train it anew with examples/train_inverse.py"
        )


def check_decoder(
    settings: SamplingSettings,
    defaults: Mapping[str, Any],
    inverse: Any,  # noqa: ANN401
    transformer: Any,  # noqa: ANN401
) -> None:
    """Raises ValueError unless a pipeline can decode as its call asks.

    Args:
        settings: Of the call.
        defaults: Saved with the pipeline.
        inverse: The inverse, or None.
        transformer: The flow.

    Example:
        >>> flow = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2))
        >>> from tarflow_hf.flow.sampling.settings import SamplingSettings
        >>> check_decoder(SamplingSettings(decoder="one_pass"), {}, None, flow)
        Traceback (most recent call last):
            ...
        ValueError: decoder='one_pass' needs a pipeline with an inverse, see examples/train_inverse.py; ...
    """
    decoder: Decoder = settings.decoder
    if settings.max_error is not None and decoder != "one_pass":
        raise ValueError(f"max_error needs decoder='one_pass': what is exact has no error, got decoder={decoder!r}")
    if decoder == "exact":
        return
    if inverse is None:
        raise ValueError(
            f"decoder={decoder!r} needs a pipeline with an inverse, see examples/train_inverse.py; this one has none"
        )
    if inverse.config.num_training_steps == 0:
        raise InverseMismatchError(f"decoder={decoder!r} needs a trained inverse: this one has num_training_steps=0")
    check_inverse(inverse, transformer)
    if settings.guidance_scale > inverse.config.max_guidance_scale:
        raise ValueError(
            f"guidance_scale must be at most {inverse.config.max_guidance_scale} with decoder={decoder!r}, what the "
            f"inverse has learned, got {settings.guidance_scale}"
        )
    if decoder == "refined":
        return
    learned_settings = inverse.config.learned_settings or defaults
    for name in (*LEARNED_SETTINGS, *_OF_THE_SOLVER):
        given = getattr(settings, name)
        learned = (learned_settings if name in LEARNED_SETTINGS else defaults).get(name)
        meant = _MEANT_BY_NONE.get(name)
        if (meant if given is None else given) != (meant if learned is None else learned):
            raise ValueError(
                f"{name} must be {learned} with decoder='one_pass', whose inverse has learned that, got {given}"
            )


__all__ = ["MOST_REJECTIONS", "InverseMismatchError", "OnePass", "check_decoder", "check_inverse", "rejection"]

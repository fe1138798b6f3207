"""What a learned inverse is trained on: a frozen flow's own trajectories, of real images and of latents it never saw.

Real images. One encoding pass gives z and all states u^k between the blocks, with the noise of the flow's training;
the clean image is known. Nothing has to be decoded:

    L = sum_k mean h((R_k h^k - u^k) / s_k) + c mean h((G(z) - x) / s_1) + d mean |f(G(z)) - f(x)|^2 / |f(x)|^2,

with weights c and d and the features f of a network that the user names, if any. Where the pipeline takes a share s of
the noise away (its `denoising_strength`) x is u^0 + s (clean - u^0): at s = 0 the noisy image, for a decoder that
bears it.

Drawn latents, with the same loss. z ~ N(0, 1) with any label and guidance scale w: what encoded images lack. The
inverse's own states are first guesses, which the flow corrects by a few parallel sweeps of each guided block,
u <- v exp(a(u)) + b(u), block after block; the image is the last state after the flow's score step. A sweep makes one
more token exact and brings the others nearer, so that corrected states are better targets than the guesses, and exact
once the guesses are. They cost a few passes where decoding costs one for each token, and are those of the guided flow
at the scale that is asked for. With as many sweeps as tokens follow the first they are exact, whatever the guesses.
Then the flow decodes token by token, which gives the same and for short sequences costs less than a few sweeps.

h is twice Huber's loss with the bound 3: a sweep from a poor guess may throw a token far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tarflow_hf.flow.affine import affine_step
from tarflow_hf.flow.blocks import TarFlowBlock
from tarflow_hf.flow.inverse.network import TarFlowInverseOutput
from tarflow_hf.flow.kv_cache import KeyValueCache
from tarflow_hf.flow.sampling.branches import Batch, invert_block, predictor
from tarflow_hf.flow.sampling.guidance import Guidance
from tarflow_hf.flow.sampling.guided_encoding import checked_batch
from tarflow_hf.flow.sampling.settings import SamplingSettings
from tarflow_hf.images.latents import decode_latents
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.augmentation import MicroBatch

_BOUND = 3.0
_LEAST = 1e-12  # of |f(x)|^2


class Features(Protocol):
    """A network whose features of images shall agree, as a `FeatureExtractor` of the metrics is.

    Example:
        >>> from tarflow_hf.metrics.features import FeatureExtractor
        >>> features: Features = FeatureExtractor.of_module(torch.nn.Flatten(), "pixels")
        >>> features.network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    @property
    def network(self) -> nn.Module:
        """From (batch, channels, height, width) levels to (batch, num_features)."""
        ...

    def fingerprint(self) -> str:
        """A hash of what the features depend on."""
        ...


@dataclass(frozen=True)
class Lesson:
    """n real images, encoded, and m drawn latents after them.

    Args:
        latents: (n + m, tokens, patch_dim), those of real images first.
        labels: (n + m,) classes, -1 for none; None for an unconditional flow.
        condition: (n + m, condition_dim); None for a flow without one.
        condition_mask: (n + m,) bool, or None.
        guidance_scale: (n + m,), 1 for real images.
        states: For each block, from noise to image, (n, tokens, patch_dim) states of the real images.
        images: (n, tokens, patch_dim) patches that the real images' latents shall give.
        guidance: Of the drawn latents; None for none.

    Example:
        See [`Teacher.lesson`], which makes it.

        >>> "guidance" in Lesson.__dataclass_fields__
        True
    """

    latents: torch.Tensor
    labels: torch.Tensor | None
    condition: torch.Tensor | None
    condition_mask: torch.Tensor | None
    guidance_scale: torch.Tensor
    states: tuple[torch.Tensor, ...]
    images: torch.Tensor
    guidance: Guidance | None


class Teacher:
    """A frozen flow that makes lessons for its inverse and corrects what the inverse says.

    Args:
        pipe: The pipeline of the flow; its saved guidance and denoising are what the inverse learns.
        sweeps: How many times a block corrects the states of drawn latents, which are exact from T - 1 of T tokens on.
        image_weight: c, of the image's error beside that of each state.
        features: A network from levels 0 ... 255, also between whole ones, to f; None for none.
        feature_weight: d, of their relative error.

    Raises:
        ValueError: If the flow has noise conditioning.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> teacher = Teacher(TarFlowPipeline(transformer=TarFlowModel(config)), sweeps=2)
        >>> images, drawn = torch.zeros(3, 1, 8, 8), torch.randn(3, 16, 4)
        >>> lesson = teacher.lesson((images + 0.05, None), images, drawn, None, guidance_scale=1.0)
        >>> inverse = TarFlowInverseModel(TarFlowInverseConfig(flow=config, hidden_size=64, num_layers=3))
        >>> loss, error = teacher.loss(lesson, inverse(lesson.latents), inverse.state_scale)
        >>> loss.requires_grad, error.requires_grad
        (True, False)
    """

    def __init__(
        self,
        pipe: TarFlowPipeline,
        *,
        sweeps: int,
        image_weight: float = 1.0,
        features: Features | None = None,
        feature_weight: float = 1.0,
    ) -> None:
        if pipe.transformer.config.noise_conditioning:
            raise ValueError("flow must be a model with one noise level, got one with noise_conditioning")
        self.pipe = pipe
        self.flow = pipe.transformer.eval().requires_grad_(False)
        self.vae = None if pipe.vae is None else pipe.vae.eval().requires_grad_(False)
        self.sweeps, self.image_weight, self.feature_weight = sweeps, image_weight, feature_weight
        self.network = None
        if features is not None:
            self.network = features.network.to(pipe.device).eval().requires_grad_(False)
        self.settings = SamplingSettings.of(pipe.config, {})

    @torch.no_grad()
    def encode(self, inputs: MicroBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Latents of noisy images, and the state before each block, from noise to image.

        Args:
            inputs: What the flow's forward takes.
        """
        output = self.flow(*inputs, output_hidden_states=True, return_dict=True, update_prior=False, return_loss=False)
        noisy = inputs[0]
        assert noisy is not None
        states = (self.flow.patchify(noisy), *output.hidden_states)
        latents = states[-1]
        if self.flow.config.volume_preserving:
            latents = latents / self.flow.prior_variance.sqrt()
        return latents, tuple(reversed(states[:-1]))

    def lesson(
        self,
        inputs: MicroBatch,
        clean: torch.Tensor,
        drawn: torch.Tensor,
        drawn_labels: torch.Tensor | None,
        *,
        guidance_scale: float,
    ) -> Lesson:
        """A lesson of n images and m drawn latents, m / n for each image, whose condition they have.

        Args:
            inputs: What the flow's forward takes of the images: pixels, or an autoencoder's latents.
            clean: The same without noise.
            drawn: (m, tokens, patch_dim) z ~ N(0, 1), m a multiple of n.
            drawn_labels: (m,) their classes, -1 for none; None for an unconditional flow.
            guidance_scale: Of the drawn latents.
        """
        latents, states = self.encode(inputs)
        labels = inputs[1]
        condition, mask = inputs[3:5] if len(inputs) > 3 else (None, None)
        scale = torch.cat([latents.new_ones(len(latents)), latents.new_full((len(drawn),), guidance_scale)])
        noisy, wanted, times = states[-1], self.flow.patchify(clean), len(drawn) // len(latents)
        if (strength := self.settings.denoising_strength) != 1:
            wanted = noisy + strength * (wanted - noisy)
        return Lesson(
            torch.cat([latents, drawn.to(latents)]),
            None if labels is None or drawn_labels is None else torch.cat([labels, drawn_labels]),
            None if condition is None else torch.cat([condition, condition.repeat_interleave(times, dim=0)]),
            None if mask is None else torch.cat([mask, mask.repeat_interleave(times)]),
            scale,
            states,
            wanted,
            self.settings.guided_by(guidance_scale),
        )

    @torch.no_grad()
    def corrected(
        self, batch: Batch, guesses: Sequence[torch.Tensor], guidance: Guidance | None
    ) -> tuple[torch.Tensor, ...]:
        """States of drawn latents after so many sweeps of each block, from noise to image, in raster order.

        Args:
            batch: The latents, see [`guided_encoding.checked_batch`].
            guesses: The states that the inverse expects.
            guidance: How the branches combine; None for the labelled one alone.
        """
        states, given = [], batch.latents
        if self.flow.config.volume_preserving:
            given = given * self.flow.prior_variance.sqrt()
        for step, (block, guess) in enumerate(zip(reversed(self.flow.blocks), guesses, strict=True)):
            told = block.is_conditioned and not (batch.labels is None and batch.condition is None)
            acts = guidance is not None and guidance.acts(labelled=told) and guidance.guides(step)
            rule = guidance if acts else None
            target, tokens = block.in_order(given), block.in_order(guess)
            given = block.in_order(self._solved(block, replace(batch, latents=target), tokens, rule))
            states.append(given)
        return tuple(states)

    def _solved(
        self, block: TarFlowBlock, batch: Batch, tokens: torch.Tensor, guidance: Guidance | None
    ) -> torch.Tensor:
        """Tokens in a block's own order after its sweeps; token by token, which costs less, where those are exact."""
        target, cache = batch.latents, KeyValueCache(batch.latents.shape[1])
        if self.sweeps >= target.shape[1] - 1:
            return invert_block(block, batch, guidance, cache, window=1, tolerance=0.0, token_cost=0.0)[0]
        predict = predictor(block, batch, guidance, cache)
        for _ in range(self.sweeps):
            tokens = torch.cat([target[:, :1], tokens[:, 1:]], dim=1)
            shift, log_scale = predict(tokens[:, :-1], 0)
            tokens = torch.cat([target[:, :1], affine_step(target[:, 1:], shift, log_scale)], dim=1)
        return tokens

    def denoised(self, patches: torch.Tensor, lesson: Lesson) -> torch.Tensor:
        """Patches of the drawn latents' images after the flow's score step, as the pipeline takes it.

        Args:
            patches: Their corrected last states.
            lesson: What conditions them.
        """
        if self.settings.denoising_strength == 0:
            return patches
        real = len(lesson.images)
        labels, condition, mask = (
            None if values is None else values[real:]
            for values in (lesson.labels, lesson.condition, lesson.condition_mask)
        )
        noisy, strength = self.flow.unpatchify(patches), self.settings.denoising_strength
        images = self.pipe.denoise(noisy, labels, strength, condition=condition, condition_mask=mask)
        return self.flow.patchify(images).detach()

    def loss(
        self, lesson: Lesson, output: TarFlowInverseOutput, state_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a lesson, and the mean square error of the images in it without gradients.

        Args:
            lesson: The lesson.
            output: What the inverse makes of its latents.
            state_scale: (blocks,) s_k, by which states are divided.
        """
        assert output.states is not None  # every forward pass fills both
        assert output.patches is not None
        real = len(lesson.images)
        conditions = [
            None if part is None else part[real:] for part in (lesson.labels, lesson.condition, lesson.condition_mask)
        ]
        batch = checked_batch(self.flow, lesson.latents[real:], *conditions)
        guesses = [state[real:].detach().float() for state in output.states]
        corrected = self.corrected(batch, guesses, lesson.guidance)
        images = torch.cat([lesson.images, self.denoised(corrected[-1], lesson)])
        loss = self.image_weight * _distance(output.patches, images, state_scale[-1])
        for state, encoded, solved, scale in zip(output.states, lesson.states, corrected, state_scale, strict=True):
            loss = loss + _distance(state, torch.cat([encoded, solved]), scale)
        if self.network is not None and self.feature_weight:
            loss = loss + self.feature_weight * self._feature_distance(output.patches, images)
        return loss, (output.patches.detach() - images).square().mean()

    def _feature_distance(self, patches: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """mean |f - f'|^2 / |f'|^2 of the features f of images and f' of those wanted."""
        assert self.network is not None
        with torch.no_grad():
            aim = self.network(self._levels(wanted))
        difference = self.network(self._levels(patches)) - aim
        return (difference.square().sum(1) / aim.square().sum(1).clamp_min(_LEAST)).mean()

    def _levels(self, patches: torch.Tensor) -> torch.Tensor:
        """The images of patches with levels 0 ... 255, not rounded and not cut off, with gradients."""
        images = self.flow.unpatchify(patches)
        if self.vae is not None:
            images = decode_latents(self.vae, images, self.pipe.image_shape)
        return 127.5 * (images + 1)


def _distance(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """mean h((found - wanted) / scale)."""
    return 2 * F.huber_loss(found / scale, wanted / scale, delta=_BOUND)


__all__ = ["Features", "Lesson", "Teacher"]

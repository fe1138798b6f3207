"""Images that stop being finite on the way back: found where it happens, named, and drawn anew. No model here."""

import hashlib
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count

import torch

from tarflow_hf.flow.sampling.guidance import Guidance

Steps = Generator[tuple[int, torch.Tensor], torch.Tensor, None]
"""Yields, after each step, the block (-1, -2, ... for a denoising step) and the (images, tokens, patch_dim) patches;
those that are sent go into the next step."""

MOST_REDRAWS = 3


class NonFiniteError(ValueError):
    """Images are infinite or no numbers; the message says which, where it began, and what helps."""


class NonFiniteWarning(UserWarning):
    """The same, where the call was told to go on with such images."""


@dataclass(frozen=True)
class NonFinite:
    """Images that a step made non-finite.

    Args:
        images: Their places in the batch.
        block: The block, counted from the image; -1, -2, ... is a denoising step.
        position: The first token that is not finite, in the order in which the block reads them (raster order for a
            denoising step).
        redraws: How often the images were drawn anew before.

    Example:
        >>> str(NonFinite([2, 5], block=1, position=7))
        'images [2, 5] are not finite after block 1, first at token 7 in the order of the block'
    """

    images: list[int]
    block: int
    position: int
    redraws: int = 0

    def __str__(self) -> str:
        step = f"denoising step {-self.block}" if self.block < 0 else f"block {self.block}"
        order = "raster order" if self.block < 0 else "the order of the block"
        again = f", as {self.redraws} times before with other noise" if self.redraws else ""
        return f"images {self.images} are not finite after {step}, first at token {self.position} in {order}{again}"


def find_nonfinite(patches: torch.Tensor, block: int, known: list[int] | None = None) -> NonFinite | None:
    """The images among these that are not finite; where there are none it takes one reduction.

    Args:
        patches: (images, tokens, patch_dim) patches in raster order, after a step.
        block: The step, see [`NonFinite`].
        known: Images that are not looked at.

    Example:
        >>> patches = torch.zeros(3, 4, 1)
        >>> find_nonfinite(patches, block=1) is None
        True
        >>> patches[2, 1] = float("inf")
        >>> find_nonfinite(patches, block=1)  # odd blocks read from the last token to the first
        NonFinite(images=[2], block=1, position=2, redraws=0)
    """
    finite = patches.isfinite()
    if finite.all():
        return None
    tokens = finite.all(2)
    tokens[known or []] = True
    images = (~tokens.all(1)).nonzero().flatten().tolist()
    if not images:
        return None
    spoiled = (~tokens).any(0)
    position = (spoiled.flip(0) if block > 0 and block % 2 else spoiled).nonzero()[0].item()
    return NonFinite(images, block, int(position))


def advice(guidance: object, dtype: torch.dtype) -> str:
    """What to do about images that are not finite.

    Args:
        guidance: What steered them: a [`Guidance`], or a function that gives one; None where nothing did.
        dtype: Of the model's weights.

    Example:
        >>> advice(Guidance(30.0), torch.float32)
        "lower guidance_scale (it is 30.0) or take guidance_rule='product', which never widens a step"
        >>> advice(Guidance(30.0, rule="product"), torch.float16)
        'float16 overflows above 65504: use bfloat16; lower guidance_scale (it is 30.0)'
    """
    half = "float16 overflows above 65504: use bfloat16; " if dtype == torch.float16 else ""
    if callable(guidance):
        return f"{half}lower the scale of the guidance"
    if not isinstance(guidance, Guidance) or guidance.scale <= 1:
        return f"{half}there is no guidance_scale to lower: the latents or the model's weights are too large"
    refused = ""
    if guidance.rule == "scale":
        refused = (
            f"guidance by rule='scale' with scale={guidance.scale} made a scale that is not positive, so that the "
            "result is no sample of a density, or one too large: "
        )
    other = "" if guidance.rule == "product" else " or take guidance_rule='product', which never widens a step"
    return f"{half}{refused}lower guidance_scale (it is {guidance.scale}){other}"


def tell(hint: str, warn: bool, found: NonFinite) -> None:
    """Raises [`NonFiniteError`], or warns with [`NonFiniteWarning`].

    Args:
        hint: What to do, see [`advice`].
        warn: Whether a warning is enough.
        found: What is not finite.

    Raises:
        NonFiniteError: Unless a warning is enough.

    Example:
        >>> tell("lower guidance_scale", False, NonFinite([1], block=0, position=3))
        Traceback (most recent call last):
            ...
        tarflow_hf.flow.sampling.nonfinite.NonFiniteError: images [1] are not finite after block 0, first at token ...
    """
    if not warn:
        raise NonFiniteError(f"{found}: {hint}")
    warnings.warn(f"{found}: {hint}", NonFiniteWarning, stacklevel=2)


def finite_steps(
    start: Callable[[list[int], int], Steps],
    images: list[int],
    fail: Callable[[NonFinite], None],
    *,
    most_redraws: int = MOST_REDRAWS,
    redraws: int = 0,
) -> Steps:
    """The steps of a batch, in which images that stop being finite are drawn anew and take the steps again, alone.

    What the other images go through is the same as without: a lost image stays in their batch as NaN, which the
    solver counts as done, and the redrawn one takes its place in what is yielded.

    Args:
        start: `start(images, redraws)` begins the steps of these images of the call, at fresh latents where `redraws`
            is above 0.
        images: Places of the images in the call.
        fail: Called with images that were lost once more after `most_redraws`. It raises, or returns to go on.
        most_redraws: How often an image may be drawn anew.
        redraws: How often these were.

    Yields:
        See [`Steps`].

    Example:
        >>> def start(images, redraws):  # image 1 is lost the first time
        ...     lost = [image == 1 and redraws == 0 for image in images]
        ...     yield 0, torch.where(torch.tensor(lost), float("nan"), 0.0).view(-1, 1, 1)
        >>> [patches.flatten().tolist() for _, patches in finite_steps(start, [0, 1], fail=print)]
        [[0.0, 0.0]]
    """
    steps = start(images, redraws)
    given_up: list[int] = []
    redrawn: list[tuple[list[int], Steps]] = []
    sent: torch.Tensor | None = None
    for number in count():
        try:
            block, patches = next(steps) if sent is None else steps.send(_without(sent, given_up, redrawn))
        except StopIteration:
            return
        lost = [place for places, _ in redrawn for place in places]
        news = [] if sent is None else [(places, stream.send(sent[places])[1]) for places, stream in redrawn]
        if (found := find_nonfinite(patches, block, known=given_up + lost)) is not None:
            here = [images[place] for place in found.images]
            if redraws == most_redraws:
                fail(NonFinite(here, block, found.position, redraws))
                given_up += found.images
            else:
                again = finite_steps(start, here, fail, most_redraws=most_redraws, redraws=redraws + 1)
                redrawn.append((found.images, again))
                news.append((found.images, _caught_up(again, number + 1)))
        if news:
            patches = patches.clone()
            for places, replacement in news:
                patches[places] = replacement
        sent = yield block, patches


def _caught_up(steps: Steps, number: int) -> torch.Tensor:
    """The patches after so many steps, each from what the one before gave."""
    _, patches = next(steps)
    for _ in range(number - 1):
        _, patches = steps.send(patches)
    return patches


def _without(patches: torch.Tensor, given_up: list[int], redrawn: list[tuple[list[int], Steps]]) -> torch.Tensor:
    """The patches with NaN for what is redrawn apart, and for what was given up unless it was mended since."""
    out = [place for places, _ in redrawn for place in places]
    out += [place for place in given_up if not patches[place].isfinite().all()]
    if out:
        patches = patches.clone()
        patches[out] = float("nan")
    return patches


class FreshNoise:
    """Where the noise of redrawn images comes from, so that no other image's noise changes.

    With a generator for each image, from that image's own; otherwise from one for each image that is seeded by the
    latents it was lost with, so that the same call draws the same images.

    Args:
        generator: Of the call.
        latents: (images, tokens, patch_dim) that the call drew.

    Example:
        >>> noise = FreshNoise(None, torch.zeros(2, 4, 1))
        >>> noise.of([1])[0] is noise.of([1])[0]
        True
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor) -> None:
        self._own = dict(enumerate(generator)) if isinstance(generator, list) else {}
        self._latents = latents

    def of(self, images: list[int]) -> list[torch.Generator]:
        """The generator of each of these images.

        Args:
            images: Their places in the call.
        """
        for image in images:
            if image not in self._own:
                lost = self._latents[image].cpu().numpy().tobytes() + image.to_bytes(8, "big")
                seed = int.from_bytes(hashlib.blake2b(lost, digest_size=7).digest(), "big")
                self._own[image] = torch.Generator().manual_seed(seed)
        return [self._own[image] for image in images]


__all__ = [
    "MOST_REDRAWS",
    "FreshNoise",
    "NonFinite",
    "NonFiniteError",
    "NonFiniteWarning",
    "Steps",
    "advice",
    "find_nonfinite",
    "finite_steps",
    "tell",
]

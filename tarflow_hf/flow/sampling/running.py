"""What users of diffusers read and set while a pipeline runs: guidance, steps, interrupt; what callbacks leave."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident

import torch

from tarflow_hf.flow.inputs import replaced_latents
from tarflow_hf.flow.sampling.nonfinite import find_nonfinite, tell


@dataclass
class _Call:
    guidance_scale: float = 1.0
    num_timesteps: int = 0
    can_guide: bool = False
    interrupt: bool = False


class Running:
    """An object whose running calls each have a guidance scale and an interrupt, by the names that diffusers gives.

    Calls run in threads and inside each other's callbacks. What is read and set is the innermost one of this thread,
    or the last one where none runs; `_interrupt`, set in a thread that runs no call, stops all.

    Example:
        >>> pipe = Running()
        >>> with pipe.running(2.0, num_timesteps=8, can_guide=True):
        ...     pipe._guidance_scale += 1
        ...     pipe._interrupt = True
        ...     with pipe.running(1.0, num_timesteps=4, can_guide=True):
        ...         pipe.do_classifier_free_guidance, pipe.interrupt
        ...     pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt
        (False, False)
        (3.0, 8, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, list[_Call]] = {}  # of each thread, the outermost first
        self._last_call = _Call()

    @contextmanager
    def running(self, guidance_scale: float, *, num_timesteps: int, can_guide: bool) -> Iterator[None]:
        """A call of this thread, which nothing has interrupted yet.

        Args:
            guidance_scale: The scale that it begins with.
            num_timesteps: How many steps it has.
            can_guide: Whether its two branches differ.
        """
        thread = get_ident()
        calls = self._calls.setdefault(thread, [])
        calls.append(_Call(guidance_scale, num_timesteps, can_guide))
        try:
            yield
        finally:
            self._last_call = calls.pop()
            if not calls:
                del self._calls[thread]

    @property
    def _call(self) -> _Call:
        calls = self._calls.get(get_ident())
        return calls[-1] if calls else self._last_call

    @property
    def interrupt(self) -> bool:
        """Whether this thread's call is to stop after its present step; where none runs, whether the last one was."""
        return self._call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._call.interrupt = value
        if get_ident() not in self._calls:
            for call in [call for calls in list(self._calls.values()) for call in calls]:
                call.interrupt = value

    @property
    def guidance_scale(self) -> float:
        """The scale of the call that runs, 1 or less for none; set `pipe._guidance_scale` in a callback."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call.guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance acts on the steps that come."""
        return self._call.can_guide and self._call.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many steps the call has: the blocks, then the denoising steps."""
        return self._call.num_timesteps


def tensors_for(callback: object, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a callback gets: the latents, and what diffusers' own callbacks ask for besides, empty.

    Args:
        callback: A function, or one of `diffusers.callbacks`, which has `tensor_inputs`.
        latents: (images, tokens, patch_dim) patches.

    Example:
        >>> from diffusers.callbacks import SDCFGCutoffCallback
        >>> sorted(tensors_for(SDCFGCutoffCallback(cutoff_step_ratio=0.5), torch.zeros(1, 4, 2)))
        ['latents', 'prompt_embeds']
    """
    asked: list[str] = getattr(callback, "tensor_inputs", [])
    return {**{name: latents.new_zeros(0) for name in asked}, "latents": latents}


def call_back(
    callback: Callable[..., object], pipe: Running, step: int, block: int, latents: torch.Tensor, *, warn: bool
) -> torch.Tensor:
    """The latents after a callback, which may have written into them or returned others.

    The next step finds what is not finite in them; after the last one, or where the callback interrupts, none follows.

    Args:
        callback: The user's function.
        pipe: The pipeline that runs.
        step: Number of the step, from 0.
        block: Its block, see [`nonfinite.NonFinite`].
        latents: (images, tokens, patch_dim) patches after it.
        warn: Whether a warning is enough where images come out of the last callback that are not finite.

    Raises:
        ValueError: If what the callback returns does not fit, or the images that it leaves at the end are not finite.

    Example:
        >>> pipe = TarFlowPipeline(TarFlowModel(TarFlowConfig(image_size=8, hidden_size=64, num_blocks=2)))
        >>> call_back(lambda pipe, step, block, tensors: {}, pipe, 0, 1, torch.zeros(1, 4, 2), warn=False).shape
        torch.Size([1, 4, 2])
    """
    lost_before = (~latents.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    tensors = tensors_for(callback, latents)
    known = list(tensors)
    returned = callback(pipe, step, block, tensors)
    latents = replaced_latents(latents, {} if returned is None else returned, known)
    is_last = step == pipe.num_timesteps - 1 or pipe.interrupt
    if is_last and (found := find_nonfinite(latents, block, known=lost_before)) is not None:
        tell("callback_on_step_end made them so, and no step follows that would draw them anew", warn, found)
    return latents


__all__ = ["Running", "call_back", "tensors_for"]

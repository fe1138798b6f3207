"""Guidance: how the predictions of a labelled and an unlabelled branch combine. No model calls.

Both branches predict, for every token, the log-scale a and the shift b of the inverse affine step x = z exp(a) + b.
Guidance extrapolates from the unlabelled prediction through the labelled one.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

GuidanceSchedule = Literal["linear", "constant"]
GuidedPart = Literal["both", "shift", "log_scale"]


@dataclass(frozen=True)
class Guidance:
    """How strongly, where along the sequence, and on what guidance acts.

    With the weight g_i of token i, predictions (a, b) with labels and (a', b') without become

        a + g_i (a - a'),  b + g_i (b - b').

    With w = scale - 1, g_i = w for the constant schedule; for the linear one (the paper's annealed guidance)
    g_i = w i / (T - 1) with i = 0 ... T - 1 the position of the transformed token in the block's own order, so that
    guidance grows along the sequence and the last token gets w.

    Args:
        scale: At least 1; 1 is no guidance. It is 1 + the paper's guidance weight w.
        schedule: `"linear"` or `"constant"`.
        attention_temperature: Positive; the unlabelled branch divides its attention logits by it. At 1 the unlabelled
            branch differs from the labelled one by the label alone; other values give guidance without labels.
        apply_to: Which prediction is guided: `"both"`, `"shift"` or `"log_scale"`.

    Raises:
        ValueError: If a value is out of range.

    Reference: arXiv 2412.06329, section 3.5, equations 9 and 10.

    Example:
        >>> Guidance(scale=3.0).weights(1, 5, num_tokens=5)
        tensor([0.5000, 1.0000, 1.5000, 2.0000])
    """

    scale: float = 1.0
    schedule: GuidanceSchedule = "linear"
    attention_temperature: float = 1.0
    apply_to: GuidedPart = "both"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 1):
            raise ValueError(
                f"scale (guidance_scale) must be finite and at least 1 (1 is no guidance), got {self.scale}"
            )
        if not (math.isfinite(self.attention_temperature) and self.attention_temperature > 0):
            raise ValueError(f"attention_temperature must be finite and above 0, got {self.attention_temperature}")
        if self.schedule not in get_args(GuidanceSchedule):
            raise ValueError(
                f"schedule (guidance_schedule) must be one of {get_args(GuidanceSchedule)}, got {self.schedule!r}"
            )
        if self.apply_to not in get_args(GuidedPart):
            raise ValueError(f"apply_to must be one of {get_args(GuidedPart)}, got {self.apply_to!r}")

    def acts(self, labelled: bool) -> bool:
        """Whether the two branches can differ, so that the second one has to be run.

        Args:
            labelled: Whether the first branch has labels.
        """
        return self.scale > 1 and (labelled or self.attention_temperature != 1)

    def weights(
        self,
        start: int,
        stop: int,
        num_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """The weights g_i of the tokens start ... stop - 1 of a block.

        Args:
            start: First token, in the block's own order.
            stop: One past the last token.
            num_tokens: T, the length of the sequence.
            dtype: Type of the result.
            device: Where the result lives.

        Returns:
            (stop - start,) weights.
        """
        if self.schedule == "constant":
            return torch.full((stop - start,), self.scale - 1.0, dtype=dtype, device=device)
        positions = torch.arange(start, stop, dtype=dtype, device=device)
        return positions * ((self.scale - 1) / max(num_tokens - 1, 1))

    def combine(
        self,
        labelled: tuple[torch.Tensor, torch.Tensor],
        unlabelled: tuple[torch.Tensor, torch.Tensor],
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Extrapolates from the unlabelled through the labelled prediction.

        Args:
            labelled: (shift, log_scale), each (batch, tokens, patch_dim), of the labelled branch.
            unlabelled: The same of the unlabelled branch.
            weights: (tokens,) the weights g_i of these tokens.

        Returns:
            The guided (shift, log_scale), of the same shapes.
        """
        shift, log_scale = labelled
        weights = weights[:, None]
        if self.apply_to != "log_scale":
            shift = shift + weights * (shift - unlabelled[0])
        if self.apply_to != "shift":
            log_scale = log_scale + weights * (log_scale - unlabelled[1])
        return shift, log_scale


__all__ = ["Guidance", "GuidanceSchedule", "GuidedPart"]

"""Guidance: how the predictions of a labelled and an unlabelled branch combine. No model calls.

Both branches predict, for every token, the log-scale a and the shift b of the inverse affine step x = z exp(a) + b.
Guidance extrapolates from the unlabelled prediction through the labelled one.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch

from tarflow_hf.flow.choices import GuidanceRule, GuidanceSchedule, GuidedPart
from tarflow_hf.flow.inputs import is_finite, is_whole

Prediction = tuple[torch.Tensor, torch.Tensor]
"""Shift b and log-scale a, each (batch, tokens, patch_dim)."""


@dataclass(frozen=True)
class Guidance:
    """How strongly, where along the sequence, and on what guidance acts.

    With the weight g_i of token i, predictions (a, b) with labels and (a', b') without become, by `rule`,

        log_scale:  a + g_i (a - a'),  b + g_i (b - b')
        scale:      log(e^a + g_i (e^a - e^a')),  b + g_i (b - b')
        product:    a - 1/2 log q,  b + (g_i r / q) (b - b'),  r = min(1, e^2(a - a')),  q = 1 + g_i - g_i r.

    The first is TarFlow's and the second iTARFlow's: there a strong weight can make the scale negative, which is no
    density any more, and the image is lost. The third is the product p^(1+g) / p'^g of the two Gaussians (with r
    bounded by 1), which is a Gaussian for every weight and never wider than the labelled one.
    A strong weight makes steps run away: under `"log_scale"` the scale has a factor exp(g (a - a')). Of 100 digits of
    the quickstart's model it loses 0 at scale 10, 8 at 20, 35 at 30 and 78 at 50 with the linear schedule, and 10, 49,
    86 and 98 with the constant one; `"product"` loses none with the linear one, and 0, 6, 12 and 23 with the constant
    one. It bounds the scale by the labelled one, not the shift, which grows as g (b - b'): at scale 20 tokens reach 50
    where pictures end at 4, and what the model itself predicts after such tokens is no bounded scale any more.
    With w = scale - 1, g_i = w for the constant schedule; for the linear one (the paper's annealed guidance)
    g_i = w i / (T - 1) with i = 0 ... T - 1 the position of the transformed token in the block's own order, so that
    guidance grows along the sequence and the last token gets w.

    Args:
        scale: At least 1; 1 is no guidance. It is 1 + the paper's guidance weight w.
        schedule: `"linear"` or `"constant"`.
        attention_temperature: Positive; the unlabelled branch divides its attention logits by it. At 1 the unlabelled
            branch differs from the labelled one by the label alone; other values give guidance without labels.
        apply_to: Which prediction is guided: `"both"`, `"shift"` or `"log_scale"` (the scale under every rule).
        rule: `"log_scale"`, `"scale"` or `"product"`.
        num_guided_blocks: How many blocks are guided, counted from the noise, that is the first ones in sampling; at
            least 1. None: all.

    Raises:
        ValueError: If a value is out of range.

    Reference: arXiv 2412.06329 (guidance); arXiv 2604.20041 for `"scale"`; Gu et al., STARFlow,
    arXiv 2506.06276, for `"product"`.

    Example:
        >>> Guidance(scale=3.0).weights(1, 5, num_tokens=5)
        tensor([0.5000, 1.0000, 1.5000, 2.0000])
        >>> zeros, ones = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> shift, log_scale = Guidance(scale=3.0).combine((ones, zeros), (zeros, zeros), torch.tensor([2.0]))
        >>> shift  # b + 2 (b - b') with b = 1 and b' = 0
        tensor([[[3., 3.]]])
    """

    scale: float = 1.0
    schedule: GuidanceSchedule = "linear"
    attention_temperature: float = 1.0
    apply_to: GuidedPart = "both"
    rule: GuidanceRule = "log_scale"
    num_guided_blocks: int | None = None

    def __post_init__(self) -> None:
        if not (is_finite(self.scale) and self.scale >= 1):
            raise ValueError(
                f"scale (guidance_scale) must be finite and at least 1 (1 is no guidance), got {self.scale!r}"
            )
        if not (is_finite(self.attention_temperature) and self.attention_temperature > 0):
            raise ValueError(f"attention_temperature must be finite and above 0, got {self.attention_temperature!r}")
        if self.schedule not in get_args(GuidanceSchedule):
            raise ValueError(
                f"schedule (guidance_schedule) must be one of {get_args(GuidanceSchedule)}, got {self.schedule!r}"
            )
        if self.apply_to not in get_args(GuidedPart):
            raise ValueError(f"apply_to must be one of {get_args(GuidedPart)}, got {self.apply_to!r}")
        if self.rule not in get_args(GuidanceRule):
            raise ValueError(f"rule (guidance_rule) must be one of {get_args(GuidanceRule)}, got {self.rule!r}")
        blocks = self.num_guided_blocks
        if blocks is not None and not (is_whole(blocks) and blocks >= 1):
            raise ValueError(f"num_guided_blocks must be None or at least 1, got {blocks!r}")

    def acts(self, labelled: bool) -> bool:
        """Whether the two branches can differ, so that the second one has to be run.

        Args:
            labelled: Whether the first branch has labels.
        """
        return self.scale > 1 and (labelled or self.attention_temperature != 1)

    def guides(self, step: int) -> bool:
        """Whether the block that is sampled as number `step`, from 0, is guided."""
        return self.num_guided_blocks is None or step < self.num_guided_blocks

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
        labelled: Prediction,
        unlabelled: Prediction,
        weights: torch.Tensor,
    ) -> Prediction:
        """Extrapolates from the unlabelled through the labelled prediction, by `rule`.

        Args:
            labelled: (shift, log_scale) of the labelled branch, each (batch, tokens, patch_dim).
            unlabelled: The same of the unlabelled branch.
            weights: (tokens,) the weights g_i of these tokens.

        Returns:
            The guided (shift, log_scale), of the same shapes. A scale that is not positive, which the rule `"scale"`
            alone can give, has log_scale NaN: the image is lost.
        """
        weights = weights[:, None]
        shift, log_scale = _RULES[self.rule](labelled, unlabelled, weights)
        return (
            labelled[0] if self.apply_to == "log_scale" else shift,
            labelled[1] if self.apply_to == "shift" else log_scale,
        )


def _by_log_scale(labelled: Prediction, unlabelled: Prediction, weights: torch.Tensor) -> Prediction:
    (shift, log_scale), (other_shift, other_log_scale) = labelled, unlabelled
    return _extrapolate(shift, other_shift, weights), _extrapolate(log_scale, other_log_scale, weights)


def _by_scale(labelled: Prediction, unlabelled: Prediction, weights: torch.Tensor) -> Prediction:
    (shift, log_scale), (other_shift, other_log_scale) = labelled, unlabelled
    # log(e^a + g (e^a - e^a')) = a + log(1 - g (e^(a' - a) - 1))
    factor = 1 - weights * torch.expm1(other_log_scale - log_scale)
    return _extrapolate(shift, other_shift, weights), log_scale + factor.where(factor > 0, math.nan).log()


def _by_product(labelled: Prediction, unlabelled: Prediction, weights: torch.Tensor) -> Prediction:
    (shift, log_scale), (other_shift, other_log_scale) = labelled, unlabelled
    ratio = (2 * (log_scale - other_log_scale)).exp().clamp(max=1)
    precision = 1 + weights - weights * ratio
    return _extrapolate(shift, other_shift, weights * ratio / precision), log_scale - 0.5 * precision.log()


def _extrapolate(values: torch.Tensor, others: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x + g (x - y)"""
    return torch.lerp(values, others, -weights)


_RULES = {"log_scale": _by_log_scale, "scale": _by_scale, "product": _by_product}

__all__ = ["Guidance", "GuidanceRule", "GuidanceSchedule", "GuidedPart"]

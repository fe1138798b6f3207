"""How many tokens a decoding sweep should update: the choice that adapts to what sweeps cost and what they gain."""

import math
from collections.abc import Callable

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.flow.products import onednn_is_faster

_EXPECTED_CONTRACTION = 0.3  # a token's change from sweep to sweep, before any was seen
_SLOWEST_CONTRACTION = 0.95  # where the changes hardly shrink, or grow
_EXPECTED_CHANGE = 1.0  # the change of a token that no sweep has updated yet, in units of the latents
_PATIENCE = 1.15  # how many times dearer than sequential decoding a window may look
_PROBE_SHARE = 0.03  # share of the sequential time that may be spent on finding out that windows do not pay


class AdaptiveWindow:
    """Chooses the window of each sweep over one block.

    The changes of a window's tokens shrink by a factor r (the contraction) from sweep to sweep, so that its n tokens
    are solved after about s = log(tolerance / change) / log r sweeps, which cost s (1 + k (n - 1)) one-token sweeps
    where k is the cost of a further token. The window is as wide as pays if that is less than the n sweeps of
    sequential decoding, or not much more, since changes shrink faster towards the end. Otherwise it is 1, and wider
    ones are tried again once the sequential sweeps have earned another try. r is the geometric mean over all sweeps
    of a try: single ones vary too much to go by.

    Args:
        token_cost: k, the time of one more token in a sweep divided by the time of a one-token sweep, in [0, 1].
        tolerance: Largest change that counts as none; at 0 the window is always 1.
        fit: How many tokens a sweep takes where so many are wanted; None: as many.
    """

    def __init__(self, token_cost: float, tolerance: float, fit: Callable[[int], int] | None = None) -> None:
        self.fit = fit or int
        self.token_cost = token_cost
        self.tolerance = tolerance
        self._sequential_sweeps_left = 0
        self._log_contractions: list[float] = []
        self._changes: list[float] = []

    def width(self, unsolved: int) -> int:
        """The window of the next sweep, with so many tokens left to solve."""
        if self._sequential_sweeps_left > 0:
            self._sequential_sweeps_left -= 1
            return 1
        widest = unsolved if self.token_cost == 0 else max(1, min(unsolved, round(3 / self.token_cost)))
        widest = self.fit(widest)
        sweep = 1 + self.token_cost * (widest - 1)
        if self._sweeps_to_go() * sweep < widest * _PATIENCE:
            return widest
        self._log_contractions, self._changes = [], []
        self._sequential_sweeps_left = math.ceil(2 * sweep / _PROBE_SHARE)
        return 1

    def skip(self, tokens: int) -> None:
        """Takes note of tokens that were solved one after another without being asked for."""
        self._sequential_sweeps_left = max(self._sequential_sweeps_left - tokens, 0)

    def observe(self, changes: list[float], accepted: int) -> None:
        """Learns from a sweep: the change of each token of the window, and how many of them were accepted."""
        common = min(len(changes), len(self._changes))
        before, after = sum(self._changes[:common]), sum(changes[:common])
        if before > 0 and math.isfinite(before) and math.isfinite(after):
            self._log_contractions.append(math.log(max(after / before, 1e-3)))
        self._changes = changes[accepted:]

    def _sweeps_to_go(self) -> float:
        """Sweeps until the present window is solved, if its changes go on to shrink as they did."""
        change = max(self._changes, default=_EXPECTED_CHANGE)
        if self.tolerance == 0 or not math.isfinite(change):
            return math.inf
        seen = self._log_contractions or [math.log(_EXPECTED_CONTRACTION)]
        log_contraction = min(sum(seen) / len(seen), math.log(_SLOWEST_CONTRACTION))
        return max(math.log(self.tolerance / max(change, self.tolerance)) / log_contraction, 0.0) + 1


def token_cost(
    config: TarFlowConfig, *, rows: int, dtype: torch.dtype, device: torch.device, compiled: bool = False
) -> float:
    """The time of one more token in a sweep, divided by the time of a one-token sweep: a rough, fixed estimate.

    A one-token sweep of a layer takes the overhead of its calls, the time to read its weights, and the arithmetic of
    its rows; a further token adds the arithmetic alone, in matrix products and in what is done number by number. The
    estimate depends on the sizes, the kind of device or processor and its threads only, never on a clock, so that the
    same call gives the same images.

    Args:
        config: Sizes of the model.
        rows: Batch of a sweep, both branches of guidance counted.
        dtype: Type of the weights.
        device: Where the sweep runs.
        compiled: Whether sweeps are compiled, for which calls cost less on a CPU.
    """
    hidden_size = config.hidden_size
    weights = (4 + 2 * config.mlp_ratio) * hidden_size**2
    if device.type == "cpu":
        overhead, bandwidth, rate, elementwise = 55e-6, 2.9e10, (2.5e11 if onednn_is_faster() else 1e11), 12e-9
        if compiled:  # wide sweeps attend to the whole cache
            overhead, bandwidth, rate, elementwise = 10e-6, 1.2e10, 6e10, 20e-9
        rows = math.ceil(rows / torch.get_num_threads())
    else:
        overhead, bandwidth, rate, elementwise = 100e-6, 2e12, (3e14 if dtype.itemsize == 2 else 4e13), 1e-12
    token = rows * (2 * weights / rate + elementwise * hidden_size)
    return token / (overhead + weights * dtype.itemsize / bandwidth + token)


__all__ = ["AdaptiveWindow", "token_cost"]

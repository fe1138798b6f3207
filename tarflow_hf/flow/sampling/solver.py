"""The window solver that inverts one autoregressive block. No nn.Module, labels or guidance here.

Inverting a block means solving x = z exp(a(x)) + b(x), where row i of (a, b) depends only on the rows before i of x.
The only fixed point is the sequential solution; the solver reaches it a window of tokens at a time.
"""

import math
from collections.abc import Callable
from itertools import takewhile

import torch

from tarflow_hf.flow.affine import affine_step
from tarflow_hf.flow.inputs import is_number, is_whole
from tarflow_hf.flow.sampling.windows import AdaptiveWindow

Predict = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""`predict(tokens, start)` reads the tokens at positions start, start + 1, ..., (batch, n, dim), and returns the shift
b and the log-scale a of the tokens that FOLLOW them, at start + 1, ..., start + n, each (batch, n, dim). It may keep
what it computed for earlier positions; positions that are read again replace what was kept."""

_FAR = 1e15  # the largest guess that is read: layer norms square it


def solve(
    predict: Predict,
    latents: torch.Tensor,
    *,
    guess: torch.Tensor | None = None,
    window: int | None = None,
    tolerance: float = 1e-3,
    token_cost: float = 0.0,
    sweep: "Sweep | None" = None,
) -> tuple[torch.Tensor, int]:
    """Solves x_0 = z_0, x_i = z_i exp(a_i(x_0 ... x_{i-1})) + b_i(x_0 ... x_{i-1}) for x.

    A window of unsolved tokens stands behind the solved prefix. One sweep predicts all its tokens at once from their
    present values and updates them together. The first is then exact, since its prefix was; each following one is
    accepted as long as no token before it in the window changed by more than `tolerance`. The window then slides past
    the accepted tokens. At least one token is accepted a sweep, so there are at most T - 1 sweeps.
    window = 1 is sequential decoding, window = T Jacobi iteration; with tolerance = 0 all give the sequential answer.

    Args:
        predict: The block, see [`Predict`].
        latents: (batch, T, dim) z in the block's own order, float32 or wider. Not written to.
        guess: (batch, T, dim) where the iteration starts; None: at z. The solution does not depend on it, up to
            `tolerance`. Not written to.
        window: Most tokens a sweep may update, at least 1; None chooses anew for each, see [`windows.AdaptiveWindow`].
        tolerance: Largest change of a token, in the units of x, that counts as none; at least 0.
        token_cost: What one more token in a sweep costs, in one-token sweeps; what `window=None` goes by.
        sweep: How the tokens of a window are updated; None: as [`Sweep`] does.

    Returns:
        x, (batch, T, dim), and the number of sweeps used.

    Raises:
        ValueError: If `window` or `tolerance` is out of range.

    Reference: Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving,
    arXiv 2002.03629; Liu and Qin, Accelerate TarFlow Sampling with GS-Jacobi Iteration, arXiv 2505.12849.

    Example:
        >>> def predict(tokens, start):  # each token is its latent, shifted by half of the token before it
        ...     return 0.5 * tokens, torch.zeros_like(tokens)
        >>> tokens, sweeps = solve(predict, torch.ones(1, 4, 1), window=1)
        >>> tokens.flatten(), sweeps
        (tensor([1.0000, 1.5000, 1.7500, 1.8750]), 3)
    """
    check_solver_arguments(window, tolerance)
    num_tokens, tokens = latents.shape[1], _start(latents, guess)
    sweep = Sweep() if sweep is None else sweep
    chooser = AdaptiveWindow(token_cost, tolerance, lambda wanted: sweep.width(wanted, num_tokens))
    solved, sweeps, wild = 1, 0, window != 1 and not bool((tokens.abs() < _FAR).all())
    while solved < num_tokens and len(latents) > 0:
        width = sweep.width(window or chooser.width(num_tokens - solved), num_tokens)
        accepted, seen = sweep(predict, tokens, latents, solved, width, wild)
        if seen is not None:
            wild = wild or not all(change < _FAR for change in seen)
            accepted = _accepted(seen, tolerance)
            chooser.observe([0.0 if math.isnan(change) else change for change in seen], accepted)
        elif accepted > 1:
            chooser.skip(accepted - 1)
        solved, sweeps = solved + accepted, sweeps + (accepted if seen is None else 1)
    return tokens, sweeps


def _start(latents: torch.Tensor, guess: torch.Tensor | None) -> torch.Tensor:
    """x_0, which is known, and where the iteration starts for the others."""
    return latents.clone() if guess is None else torch.cat([latents[:, :1], guess[:, 1:]], dim=1)


class Sweep:
    """Updates the tokens of a window together, whatever their number.

    Example:
        >>> tokens, latents = torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
        >>> Sweep()(lambda read, start: (0.5 * read, torch.zeros_like(read)), tokens, latents, 1, 2, False)
        (1, [1.0, 1.0])
        >>> tokens.flatten()
        tensor([0., 1., 1.])
    """

    def width(self, wanted: int, num_tokens: int) -> int:
        """How many tokens a sweep updates where so many are wanted.

        Args:
            wanted: At least 1.
            num_tokens: T, the length of the sequence.
        """
        return wanted

    def __call__(
        self, predict: Predict, tokens: torch.Tensor, latents: torch.Tensor, solved: int, width: int, wild: bool
    ) -> tuple[int, list[float] | None]:
        """Updates the tokens solved ... solved + width - 1, as far as there are so many, from those before each.

        Args:
            predict: The block, see [`Predict`].
            tokens: (batch, T, dim) x, written to.
            latents: (batch, T, dim) z.
            solved: How many tokens are solved, at least 1.
            width: Tokens of the window, what [`width`] gave.
            wild: Whether guesses may be too large to be read as they are.

        Returns:
            How many tokens are solved now that were not, 1 if the changes are to say it; and the largest change of
            each token over the batch, or None where it is of no use.
        """
        stop = min(solved + width, tokens.shape[1])
        before = tokens[:, solved:stop]
        shift, log_scale = predict(_readable(tokens[:, solved - 1 : stop - 1], wild), solved - 1)
        updated = affine_step(latents[:, solved:stop], shift, log_scale)
        found = _changes(updated, before) if stop - solved > 1 else None
        tokens[:, solved:stop] = updated
        return 1, found


def _readable(tokens: torch.Tensor, wild: bool) -> torch.Tensor:
    return readable(tokens) if wild and tokens.shape[1] > 1 else tokens


def readable(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens whose guesses do not overflow: masked attention is then 0 * NaN, which spoils those before them.

    Args:
        tokens: Of any shape.

    Example:
        >>> readable(torch.tensor([1.0, float("nan"), float("inf")]))
        tensor([1.0000e+00, 0.0000e+00, 1.0000e+15])
    """
    return tokens.nan_to_num(0.0).clamp(-_FAR, _FAR)


def _changes(updated: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """[`changes`], of which NaN is masked only where there is any."""
    largest = (updated - tokens).abs().amax((0, 2)).tolist()
    return changes(updated, tokens).tolist() if any(map(math.isnan, largest)) else largest


def changes(updated: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The largest change of each token over the batch, (tokens,).

    What stays infinite or no number has not changed: an image that is lost does not hold up the others. What has just
    become so, or is so no longer, changes by NaN or inf.

    Args:
        updated: (batch, tokens, dim) after a sweep.
        tokens: The same before it.

    Example:
        >>> before = torch.tensor([[[1.0], [float("nan")], [2.0]]])
        >>> changes(torch.tensor([[[1.5], [float("nan")], [float("inf")]]]), before)
        tensor([0.5000, 0.0000,    inf])
    """
    stays = updated.eq(tokens) | (updated.isnan() & tokens.isnan())
    return (updated - tokens).abs().masked_fill(stays, 0.0).amax((0, 2))


def _accepted(changes: list[float], tolerance: float) -> int:
    """How many of a window's tokens are solved: the first, and each whose predecessors all changed <= tolerance."""
    unchanged = takewhile(lambda change: change <= tolerance, changes[:-1])
    return 1 + sum(1 for _ in unchanged)


def check_solver_arguments(window: int | None, tolerance: float, max_batch: int | None = None) -> None:
    """Raises ValueError unless window and max_batch are None or at least 1, and tolerance is at least 0.

    Example:
        >>> check_solver_arguments(window=0, tolerance=1e-3)
        Traceback (most recent call last):
            ...
        ValueError: window must be None or at least 1, got 0
    """
    for name, value in (("window", window), ("max_batch", max_batch)):
        if value is not None and not (is_whole(value) and value >= 1):
            raise ValueError(f"{name} must be None or at least 1, got {value!r}")
    if not (is_number(tolerance) and 0 <= tolerance < math.inf):
        raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")


__all__ = ["Predict", "Sweep", "changes", "check_solver_arguments", "readable", "solve"]

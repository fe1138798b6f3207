"""The mathematics of averages by a power of time: how long they are, and how stored ones make one of any length.

After t updates the average with exponent g is the mean of the values theta(1) ... theta(t) with the weights

    w(s; t, g) = (s^(g + 1) - (s - 1)^(g + 1)) / t^(g + 1),    s = 1 ... t,

the power function s^g integrated over each step. Its relative length is the standard deviation of s / t under w.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_LENGTH = 1 / math.sqrt(12)  # exponent 0: the plain mean of all values
_STEPS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Average:
    """One average by a power of time.

    Args:
        updates: t, at least 1.
        length: Relative length, in (0, 12^-1/2).

    Example:
        >>> Average(updates=1000, length=0.1).exponent
        6.937...
    """

    updates: int
    length: float

    @property
    def exponent(self) -> float:
        """g of this length."""
        return power_exponent(self.length)


def relative_length(exponent: float) -> float:
    """Relative length of the average with an exponent: sqrt((g + 1) / ((g + 2)^2 (g + 3))).

    Args:
        exponent: g, at least 0.

    Reference: arXiv 2312.02696, equation 123 (their sigma_rel).

    Example:
        >>> round(relative_length(6.94), 3)
        0.1
    """
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def power_exponent(length: float) -> float:
    """Exponent of the average with a relative length s: the root above 0 of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2.

    Args:
        length: Relative length, in (0, 12^-1/2]: the share of the training that the average reaches over.

    Raises:
        ValueError: If `length` is out of range.

    Reference: arXiv 2312.02696, section C.2.

    Example:
        >>> round(power_exponent(0.05), 2), round(power_exponent(0.10), 2)
        (16.97, 6.94)
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"the relative length of an average must be in (0, {MAX_LENGTH:.4f}], got {length}")
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def decay_at(update: int, exponent: float) -> float:
    """What an update keeps of the average, (1 - 1/t)^(g + 1): average <- d average + (1 - d) value.

    Args:
        update: t, from 1; the first value is taken whole.
        exponent: g.

    Reference: arXiv 2312.02696, equation 127.

    Example:
        >>> decay_at(1, 6.94), round(decay_at(1000, 6.94), 4)
        (0.0, 0.9921)
    """
    return (1 - 1 / update) ** (exponent + 1)


def combination(stored: Sequence[Average], wanted: Average) -> tuple[np.ndarray, float]:
    """Factors x, of sum 1, for which sum_i x_i (stored average i) comes nearest to an average that was not kept.

    They minimise sum_s (sum_i x_i w(s; t_i, g_i) - w(s; t, g))^2 over the weights of all values, in float64.

    Args:
        stored: Averages of one training, none of more updates than the wanted one.
        wanted: The average to make.

    Returns:
        x, (stored,) float64, and the error: the root of the least sum divided by the root of sum_s w(s; t, g)^2.

    Raises:
        ValueError: If nothing is stored, or an average is of more updates than the wanted one.

    Reference: arXiv 2312.02696, section 3.2 and C.3, there with integrals in place of the sums and
        a sum left free, which shrinks the weights where the stored averages are few.

    Example:
        >>> stored = [Average(100 * k, length) for k in range(1, 11) for length in (0.05, 0.10)]
        >>> factors, error = combination(stored, Average(1000, 0.07))
        >>> factors.shape, error < 0.02
        ((20,), True)
    """
    if not stored:
        raise ValueError("no averages are stored to make another one of")
    late = [average for average in stored if average.updates > wanted.updates]
    if late:
        raise ValueError(f"averages after {wanted.updates} updates are wanted, got one after {late[0].updates}")
    columns = [*stored, wanted]
    # R of a QR factorisation, taken up block by block of steps: no squared condition number, no tall matrix.
    triangle: np.ndarray = np.zeros((0, len(columns)))
    for start in range(0, wanted.updates, _STEPS_AT_ONCE):
        steps = np.arange(start, min(start + _STEPS_AT_ONCE, wanted.updates), dtype=np.float64) + 1
        rows = np.stack([_weights(steps, average) for average in columns], axis=1)
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, rows]), mode="r"))
    differences = triangle[:, 1:] - triangle[:, :1]  # the first factor is what the others leave of 1
    others = np.linalg.lstsq(differences[:, :-1], differences[:, -1], rcond=1e-12)[0]
    factors = np.concatenate([[1 - others.sum()], others])
    residual = triangle[:, :-1] @ factors - triangle[:, -1]
    return factors, float(np.linalg.norm(residual) / np.linalg.norm(triangle[:, -1]))


def _weights(steps: np.ndarray, average: Average) -> np.ndarray:
    """w(s; t, g) at some steps, 0 beyond t."""
    power = average.exponent + 1
    upper = np.minimum(steps, average.updates) / average.updates
    lower = np.minimum(steps - 1, average.updates) / average.updates
    return upper**power - lower**power


__all__ = ["MAX_LENGTH", "Average", "combination", "decay_at", "power_exponent", "relative_length"]

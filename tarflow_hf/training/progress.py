"""How far a run is, and what a step reports."""

import math
from dataclasses import dataclass


class NonFiniteTrainingError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


@dataclass
class Progress:
    """How far a run is; part of every checkpoint.

    Args:
        step: Optimizer steps taken, skipped ones included.
        skipped_steps: Steps skipped because of a loss or gradient that was not finite.
        bad_steps: How many of them were the latest ones in a row.
        skipped_images: Times that an unreadable image had to be replaced.
        window_loss: Sum of the losses since the last line of the log, nats per dimension.
        window_bits: Sum of the bits per dimension since then.
        window_steps: Steps taken and not skipped since then.
        first_loss: Loss of the first step that was not skipped, which a sound run never leaves far below.
        rollbacks: How often the run went back to a sound checkpoint.
        skipped_data: Steps by which the data are ahead of the steps taken: those that rollbacks left out.

    Example:
        >>> progress = Progress(step=2, window_loss=3.0, window_bits=14.0, window_steps=2)
        >>> progress.close_window(), progress.window_steps
        ({'loss': 1.5, 'bits_per_dim': 7.0}, 0)
    """

    step: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0
    skipped_images: int = 0
    window_loss: float = 0.0
    window_bits: float = 0.0
    window_steps: int = 0
    first_loss: float | None = None
    rollbacks: int = 0
    skipped_data: int = 0

    def close_window(self) -> dict[str, float]:
        """Averages over the steps since the last call, NaN if all of them were skipped; starts a new window."""
        steps = self.window_steps or math.nan
        averages = {"loss": self.window_loss / steps, "bits_per_dim": self.window_bits / steps}
        self.window_loss, self.window_bits, self.window_steps = 0.0, 0.0, 0
        return averages


@dataclass(frozen=True)
class StepResult:
    """What a training step reports, the same on every process.

    Args:
        loss: Mean over the batch, nats per dimension without the constant.
        bits_per_dim: Mean over the batch, of the noisy images.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: Learning rate of the step.
        skipped: Whether loss or gradient were not finite, so that nothing was changed.
        stop: Whether some process was asked to stop.

    Example:
        >>> result = StepResult(0.5, bits_per_dim=8.2, grad_norm=1.3, learning_rate=1e-4, skipped=False, stop=False)
        >>> f"{result.loss} nats and {result.bits_per_dim} bits per dimension"
        '0.5 nats and 8.2 bits per dimension'
    """

    loss: float
    bits_per_dim: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    stop: bool


__all__ = ["NonFiniteTrainingError", "Progress", "StepResult"]

"""How long a run is, and the learning rate of each of its steps."""

import math
from dataclasses import dataclass

from tarflow_hf.training.arguments import OptimizationArguments


def learning_rate(step: int, *, highest: float, lowest: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step: linear from `lowest` to `highest`, then half a cosine back to `lowest`, then `lowest`.

    Args:
        step: Number of the step, from 0.
        highest: Learning rate after the warm-up.
        lowest: Learning rate at step 0 and from `total_steps` on.
        warmup_steps: Steps of the linear part.
        total_steps: Planned length of the training.

    Example:
        >>> [learning_rate(step, highest=1.0, lowest=0.0, warmup_steps=2, total_steps=6) for step in (0, 1, 2, 4, 6)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return lowest + (highest - lowest) * step / warmup_steps
    if step >= total_steps:
        return lowest
    fraction = (step - warmup_steps) / (total_steps - warmup_steps)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class Schedule:
    """The length of a run in optimizer steps.

    Args:
        total_steps: Planned length of the training.
        warmup_steps: Steps with a rising learning rate.

    Example:
        >>> Schedule(total_steps=100, warmup_steps=10).due(30, every=20), Schedule(100, 10).due(100, every=None)
        (False, True)
    """

    total_steps: int
    warmup_steps: int

    @classmethod
    def plan(cls, settings: OptimizationArguments, num_images: int | None) -> "Schedule":
        """The length that the options ask for; passes over a data set leave the incomplete last batch out.

        Args:
            settings: The options of the optimisation.
            num_images: Rows of the training data; None for a stream, which has no passes.

        Raises:
            ValueError: If that is no step.
        """

        def steps(epochs: float | None) -> int:
            if epochs is None or num_images is None:
                return 0
            return round(epochs * (num_images // settings.batch_size))

        total_steps = settings.max_steps or steps(settings.epochs)
        if total_steps < 1:
            raise ValueError(
                f"epochs={settings.epochs} of {num_images} images are no step of batch_size={settings.batch_size}"
            )
        return cls(total_steps, settings.warmup_steps or steps(settings.warmup_epochs))

    @property
    def remark(self) -> str:
        """What a user may not have meant; empty where there is nothing to say.

        Example:
            >>> Schedule(total_steps=10, warmup_steps=46).remark
            'the warm-up takes 46 steps and the run 10: learning_rate is never reached'
        """
        if self.warmup_steps < self.total_steps:
            return ""
        run = f"the warm-up takes {self.warmup_steps} steps and the run {self.total_steps}"
        return f"{run}: learning_rate is never reached"

    def due(self, step: int, every: int | None) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after this step."""
        return step == self.total_steps or (every is not None and step % every == 0)

    def learning_rate(self, step: int, settings: OptimizationArguments) -> float:
        """The learning rate of a step, see [`learning_rate`]."""
        return learning_rate(
            step,
            highest=settings.learning_rate,
            lowest=settings.min_learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )


__all__ = ["Schedule", "learning_rate"]

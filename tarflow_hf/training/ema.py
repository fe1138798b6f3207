"""Moving averages of a model's state: its parameters and its floating-point buffers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tarflow_hf.training.power_average import decay_at, power_exponent
from tarflow_hf.training.sharding import tensor_state


class WeightAverage(ABC):
    """Averages the weights along a training run: after update number n, average <- d(n) average + (1 - d(n)) value.

    Works element by element on whatever part of the state this process holds, also where FSDP shards it.

    Args:
        model: The model, whose present state is the start of the average.

    Example:
        >>> issubclass(PowerAverage, WeightAverage)  # the kinds differ in d(n)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in tensor_state(model).items()}

    @abstractmethod
    def decay(self, update: int) -> float:
        """d(n), what update number n (from 1) keeps of the average."""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the present state of the model; to be called after every optimizer step."""
        self.num_updates += 1
        decay = self.decay(self.num_updates)
        for name, tensor in tensor_state(model).items():
            self.average[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Lends the averaged state to the model; its own state is back afterwards, bit by bit."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, tensor in tensor_state(model).items():
            own = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return {"num_updates": self.num_updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved average.

        Raises:
            ValueError: If it is of another model.
        """
        if state["average"].keys() != self.average.keys():
            different = sorted(state["average"].keys() ^ self.average.keys())
            raise ValueError(f"the saved average is of another model; tensors of only one of them: {different[:5]}")
        self.num_updates = state["num_updates"]
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)


class ExponentialMovingAverage(WeightAverage):
    """Exponential average with d(n) = min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.

    Args:
        model: The model, whose present state is the start of the average.
        decay: Largest decay, in [0, 1); 0.9999 averages over about 10,000 steps.

    Raises:
        ValueError: If `decay` is out of range.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(0.0)
        >>> ema = ExponentialMovingAverage(model, decay=0.9999)
        >>> _ = model.weight.data.fill_(1.0)
        >>> ema.update(model)  # the first decay is 2/11
        >>> with ema.applied_to(model):
        ...     print(model.weight.item())
        0.8181818127632141
        >>> model.weight.item()
        1.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
        super().__init__(model)
        self.largest_decay = decay

    def decay(self, update: int) -> float:
        """min(decay, (1 + n) / (10 + n))."""
        return min(self.largest_decay, (1 + update) / (10 + update))


class PowerAverage(WeightAverage):
    """Average whose weights grow with a power of time: its length is a fixed share of the training so far.

    Stored along the way, two of them give the average of any other length afterwards, see [`posthoc.py`].

    Args:
        model: The model.
        length: Relative length, in (0, 12^-1/2]; 0.05 and 0.10 are the paper's.
        origin: Step at which it begins.

    Raises:
        ValueError: If `length` is out of range.

    Reference: arXiv 2312.02696, section 3.1.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = PowerAverage(model, length=12**-0.5)  # the plain mean
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = model.weight.data.fill_(value)
        ...     average.update(model)
        >>> average.average["weight"].item()
        3.0
    """

    def __init__(self, model: nn.Module, length: float, *, origin: int = 0) -> None:
        self.exponent = power_exponent(length)
        self.origin = origin
        super().__init__(model)

    def decay(self, update: int) -> float:
        """(1 - 1/n)^(g + 1)."""
        return decay_at(update, self.exponent)

    def state_dict(self) -> dict[str, Any]:
        """The average, the number of updates, and the step at which it began."""
        return super().state_dict() | {"origin": self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved average; see [`WeightAverage.load_state_dict`]."""
        super().load_state_dict(state)
        self.origin = state["origin"]


__all__ = ["ExponentialMovingAverage", "PowerAverage", "WeightAverage"]

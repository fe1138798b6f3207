"""What a forward pass returns, and what the class shows of it to transformers' Trainer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from transformers.utils.generic import ModelOutput


@dataclass
class TarFlowOutput(ModelOutput):
    """What [`TarFlowModel.forward`] returns.

    By number and as a tuple (`return_dict=False`, `to_tuple()`) the loss comes first, as everywhere in transformers.
    By name the latents do: transformers' feature pipeline takes the first entry for the features of an image.

    Args:
        latents: (batch, tokens, patch_dim) z, in raster order.
        log_det: (batch,) log |det dz/dx|, summed over dimensions, in nats.
        loss: () mean over batch and dimensions of 1/2 z^2 minus the log-determinant per dimension: the negative
            log-likelihood in nats per dimension without the constant 1/2 log 2 pi.
        hidden_states: Latents after each block, if asked for; the last equals `latents`.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> output = TarFlowModel(config)(torch.zeros(3, 1, 8, 8), output_hidden_states=True)
        >>> output.loss.shape, output.latents.shape, output.log_det.shape, len(output.hidden_states)
        (torch.Size([]), torch.Size([3, 16, 4]), torch.Size([3]), 2)
        >>> list(output), output[0].equal(output.loss)
        (['latents', 'log_det', 'loss', 'hidden_states'], True)
    """

    latents: torch.Tensor | None = None
    log_det: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, the loss first."""
        first = () if self.loss is None else (self.loss,)
        return (*first, *(value for name, value in self.items() if name != "loss"))


class LossWithoutLabels(type):
    """The type of a model class whose loss needs no labels, in the way in which transformers' Trainer finds out.

    The Trainer evaluates a loss without labels only where no argument of the forward of the CLASS has "label" in its
    name and `return_loss` is true by default. Which columns of the data set the model takes it reads from the forward
    of the INSTANCE, which has all arguments. This type shows the class's forward without those named for labels.

    Example:
        >>> from transformers.utils.generic import can_return_loss, find_labels
        >>> find_labels(TarFlowModel), can_return_loss(TarFlowModel)
        ([], True)
    """

    @property
    def forward(cls) -> Callable[..., object]:
        """The forward pass as the class has it, with a signature without labels."""
        function = next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))
        # A copy of the function itself, which torch.compile takes for what it stands for.
        forward = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        forward.__kwdefaults__, forward.__doc__ = function.__kwdefaults__, function.__doc__
        signature = inspect.signature(function)
        shown = [parameter for name, parameter in signature.parameters.items() if "label" not in name]
        forward.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return forward


__all__ = ["LossWithoutLabels", "TarFlowOutput"]

"""Training steps of a TarFlow model, on one process or many, with nothing left to chance.

What a step does is decided by the seed, the step's number and the batch over all processes: `batches.py` orders the
images, `augmentation.py` draws flips, noise and dropped labels, and the learning rate follows from the step's number.
Neither the number of processes nor an interruption changes them.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tarflow_hf.flow.likelihood import bits_per_dim, nats_per_dim
from tarflow_hf.flow.noise import noise_level_weights
from tarflow_hf.modeling_tarflow import TarFlowModel, TarFlowOutput
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.augmentation import MicroBatch
from tarflow_hf.training.ema import ExponentialMovingAverage, PowerAverage, WeightAverage
from tarflow_hf.training.progress import NonFiniteTrainingError, Progress, StepResult
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.sharding import gather_state, is_sharded, shard_like, tensor_state, whole_tensor
from tarflow_hf.training.trained_part import parameter_groups, without_adapters


def output_bits_per_dim(output: TarFlowOutput, model: TarFlowModel) -> torch.Tensor:
    """(batch,) bits per dimension of the images that a forward pass encoded, without gradients.

    They are those of the images as the model saw them, with the training noise on: for uniform noise a bound on the
    code length of the 8-bit image, for Gaussian noise the density of noisy images.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> model = TarFlowModel(config)
        >>> output_bits_per_dim(model(torch.zeros(2, 1, 8, 8)), model)
        tensor([8.3257, 8.3257])
    """
    return bits_per_dim(model.log_prob_of(output).detach(), model.config.num_dims)


_DIVERGED = 10.0  # nats per dimension above the first loss: an untrained model, which changes nothing, is far better


class Trainer:
    """Model, optimizer and average of the weights, and what one step does to them.

    Args:
        accelerator: The processes and their devices.
        model: The model to train; `accelerator` may wrap it.
        settings: The options of the optimisation.
        schedule: Length of the training and of its warm-up.
        layer_decay: See [`start.parameter_groups`].

    Example:
        >>> from accelerate import Accelerator
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> from tarflow_hf.training.schedule import Schedule
        >>> settings = OptimizationArguments(batch_size=4, max_steps=10, learning_rate=1e-3)
        >>> accelerator = Accelerator(cpu=True)
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> trainer = Trainer(accelerator, TarFlowModel(config), settings, Schedule(total_steps=10, warmup_steps=0))
        >>> images = torch.linspace(-1, 1, 4 * 64, device=accelerator.device).view(4, 1, 8, 8)
        >>> results = [trainer.step([(images, None)]) for _ in range(5)]
        >>> results[-1].loss < results[0].loss
        True
        >>> with trainer.evaluation_model() as model:
        ...     print(model.training)
        False
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: TarFlowModel,
        settings: OptimizationArguments,
        schedule: Schedule,
        layer_decay: float = 1.0,
    ) -> None:
        self.accelerator = accelerator
        self.settings = settings
        self.schedule = schedule
        self.progress = Progress()
        self.model = model.to(accelerator.device)
        if settings.activation_checkpointing:
            model.activation_checkpointing_enable()
        if settings.compile:
            model.compile()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, layer_decay),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        with warnings.catch_warnings():  # whose new name Accelerate does not know yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.wrapped_model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=settings.precision == "float16")
        self.ema = ExponentialMovingAverage(model, settings.ema_decay) if settings.ema_decay is not None else None
        self.posthoc = {str(length): PowerAverage(model, length) for length in settings.posthoc_ema}

    def step(self, micro_batches: Sequence[MicroBatch], *, bad_images: int = 0, stop: bool = False) -> StepResult:
        """Takes one optimizer step, or skips it if the loss or the gradient is not finite on any process.

        Args:
            micro_batches: The parts of this process's share of the batch.
            bad_images: Unreadable images that were replaced in this process's share.
            stop: Whether this process was asked to stop; the result says whether any was.

        Returns:
            What happened, the same on every process.

        Raises:
            NonFiniteTrainingError: If too many steps in a row were skipped.
        """
        rate = self.schedule.learning_rate(self.progress.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        loss, bits, mean_square = self._accumulate_gradients(micro_batches)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer.optimizer)
        norm = self._clip_gradients()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        counts = torch.tensor([float(bad_images), float(stop)], device=loss.device)
        report = torch.cat([torch.stack([loss, bits, (~finite).float()]), counts])
        loss_sum, bits_sum, bad, bad_images_sum, stopping = self.accelerator.reduce(report, "sum").tolist()
        processes, skipped = self.accelerator.num_processes, bad > 0
        if not skipped:
            self.optimizer.step()
            self._update_averages(mean_square)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.skipped_images += round(bad_images_sum)
        self._count(loss_sum / processes, bits_sum / processes, skipped)
        return StepResult(loss_sum / processes, bits_sum / processes, norm.item(), rate, skipped, stopping > 0)

    def _accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Gradients of the mean loss; returns loss, bits per dimension and mean of z^2 of this process's share."""
        device, count = self.accelerator.device, len(micro_batches)
        loss, bits = torch.zeros(2, device=device).unbind()
        mean_square = torch.zeros_like(self.model.prior_variance) if self.model.config.volume_preserving else None
        for index, inputs in enumerate(micro_batches):
            last = index == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped_model):
                with self._autocast():
                    output = self.wrapped_model(*inputs, return_dict=True, update_prior=False)
                levels = inputs[2] if len(inputs) > 2 else None
                part_loss = output.loss if levels is None else self._weighted_loss(output, levels)
                self.accelerator.backward(self.scaler.scale(part_loss / count))
            loss = loss + part_loss.detach() / count
            bits = bits + output_bits_per_dim(output, self.model).mean() / count
            if mean_square is not None:
                mean_square += output.latents.detach().square().mean(0) / count
        return loss, bits, mean_square

    def _weighted_loss(self, output: TarFlowOutput, noise_level: torch.Tensor) -> torch.Tensor:
        """The mean over images of the weight of their noise level times their loss."""
        assert output.latents is not None  # every forward pass fills both
        assert output.log_det is not None
        low, high = self.model.config.noise_range
        weights = noise_level_weights(noise_level, self.settings.noise_level_weighting, (low, high))
        return (weights * nats_per_dim(output.latents, output.log_det)).mean()

    def _autocast(self) -> AbstractContextManager[None]:
        device_type = self.accelerator.device.type
        dtype = getattr(torch, self.settings.precision)
        return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)

    def _clip_gradients(self) -> torch.Tensor:
        """Norm of the gradient over all parameters and processes; scales it down if a limit is set."""
        parameters = [parameter for parameter in self.wrapped_model.parameters() if parameter.grad is not None]
        norm = whole_tensor(nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        return norm

    def _update_averages(self, mean_square: torch.Tensor | None) -> None:
        if mean_square is not None:
            self.model.update_prior_variance(self.accelerator.reduce(mean_square, "mean"))
        for average in self.averages():
            average.update(self.model)

    def averages(self) -> list[WeightAverage]:
        """Every average of the weights that is kept."""
        return [*([self.ema] if self.ema is not None else []), *self.posthoc.values()]

    def _count(self, loss: float, bits: float, skipped: bool) -> None:
        progress = self.progress
        progress.step += 1
        progress.skipped_steps += skipped
        if not skipped:
            progress.window_loss += loss
            progress.window_bits += bits
            progress.window_steps += 1
            progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        seeks_scale = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() >= 1
        diverged = progress.first_loss is not None and loss > progress.first_loss + _DIVERGED
        if not diverged and (not skipped or seeks_scale):
            progress.bad_steps = 0
            return
        progress.bad_steps += 1
        if progress.bad_steps >= self.settings.max_bad_steps:
            raise NonFiniteTrainingError(
                f"loss or gradient was not finite in {progress.bad_steps} steps in a row, up to step {progress.step}, "
                f"or the loss more than {_DIVERGED:.0f} nats per dimension above the first one: "
                "lower learning_rate, set max_grad_norm, or train in float32"
            )

    def state(self, *, whole: bool = True) -> dict[str, Any]:
        """Everything that is needed to go on. All processes call it together.

        Args:
            whole: Whether to give whole tensors, copied to the CPU of the main process (empty on others); otherwise
                the tensors that training goes on with, of which each process may hold a part.
        """
        state = {
            "model": tensor_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "posthoc": {length: average.state_dict() for length, average in self.posthoc.items()},
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "progress": asdict(self.progress),
        }
        return gather_state(state, keep=self.accelerator.is_main_process) if whole else state

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state of [`state`]. All processes call it together, each with the whole state."""
        own = tensor_state(self.model)
        for name, tensor in state["model"].items():
            own[name].copy_(shard_like(tensor, own[name]))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            index: {
                name: (shard_like(value, parameters[index]) if value.ndim else value).clone()
                for name, value in entry.items()
            }
            for index, entry in state["optimizer"]["state"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]  # what the settings say now
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler.is_enabled() and state.get("scaler") is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if self.ema is not None and state["ema"] is None:  # asked for by now: it begins here
            self.ema = ExponentialMovingAverage(self.model, self.ema.largest_decay)
        kept = state.get("posthoc", {})
        for length in self.posthoc.keys() - kept.keys():  # asked for by now: it begins here
            self.posthoc[length] = PowerAverage(self.model, float(length), origin=self.progress.step)
        pairs = [(self.posthoc[length], kept[length]) for length in self.posthoc.keys() & kept.keys()]
        for average, saved in [*([(self.ema, state["ema"])] if self.ema and state["ema"] else []), *pairs]:
            parts = {name: shard_like(tensor, own[name]) for name, tensor in saved["average"].items()}
            average.load_state_dict(saved | {"average": parts})

    def posthoc_state(self) -> dict[str, Any]:
        """The averages that are stored for later ones, gathered as in [`state`]. All processes call it together."""
        kept = {length: average.state_dict() for length, average in self.posthoc.items()}
        return gather_state(kept, keep=self.accelerator.is_main_process)

    def release(self) -> None:
        """Lets go of what belongs to the process group; to be called before `accelerator.end_training()`.

        DistributedDataParallel keeps the group alive, and a group that ends together with it can wait for ever for a
        thread of its own.
        """
        self.wrapped_model, self.optimizer = self.accelerator.free_memory(self.wrapped_model, self.optimizer)

    @contextmanager
    def evaluation_model(self) -> Iterator[TarFlowModel]:
        """Lends the model, in evaluation mode and with averaged weights where there is an average.

        Where FSDP shards the weights, a whole copy on this process's device. All processes call it together.
        """
        with self.ema.applied_to(self.model) if self.ema is not None else nullcontext():
            if is_sharded(self.model):
                yield self._whole_copy()
            else:
                self.model.eval()
                yield without_adapters(self.model)
                self.model.train()

    def _whole_copy(self) -> TarFlowModel:
        with torch.device(self.accelerator.device):
            copy = type(self.model)(self.model.config).eval()
        target = tensor_state(copy)
        for name, tensor in tensor_state(self.model).items():
            target[name].copy_(whole_tensor(tensor))
        return copy


__all__ = ["Trainer", "output_bits_per_dim"]

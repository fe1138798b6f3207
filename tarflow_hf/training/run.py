"""One training run: what is done in which order, from the data to the finished pipeline."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.images.batches import StoredImages
from tarflow_hf.images.latent_data import collate_latents
from tarflow_hf.images.latents import Autoencoder
from tarflow_hf.images.order import BatchLayout, check_batch_size
from tarflow_hf.images.sources import ImageData
from tarflow_hf.training import posthoc
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.augmentation import Augmenter, MicroBatch
from tarflow_hf.training.divergence import advice
from tarflow_hf.training.history import History
from tarflow_hf.training.latents import encode_run_data, flow_config
from tarflow_hf.training.launchers import missing_processes
from tarflow_hf.training.log import TrainingLog
from tarflow_hf.training.overview import overview
from tarflow_hf.training.progress import NonFiniteTrainingError, StepResult
from tarflow_hf.training.results import Results
from tarflow_hf.training.resume import content_fingerprint
from tarflow_hf.training.run_checkpoints import RunCheckpoints
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.speed import peak_flops, training_flops
from tarflow_hf.training.start import start_model
from tarflow_hf.training.step_inputs import step_inputs
from tarflow_hf.training.stopping import (
    Interrupted,
    StopSignal,
    StopTogether,
    end_readers_at_exit,
)
from tarflow_hf.training.trackers import track_picture
from tarflow_hf.training.trained_part import save_adapter
from tarflow_hf.training.trainer import Trainer
from tarflow_hf.training.validation import held_out_bits_per_dim, sample_grid

logger = logging.getLogger(__name__)


class Run:
    """Data, trainer and log of one training run, and what happens when.

    Args:
        arguments: All options.
        accelerator: The processes and their devices.
        train_data: The images to train on.
        eval_data: Held-out images, if there are any.
        stop: Whether this process is asked to stop.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        accelerator: Accelerator,
        train_data: ImageData,
        eval_data: ImageData | None,
        stop: StopSignal,
    ) -> None:
        settings = arguments.optimization
        self.stop = stop
        self.stop_together = StopTogether(stop, accelerator)
        self.arguments, self.accelerator = arguments, accelerator
        self.folder = Path(arguments.output.output_dir)
        self.history = History(self.folder / "history.jsonl")
        self.train_data = train_data
        self.eval_images = None
        if eval_data is not None:
            skip = arguments.data.skip_bad_images
            self.eval_images = StoredImages(eval_data, arguments.image_format, skip_bad_images=skip)
        if self.num_images is not None:
            check_batch_size(settings.batch_size, self.num_images)
        self.schedule = Schedule.plan(settings, self.num_images)
        self.layout = BatchLayout(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.latents = encode_run_data(arguments, accelerator, train_data, eval_data)
        self.trainer = self._make_trainer()
        self.unit = DensityUnit.of(self.trainer.model.config, latent=self.latents is not None)
        self.augment = Augmenter(
            self.trainer.model.config,
            settings,
            horizontal_flip=arguments.data.horizontal_flip,
            device=accelerator.device,
            latent_source=arguments.data.latent_source,
        )
        self.checkpoints = RunCheckpoints(
            self.folder / "checkpoints", self.trainer, arguments, self.configuration, content_fingerprint(train_data)
        )
        self.changes = self.checkpoints.resume()
        self.saved_at = time.monotonic()
        self._forget_later_averages()
        if self.step > self.schedule.total_steps:
            raise ValueError(
                f"the run in {self.folder} has taken {self.step} steps: max_steps (or epochs) must give at least as "
                f"many, got {self.schedule.total_steps}"
            )
        self.log = TrainingLog(
            accelerator,
            self.folder / "metrics.jsonl",
            total_steps=self.schedule.total_steps,
            batch_size=settings.batch_size,
            start=self.step,
            most_images_per_second=self._most_images_per_second(),
        )
        count = len(self.eval_images or [])
        self.results = Results(arguments, self.log.metrics, num_eval_images=count, unit=self.unit, vae=self.vae)

    def _most_images_per_second(self) -> float | None:
        """What all devices could do with the model's operations at their peak; None where that is not known."""
        peak = peak_flops(self.accelerator.device, self.arguments.optimization.precision)
        if peak is None:
            return None
        return peak * self.accelerator.num_processes / training_flops(self.trainer.model.config)

    def _make_trainer(self) -> Trainer:
        settings = self.arguments.optimization
        torch.manual_seed(settings.seed)
        arguments, start = self.arguments, self.arguments.start
        names = self.train_data.class_names
        config = flow_config(arguments, names, self.vae, **self.train_data.described)
        model, self.report_of_start = start_model(config, start, arguments.model)
        return Trainer(self.accelerator, model, settings, self.schedule, start.layer_decay)

    @property
    def vae(self) -> Autoencoder | None:
        """The autoencoder of a run on latents."""
        return None if self.latents is None else self.latents.vae

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.trainer.progress.step

    @property
    def num_images(self) -> int | None:
        """Rows of the training data; None for a stream."""
        return None if self.arguments.data.streaming else len(self.train_data.rows)

    def train(self) -> bool:
        """Trains to the end and writes the results; False if it was stopped early, after a checkpoint."""
        self.begin()
        end_readers_at_exit()
        self.stop.hold()
        try:
            with self.log:
                if self.step > 0:
                    self.look()
                while self.step < self.schedule.total_steps:
                    try:
                        self.take_steps()
                    except NonFiniteTrainingError as error:
                        self.go_back(error)
            self.checkpoints.wait()
            self.finish()
        except Interrupted:
            self.save_and_stop()
            return False
        self.note("finish", {})
        return True

    def begin(self) -> None:
        """Says and notes what is about to happen."""
        images = f"{self.num_images or 'a stream of'} images"
        total_steps = self.schedule.total_steps
        self.log.say(overview(self.folder, self.trainer, self.layout, images=images, total_steps=total_steps))
        if self.schedule.remark:
            self.log.say(self.schedule.remark)
        if self.report_of_start and self.step == 0:
            self.log.say(self.report_of_start)
        warning = missing_processes(self.accelerator)
        if warning is not None:
            logger.warning("%s", warning)
        if self.log.removed_lines:
            self.log.say(f"metrics.jsonl: {self.log.removed_lines} lines of after step {self.step} removed")
        about = {"host": socket.gethostname(), "process": os.getpid(), "processes": self.accelerator.num_processes}
        self.note("start", about | {"device": self.accelerator.device.type})
        if self.changes:
            self.note("change", self.changes)
            changed = ", ".join(f"{name} {old} to {new}" for name, (old, new) in self.changes.items())
            self.log.say(f"changed from step {self.step} on: {changed}")

    def note(self, event: str, values: dict[str, Any]) -> None:
        """Writes into the history of the run."""
        if self.accelerator.is_main_process:
            self.history.append(event, self.step, values)

    def take_steps(self) -> None:
        """Steps to the end, with what is due after each of them."""
        output = self.arguments.output
        started = time.monotonic()
        for micro_batches, bad_images in self.batches():
            result = self.trainer.step(micro_batches, bad_images=bad_images, stop=self.stop.received)
            self.log.advance(self.step)
            if self.due(output.log_every):
                self.report(result)
            self.store_averages()
            self.stop.took("step", time.monotonic() - started)
            if result.stop:
                self.stop.request("a signal to another process")
                raise Interrupted
            if self.checkpoint_due():
                self.save_checkpoint()
            self.look()
            started = time.monotonic()

    def checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint: by steps or, looked at with every line of the log, by the clock."""
        output = self.arguments.output
        if self.due(output.checkpoint_every) or (output.keep_every and self.step % output.keep_every == 0):
            return True
        if output.checkpoint_minutes is None or not self.due(output.log_every):
            return False
        (late,) = broadcast_object_list([time.monotonic() - self.saved_at > 60 * output.checkpoint_minutes])
        return bool(late)

    def save_and_stop(self) -> None:
        """Ends early: the same command goes on from here."""
        if self.checkpoints.saved_step != self.step:
            self.save_checkpoint()
        self.checkpoints.wait()
        self.note("stop", {"reason": self.stop.reason})
        self.log.say(f"stopped by {self.stop.reason} after step {self.step}; the same command goes on from here")

    def go_back(self, error: NonFiniteTrainingError) -> None:
        """After too many bad steps in a row: back to the last sound checkpoint, and on with the data that follow.

        The weights and everything else are those of the checkpoint; the data of the steps since then are left out.
        """
        progress, settings = self.trainer.progress, self.arguments.optimization
        failed, rollbacks = self.step, progress.rollbacks
        next_data = failed + progress.skipped_data
        step = self.checkpoints.go_back()
        if step is None or rollbacks >= settings.max_rollbacks:
            raise NonFiniteTrainingError(f"{error}. {advice(settings, step, rollbacks)}") from error
        progress = self.trainer.progress
        progress.rollbacks, progress.skipped_data, progress.bad_steps = rollbacks + 1, next_data - step, 0
        self.save_checkpoint()
        self._forget_later_averages()
        self.log.rewind(step)
        self.note("rollback", {"from": failed, "number": rollbacks + 1})
        self.log.say(
            f"steps up to {failed} went wrong: back to step {step} (rollback {rollbacks + 1} of at most "
            f"{settings.max_rollbacks}), on without the data of {failed - step} steps; metrics.jsonl goes back too"
        )
        self.look()

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.schedule.due(self.step, every)

    def look(self) -> None:
        """Evaluates and samples if it is time to: after the checkpoint, which a failure here would not cost."""
        output = self.arguments.output
        if self.due(output.eval_every):
            self.evaluate()
        if self.due(output.sample_every):
            self.sample(self.folder / "grids" / f"step-{self.step:08d}.png")
        if output.push_checkpoints and self.checkpoints.saved_step == self.step < self.schedule.total_steps:
            self.push_checkpoint()

    def batches(self) -> Iterator[tuple[list[MicroBatch], int]]:
        """For each step left: the model's input in parts, and how many unreadable images were replaced in it."""
        ahead = self.trainer.progress.skipped_data
        steps = range(self.step + ahead, self.schedule.total_steps + ahead)
        encoded = None if self.latents is None else (self.latents.train, collate_latents)
        yield from step_inputs(
            self.train_data, self.arguments, self.layout, self.augment, steps=steps, encoded=encoded
        )

    def report(self, result: StepResult) -> None:
        """Writes the averages since the last line of metrics."""
        progress = self.trainer.progress
        values: dict[str, float | int] = {
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "skipped_images": progress.skipped_images,
        }
        self.log.write(self.step, self.unit.named(progress.close_window()) | values)
        self.log.speed(self.step)

    def evaluate(self) -> None:
        """Writes the bits per dimension of the held-out images."""
        held_out = self.eval_images if self.latents is None else self.latents.held_out
        if held_out is None:
            return
        with self.trainer.evaluation_model() as model:
            bits = held_out_bits_per_dim(
                model,
                held_out,
                self.accelerator,
                batch_size=self.arguments.output.eval_batch_size,
                num_workers=self.arguments.data.num_workers,
                stop=self.stop_together,
            )
        self.log.write(self.step, self.unit.named({"validation_bits_per_dim": bits}))
        (is_best,) = broadcast_object_list([self.step in self.best_steps()])
        if is_best and self.checkpoints.saved_step != self.step:
            self.save_checkpoint()
        self.log.pause(self.step)

    def sample(self, path: Path) -> None:
        """Writes a grid of samples."""
        with self.trainer.evaluation_model() as model:
            size = self.arguments.model.image_size
            output, stop = self.arguments.output, self.stop_together
            sample_grid(model, output, self.accelerator, path, stop, vae=self.vae, image_size=size)
        track_picture(self.accelerator, "samples", path, self.step)
        self.log.pause(self.step)

    def save_checkpoint(self) -> None:
        """Writes everything that is needed to go on from here."""
        started = time.monotonic()
        self.checkpoints.save(best=self.best_steps())
        self.saved_at = time.monotonic()
        self.stop.took("checkpoint", time.monotonic() - started)
        self.log.pause(self.step)

    def best_steps(self) -> list[int]:
        """Steps of the lowest validation bits so far, as many as are to be kept; known to the main process."""
        count = self.arguments.output.keep_best
        if count is None or not self.accelerator.is_main_process:
            return []
        (name,) = self.unit.named({"validation_bits_per_dim": 0.0})
        steps, bits = self.log.metrics.curve(name)
        return [step for _, step in sorted(zip(bits, steps, strict=True))[:count]]

    def _forget_later_averages(self) -> None:
        if self.accelerator.is_main_process:
            posthoc.remove_averages_after(self.folder / posthoc.FOLDER, self.step)

    def store_averages(self) -> None:
        """Stores the averages for later ones if it is time to, before the checkpoint that goes on from them."""
        every = self.arguments.output.posthoc_every or max(1, self.schedule.total_steps // 32)
        if self.trainer.posthoc and self.due(every):
            averages = self.trainer.posthoc_state()
            if self.accelerator.is_main_process:
                posthoc.store_averages(self.folder / posthoc.FOLDER, self.step, averages)
            self.log.pause(self.step)

    def push_checkpoint(self) -> None:
        """Begins to upload the pipeline as it is now, unless an upload is under way."""
        with self.trainer.evaluation_model() as model:
            if self.accelerator.is_main_process:
                self.results.push_later(model, self.step)
        self.log.pause(self.step)

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        classes = list(self.train_data.class_names)
        about = {"condition": self.train_data.condition} if self.train_data.condition else {}
        about |= {} if self.train_data.arrays is None else {"arrays": self.train_data.arrays.config}
        autoencoder = {} if self.latents is None else {"vae_fingerprint": self.latents.fingerprint}
        return self.arguments.fixed() | {"num_images": self.num_images, "class_names": classes} | about | autoencoder

    def finish(self) -> None:
        """Writes the pipeline of the run, then pictures, which may fail, and a page that shows them."""
        with self.trainer.evaluation_model() as model:
            if self.accelerator.is_main_process:
                self.results.write_pipeline(model, self.folder)
                if self.arguments.start.lora is not None:
                    save_adapter(self.trainer.model, self.arguments.start, self.folder / "adapter")
        self.sample(self.folder / "samples.png")
        with self.trainer.evaluation_model() as model:
            if not self.accelerator.is_main_process:
                return
            self.results.draw_curve()
            self.results.write_page(model)
        files = "pipeline, samples.png, curve.png and metrics.jsonl"
        print(f"{self.folder}: {files} after {self.schedule.total_steps} steps")
        if self.arguments.output.push_to_hub:
            print(self.results.push())

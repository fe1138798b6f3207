"""One training run: what is done in which order, from the data to the finished pipeline."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tarflow_hf.images.batches import ImageBatch, StoredImages, make_loader
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.images.sources import ImageData, load_image_data
from tarflow_hf.training import posthoc
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.augmentation import Augmenter, MicroBatch
from tarflow_hf.training.checkpoints import StopSignal, latest_checkpoint, read_checkpoint, write_checkpoint
from tarflow_hf.training.launchers import make_accelerator
from tarflow_hf.training.log import TrainingLog
from tarflow_hf.training.progress import StepResult
from tarflow_hf.training.results import Results
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.speed import peak_flops, training_flops
from tarflow_hf.training.start import start_model
from tarflow_hf.training.trackers import start_trackers, track_picture
from tarflow_hf.training.trained_part import save_adapter
from tarflow_hf.training.trainer import Trainer
from tarflow_hf.training.validation import held_out_bits_per_dim, sample_grid

logger = logging.getLogger(__name__)


def train(arguments: TrainingArguments) -> None:
    """Trains to the end, or until a stop signal, in every process that a launcher started.

    Args:
        arguments: All options.

    Example:
        >>> from tarflow_hf.training.recipes import parse_arguments
        >>> options = ["--max_steps", "2", "--hidden_size", "64", "--num_blocks", "2", "--layers_per_block", "1"]
        >>> options += ["--eval_images", "8", "--sample_rows", "1", "--sample_columns", "2", "--cache_images", "false"]
        >>> arguments = parse_arguments(options, default_recipe="examples/recipes/digits.yaml")
        >>> train(arguments)  # doctest: +ELLIPSIS
        runs/digits: ...
        runs/digits: pipeline, samples.png, curve.png and metrics.jsonl after 2 steps
    """
    folder = Path(arguments.output.output_dir)
    accelerator = make_accelerator(arguments.optimization, trackers=arguments.output.report_to, folder=folder)
    with accelerator.local_main_process_first():
        train_data, eval_data = load_image_data(
            arguments.data,
            class_conditional=arguments.model.class_conditional,
            eval_images=arguments.output.eval_images,
        )
    start_trackers(accelerator, arguments.published(), folder=folder)
    run = Run(arguments, accelerator, train_data, eval_data)
    if arguments.output.push_to_hub and accelerator.is_main_process:
        run.results.prepare_push()
    try:
        if run.train():
            run.finish()
    finally:
        run.trainer.release()
        accelerator.end_training()


class Run:
    """Data, trainer and log of one training run, and what happens when.

    Args:
        arguments: All options.
        accelerator: The processes and their devices.
        train_data: The images to train on.
        eval_data: Held-out images, if there are any.


    """

    def __init__(
        self,
        arguments: TrainingArguments,
        accelerator: Accelerator,
        train_data: ImageData,
        eval_data: ImageData | None,
    ) -> None:
        settings = arguments.optimization
        self.arguments = arguments
        self.accelerator = accelerator
        self.folder = Path(arguments.output.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.train_data = train_data
        self.eval_images = None if eval_data is None else self._stored(eval_data)
        self.schedule = Schedule.plan(settings, self.num_images)
        self.layout = BatchLayout(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.trainer = self._make_trainer()
        self.augment = Augmenter(
            self.trainer.model.config,
            settings,
            horizontal_flip=arguments.data.horizontal_flip,
            device=accelerator.device,
        )
        self.resume()
        self.log = TrainingLog(
            accelerator,
            self.folder / "metrics.jsonl",
            total_steps=self.schedule.total_steps,
            batch_size=settings.batch_size,
            start=self.step,
            most_images_per_second=self._most_images_per_second(),
        )
        self.results = Results(arguments, self.log.metrics, num_eval_images=len(self.eval_images or []))

    def _most_images_per_second(self) -> float | None:
        """What all devices could do with the model's operations at their peak; None where that is not known."""
        peak = peak_flops(self.accelerator.device, self.arguments.optimization.precision)
        if peak is None:
            return None
        return peak * self.accelerator.num_processes / training_flops(self.trainer.model.config)

    def _stored(self, data: ImageData) -> StoredImages:
        arguments = self.arguments
        return StoredImages(data, arguments.image_format, skip_bad_images=arguments.data.skip_bad_images)

    def _make_trainer(self) -> Trainer:
        settings = self.arguments.optimization
        torch.manual_seed(settings.seed)
        arguments, start = self.arguments, self.arguments.start
        names, resize = self.train_data.class_names, arguments.data.resize
        config = arguments.model.to_config(names, resize, **self.train_data.condition)
        model, self.report_of_start = start_model(config, start, arguments.model)
        return Trainer(self.accelerator, model, settings, self.schedule, start.layer_decay)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.trainer.progress.step

    @property
    def num_images(self) -> int | None:
        """Rows of the training data; None for a stream."""
        return None if self.arguments.data.streaming else len(self.train_data.rows)

    def train(self) -> bool:
        """Trains to the end; False if a stop signal ended it early, after a checkpoint."""
        output = self.arguments.output
        self.log.say(self.describe())
        if self.report_of_start and self.step == 0:
            self.log.say(self.report_of_start)
        with self.log, StopSignal() as signal:
            if self.step > 0:
                self.look()
            for micro_batches, bad_images in self.batches():
                result = self.trainer.step(micro_batches, bad_images=bad_images, stop=signal.received)
                self.log.advance(self.step)
                if self.due(output.log_every):
                    self.report(result)
                self.store_averages()
                if self.due(output.checkpoint_every) or result.stop:
                    self.save_checkpoint()
                if result.stop:
                    self.log.say(f"stopped by SIGTERM after step {self.step}; the same command goes on from here")
                    return False
                self.look()
        return True

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
        if output.push_checkpoints and self.due(output.checkpoint_every) and self.step < self.schedule.total_steps:
            self.push_checkpoint()

    def describe(self) -> str:
        """One line on what is about to happen."""
        config, processes = self.trainer.model.config, self.accelerator.num_processes
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        return (
            f"{self.folder}: {parameters / 1e6:.1f} M parameters, {self.num_images or 'a stream of'} images, "
            f"{config.num_classes} classes, {processes} {'process' if processes == 1 else 'processes'} on "
            f"{self.accelerator.device.type}, steps {self.step} to {self.schedule.total_steps}"
        )

    def batches(self) -> Iterator[tuple[list[MicroBatch], int]]:
        """For each step left: the model's input in parts, and how many unreadable images were replaced in it."""
        steps = range(self.step, self.schedule.total_steps)
        loader = make_loader(
            self.train_data,
            self.arguments.data,
            self.arguments.image_format,
            self.layout,
            seed=self.arguments.optimization.seed,
            steps=steps,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        parts = iter(loader)
        for step in steps:
            batches: list[ImageBatch] = [next(parts) for _ in range(self.layout.micro_batches)]
            bad_rows = [row for batch in batches for row in batch.bad_rows]
            if bad_rows:
                logger.warning("unreadable images in rows %s of %s, replaced", bad_rows, self.train_data.name)
            inputs = [self.augment(batch, step, self.layout.positions(index)) for index, batch in enumerate(batches)]
            yield inputs, len(bad_rows)

    def report(self, result: StepResult) -> None:
        """Writes the averages since the last line of metrics."""
        progress = self.trainer.progress
        values: dict[str, float | int] = {
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "skipped_images": progress.skipped_images,
        }
        self.log.write(self.step, progress.close_window() | values)
        self.log.speed(self.step)

    def evaluate(self) -> None:
        """Writes the bits per dimension of the held-out images."""
        if self.eval_images is None:
            return
        with self.trainer.evaluation_model() as model:
            bits = held_out_bits_per_dim(
                model,
                self.eval_images,
                self.accelerator,
                batch_size=self.arguments.output.eval_batch_size,
                num_workers=self.arguments.data.num_workers,
            )
        self.log.write(self.step, {"validation_bits_per_dim": bits})
        self.log.pause(self.step)

    def sample(self, path: Path) -> None:
        """Writes a grid of samples."""
        with self.trainer.evaluation_model() as model:
            sample_grid(model, self.arguments.output, self.accelerator, path)
        track_picture(self.accelerator, "samples", path, self.step)
        self.log.pause(self.step)

    def save_checkpoint(self) -> None:
        """Writes everything that is needed to go on from here."""
        state = self.trainer.state()
        if self.accelerator.is_main_process:
            keep = self.arguments.output.keep_checkpoints
            options = self.arguments.published(self.folder)
            write_checkpoint(self.checkpoints, self.step, state, self.configuration, keep=keep, options=options)
        self.accelerator.wait_for_everyone()
        self.log.pause(self.step)

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

    def resume(self) -> None:
        """Goes on from the newest complete checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.checkpoints)
        if checkpoint is not None:
            self.trainer.load_state(read_checkpoint(checkpoint, self.configuration))
        if self.accelerator.is_main_process:
            posthoc.remove_averages_after(self.folder / posthoc.FOLDER, self.step)

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        classes = list(self.train_data.class_names)
        about = {"condition": self.train_data.condition} if self.train_data.condition else {}
        return self.arguments.fixed() | {"num_images": self.num_images, "class_names": classes} | about

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


__all__ = ["train"]

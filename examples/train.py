"""Trains a TarFlow model.

    accelerate launch examples/train.py                                # the embedded digits -> runs/digits/
    accelerate launch examples/train.py recipe.yaml --batch_size 32    # a recipe, with single values overridden
    python examples/train.py --help                                    # every option

The folder of a run holds the trained pipeline (`TarFlowPipeline.from_pretrained(folder)`), samples.png, metrics.jsonl,
curve.png, recipe.yaml, grids/ and checkpoints/. The same command started again goes on from the last complete
checkpoint.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tarflow_hf.hub.background_push import BackgroundPush
from tarflow_hf.hub.push import push_folder
from tarflow_hf.images.batches import BatchLayout, ImageBatch, StoredImages, make_loader
from tarflow_hf.images.plotting import save_curve
from tarflow_hf.images.sources import ImageData, load_image_data
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.augmentation import Augmenter, MicroBatch
from tarflow_hf.training.checkpoints import StopSignal, latest_checkpoint, read_checkpoint, write_checkpoint
from tarflow_hf.training.log import TrainingLog, start_trackers
from tarflow_hf.training.recipes import parse_arguments
from tarflow_hf.training.run_card import held_out_result, write_run
from tarflow_hf.training.trainer import StepResult, Trainer, make_accelerator
from tarflow_hf.training.validation import held_out_bits_per_dim, make_pipeline, sample_grid

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "digits.yaml"
logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Trains as the command line says."""
    arguments = parse_arguments(argv, default_recipe=DEFAULT_RECIPE)
    folder = Path(arguments.output.output_dir)
    accelerator = make_accelerator(arguments.optimization, trackers=arguments.output.report_to, folder=folder)
    with accelerator.local_main_process_first():
        train_data, eval_data = load_image_data(
            arguments.data,
            class_conditional=arguments.model.class_conditional,
            eval_images=arguments.output.eval_images,
        )
    start_trackers(accelerator, arguments.flat(), run_name=folder.name)
    run = Run(arguments, accelerator, train_data, eval_data)
    try:
        if run.train():
            run.finish()
    finally:
        run.trainer.release()
        accelerator.end_training()


def stored_images(data: ImageData, arguments: TrainingArguments) -> StoredImages:
    """Images of a data set that are read one by one."""
    return StoredImages(data, arguments.image_format, skip_bad_images=arguments.data.skip_bad_images)


class Run:
    """One training run: data, trainer and log, and what happens when.

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
        self.eval_images = None if eval_data is None else stored_images(eval_data, arguments)
        self.total_steps = settings.max_steps or self.steps_in(settings.epochs)
        self.layout = BatchLayout(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        torch.manual_seed(settings.seed)
        model = TarFlowModel(arguments.model.to_config(train_data.class_names))
        warmup_steps = settings.warmup_steps or self.steps_in(settings.warmup_epochs)
        self.trainer = Trainer(accelerator, model, settings, total_steps=self.total_steps, warmup_steps=warmup_steps)
        self.augment = Augmenter(
            model.config, settings, horizontal_flip=arguments.data.horizontal_flip, device=accelerator.device
        )
        self.uploads = BackgroundPush(arguments.output.repo_id, private=arguments.output.hub_private or None)
        self.resume()
        self.loader = make_loader(
            train_data,
            arguments.data,
            arguments.image_format,
            self.layout,
            seed=settings.seed,
            steps=range(self.trainer.progress.step, self.total_steps),
            pin_memory=accelerator.device.type == "cuda",
        )
        self.log = TrainingLog(
            accelerator,
            self.folder / "metrics.jsonl",
            total_steps=self.total_steps,
            batch_size=settings.batch_size,
            start=self.trainer.progress.step,
        )

    def train(self) -> bool:
        """Trains to the end; False if a stop signal ended it early, after a checkpoint."""
        output = self.arguments.output
        self.log.say(self.describe())
        with self.log, StopSignal() as signal:
            if self.trainer.progress.step > 0:
                self.look()
            for micro_batches, bad_images in self.batches():
                result = self.trainer.step(micro_batches, bad_images=bad_images, stop=signal.received)
                step = self.trainer.progress.step
                self.log.advance(step)
                if self.due(output.log_every):
                    self.report(result)
                if self.due(output.checkpoint_every) or result.stop:
                    self.save_checkpoint()
                if result.stop:
                    self.log.say(f"stopped by SIGTERM after step {step}; the same command goes on from here")
                    return False
                self.look()
        return True

    def look(self) -> None:
        """Evaluates and samples if it is time to: after the checkpoint, which a failure here would not cost."""
        output, step = self.arguments.output, self.trainer.progress.step
        if self.due(output.eval_every):
            self.evaluate()
        if self.due(output.sample_every):
            self.sample(self.folder / "grids" / f"step-{step:08d}.png")
        if output.push_checkpoints and self.due(output.checkpoint_every) and step < self.total_steps:
            self.push_checkpoint()

    def describe(self) -> str:
        """One line on what is about to happen."""
        config, processes = self.trainer.model.config, self.accelerator.num_processes
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        images = "a stream of" if self.arguments.data.streaming else len(self.train_data.rows)
        return (
            f"{self.folder}: {parameters / 1e6:.1f} M parameters, {images} images, {config.num_classes} classes, "
            f"{processes} {'process' if processes == 1 else 'processes'} on {self.accelerator.device.type}, "
            f"steps {self.trainer.progress.step} to {self.total_steps}"
        )

    def batches(self) -> Iterator[tuple[list[MicroBatch], int]]:
        """For each step left: the model's input in parts, and how many unreadable images were replaced in it."""
        parts = iter(self.loader)
        for step in range(self.trainer.progress.step, self.total_steps):
            batches: list[ImageBatch] = [next(parts) for _ in range(self.layout.micro_batches)]
            bad_rows = [row for batch in batches for row in batch.bad_rows]
            if bad_rows:
                logger.warning("unreadable images in rows %s of %s, replaced", bad_rows, self.train_data.name)
            inputs = [self.augment(batch, step, self.layout.positions(index)) for index, batch in enumerate(batches)]
            yield inputs, len(bad_rows)

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        step = self.trainer.progress.step
        return step == self.total_steps or (every is not None and step % every == 0)

    def report(self, result: StepResult) -> None:
        """Writes the averages since the last line of metrics."""
        progress = self.trainer.progress
        values: dict[str, float | int] = {
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "skipped_images": progress.skipped_images,
        }
        self.log.write(progress.step, progress.close_window() | values)
        self.log.speed(progress.step)

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
        self.log.write(self.trainer.progress.step, {"validation_bits_per_dim": bits})
        self.log.pause(self.trainer.progress.step)

    def sample(self, path: Path) -> None:
        """Writes a grid of samples."""
        with self.trainer.evaluation_model() as model:
            sample_grid(model, self.arguments.output, self.accelerator, path)
        self.log.pause(self.trainer.progress.step)

    def save_checkpoint(self) -> None:
        """Writes everything that is needed to go on from here."""
        state = self.trainer.state()
        if self.accelerator.is_main_process:
            keep = self.arguments.output.keep_checkpoints
            write_checkpoint(self.checkpoints, self.trainer.progress.step, state, self.configuration, keep=keep)
        self.accelerator.wait_for_everyone()
        self.log.pause(self.trainer.progress.step)

    def push_checkpoint(self) -> None:
        """Begins to upload the pipeline as it is now, unless an upload is under way."""
        step = self.trainer.progress.step
        with self.trainer.evaluation_model() as model:
            if self.accelerator.is_main_process:
                self.uploads.start(lambda folder: self.write_pipeline(model, folder), f"Step {step}")
        self.log.pause(step)

    def write_pipeline(self, model: TarFlowModel, folder: Path) -> None:
        """Writes the pipeline of a model into a folder, with a page that tells of this run."""
        bits, results = self.log.metrics.curve("validation_bits_per_dim")[1], []
        if bits and self.eval_images is not None:
            num_images = len(self.eval_images)
            results = [held_out_result(self.arguments, bits[-1], num_images, source="last line of `metrics.jsonl`")]
        write_run(folder, make_pipeline(model, self.arguments.output), self.arguments, results=tuple(results))

    def resume(self) -> None:
        """Goes on from the newest complete checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.checkpoints)
        if checkpoint is not None:
            self.trainer.load_state(read_checkpoint(checkpoint, self.configuration))

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        rows = None if self.arguments.data.streaming else len(self.train_data.rows)
        return self.arguments.fixed() | {"num_images": rows, "class_names": list(self.train_data.class_names)}

    def steps_in(self, epochs: float | None) -> int:
        """Optimizer steps in so many passes over the training data; 0 where no number is given."""
        if epochs is None:
            return 0
        return round(epochs * (len(self.train_data.rows) // self.arguments.optimization.batch_size))

    def draw_curve(self) -> None:
        """Writes the bits per dimension over the run, of training and held-out images."""
        metrics = self.log.metrics
        names = {"training": "bits_per_dim", "held out": "validation_bits_per_dim"}
        curves = {label: metrics.curve(name) for label, name in names.items()}
        save_curve(
            {label: curve for label, curve in curves.items() if curve[0]},
            self.folder / "curve.png",
            ylabel="bits per dimension",
            title=self.folder.name,
            shown_share=0.95,
        )

    def finish(self) -> None:
        """Writes the pipeline, its samples, the curve and the options of the run."""
        self.sample(self.folder / "samples.png")
        with self.trainer.evaluation_model() as model:
            if not self.accelerator.is_main_process:
                return
            self.draw_curve()
            self.write_pipeline(model, self.folder)
        print(f"{self.folder}: pipeline, samples.png, curve.png and metrics.jsonl after {self.total_steps} steps")
        if self.arguments.output.push_to_hub:
            self.uploads.wait()
            private = self.arguments.output.hub_private or None
            print(push_folder(self.folder, self.arguments.output.repo_id, private=private).commit_url)


if __name__ == "__main__":
    main(sys.argv[1:])

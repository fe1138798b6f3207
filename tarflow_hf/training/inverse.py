"""A training run of a learned inverse: its step on the common trainer, and what it leaves.

Its options are in `inverse_arguments.py`, the step's lessons in `inverse_lessons.py`. Weights, optimizer, average,
precision, processes and what a checkpoint holds are those of [`trainer.Trainer`].
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
import yaml
from accelerate import Accelerator

from tarflow_hf.flow.choices import Decoder
from tarflow_hf.flow.inverse.fingerprint import flow_fingerprint
from tarflow_hf.images.arguments import DataArguments
from tarflow_hf.images.batches import ImageBatch, StoredImages, collate, make_loader
from tarflow_hf.images.labels import label_numbering, renumber
from tarflow_hf.images.latent_data import LatentBatch, StoredLatents, collate_latents, fingerprint
from tarflow_hf.images.order import BatchLayout, check_batch_size
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.images.processing import ImageFormat
from tarflow_hf.images.sources import ImageData
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.augmentation import Augmenter, MicroBatch
from tarflow_hf.training.checkpoints import latest_checkpoint, read_checkpoint, write_checkpoint
from tarflow_hf.training.inverse_arguments import GROUPS, InverseArguments, check_condition, published_options
from tarflow_hf.training.inverse_lessons import Features, Lesson, Teacher
from tarflow_hf.training.inverse_start import set_state_scale, start_inverse
from tarflow_hf.training.latents import encode_together
from tarflow_hf.training.launchers import first_on_each_machine
from tarflow_hf.training.log import TrainingLog
from tarflow_hf.training.progress import StepResult
from tarflow_hf.training.run_card import inverse_page, save_page
from tarflow_hf.training.schedule import Schedule
from tarflow_hf.training.stopping import StopSignal
from tarflow_hf.training.trainer import Trainer

DRAWN_STREAM = 3  # tells the random numbers of drawn latents from those of order and augmentation
_LOOK_SEED = 3_000_003  # of the latents of measurements and pictures
_SCALE_IMAGES = 256  # images whose states give s_k


class InverseTrainer(Trainer):
    """The common trainer on the loss of an inverse; where it counts bits, it counts the images' mean square error.

    Args:
        teacher: The flow, which corrects what the inverse says.
        *arguments: Of [`Trainer`].

    Example:
        See [`InverseRun`], which makes it.

        >>> from tarflow_hf.training.trainer import Trainer
        >>> issubclass(InverseTrainer, Trainer)
        True
    """

    def __init__(self, teacher: Teacher, *arguments: Any) -> None:  # noqa: ANN401
        self.teacher = teacher
        super().__init__(*arguments)

    def _accumulate_gradients(self, micro_batches: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of the mean loss; returns loss and error of the images of this process's share."""
        count = len(micro_batches)
        loss, error = torch.zeros(2, device=self.accelerator.device).unbind()
        for index, lesson in enumerate(cast(Sequence[Lesson], micro_batches)):
            with nullcontext() if index == count - 1 else self.accelerator.no_sync(self.wrapped_model):
                with self._autocast():
                    output = self.wrapped_model(
                        lesson.latents,
                        lesson.labels,
                        lesson.condition,
                        lesson.condition_mask,
                        lesson.guidance_scale,
                        return_dict=True,
                    )
                part, part_error = self.teacher.loss(lesson, output, cast(Any, self.model).state_scale)
                self.accelerator.backward(self.scaler.scale(part / count))
            loss, error = loss + part.detach() / count, error + part_error / count
        return loss, error, None


class InverseRun:
    """One run: flow, inverse, data and log.

    Args:
        data: Where the images come from.
        settings: The options of the optimisation.
        options: Those of the inverse.
        accelerator: The processes and their devices.
        pipe: The pipeline of the flow.
        images: The images to train on; the latents of a flow with an autoencoder are kept in `latents/`.
        features: Of the images that shall agree, see [`Teacher`]; None for none.

    Example:
        See `examples/train_inverse.py`, which makes it.

        >>> InverseRun.train.__doc__.split(".")[0]
        'Trains to the end, or until a stop signal; False if it was stopped'
    """

    def __init__(
        self,
        data: DataArguments,
        settings: OptimizationArguments,
        options: InverseArguments,
        accelerator: Accelerator,
        pipe: TarFlowPipeline,
        images: ImageData,
        features: Features | None = None,
    ) -> None:
        if pipe.transformer.config.value_scale is not None or data.array_layout is not None:
            raise ValueError(f"flow={options.flow!r} and data must be of images: arrays have no learned inverse yet")
        check_condition(images.condition, pipe.transformer.config)
        self.data, self.settings, self.options = data, settings, options
        self.accelerator, self.images = accelerator, images
        self.folder = Path(options.output_dir)
        pipe.to(accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.features = pipe, features
        self.teacher = Teacher(
            pipe,
            sweeps=options.sweeps,
            image_weight=options.image_weight,
            features=features,
            feature_weight=options.perceptual_weight,
        )
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        torch.manual_seed(settings.seed)
        with first_on_each_machine(accelerator):
            source = options.init_from if checkpoint is None else None
            inverse = start_inverse(options.to_config(self.teacher.flow, pipe.config), source)
        self.config = config = pipe.transformer.config
        self.image_format = ImageFormat(pipe.image_shape, pipe.num_channels, config.resize)
        check_batch_size(settings.batch_size, len(images.rows))
        self.schedule = Schedule.plan(settings, len(images.rows))
        self.layout = BatchLayout(
            settings.batch_size,
            settings.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.numbering = label_numbering(images, config)
        self.latents = self._encoded()
        self.noisy = self._augmenter(config)
        still = copy.deepcopy(config)
        still.noise_type, still.noise_std = "gaussian", 0.0
        self.clean = self._augmenter(still)
        set_state_scale(inverse.to(accelerator.device), self._state_scale())
        self.trainer = InverseTrainer(self.teacher, accelerator, cast(Any, inverse), settings, self.schedule)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # by which the folder is known as a run's
        if checkpoint is not None:
            self.trainer.load_state(read_checkpoint(checkpoint, self.configuration))

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.trainer.progress.step

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        values = published_options(self.data, self.settings, self.options)
        fixed = [item.name for group in GROUPS for item in fields(group) if not item.metadata["may_change"]]
        about = {"num_images": len(self.images.rows), "flow_fingerprint": flow_fingerprint(self.teacher.flow.blocks)}
        if self.pipe.vae is not None:
            about["vae_fingerprint"] = fingerprint(self.pipe.vae)
        if self.features is not None:
            about["perceptual_fingerprint"] = self.features.fingerprint()
        ordinary = {"drawn_per_image": 1, "init_from": None}  # checkpoints without them are of such runs
        fixed = [name for name in fixed if name not in ordinary or values[name] != ordinary[name]]
        return {name: values[name] for name in fixed} | about

    def _encoded(self) -> StoredLatents | None:
        """The images as the flow's autoencoder encodes them; None for a flow of pixels."""
        if self.pipe.vae is None:
            return None
        data = self.data
        return encode_together(
            self.pipe.vae,
            StoredImages(self.images, self.image_format, skip_bad_images=data.skip_bad_images),
            self.folder / "latents",
            data.train_split,
            self.accelerator,
            mirrored=data.horizontal_flip,
            multiple=self.config.patch_size,
        )

    def _augmenter(self, config: Any) -> Augmenter:  # noqa: ANN401  # a TarFlowConfig
        device = self.accelerator.device
        return Augmenter(config, self.settings, horizontal_flip=self.data.horizontal_flip, device=device)

    def _state_scale(self) -> torch.Tensor:
        """s_k: the root mean square of the states of the first training images, the same on every process."""
        count = min(_SCALE_IMAGES, len(self.images.rows))
        if self.latents is None:
            stored = StoredImages(self.images, self.image_format, skip_bad_images=self.data.skip_bad_images)
            batch: ImageBatch | LatentBatch = collate([stored[row] for row in range(count)])
        else:
            batch = collate_latents([self.latents[row] for row in range(count)])
        augment = Augmenter(
            self.config,
            OptimizationArguments(batch_size=count, max_steps=1, seed=self.settings.seed),
            horizontal_flip=False,
            device=self.accelerator.device,
        )
        _, states = self.teacher.encode(augment(self._of_the_flow(batch), 0, slice(0, count)))
        return torch.stack([state.float().square().mean().sqrt() for state in states])

    def _of_the_flow(self, batch: ImageBatch | LatentBatch) -> ImageBatch | LatentBatch:
        """A batch with its labels as the flow numbers its classes."""
        if self.numbering is None:
            return batch
        return replace(batch, class_labels=renumber(batch.class_labels, self.numbering))

    def lesson(self, batch: ImageBatch | LatentBatch, step: int, positions: slice) -> Lesson:
        """The lesson of some images of a step: what is random in it follows from seed, step and position alone.

        Args:
            batch: The images, or their latents.
            step: Number of the step.
            positions: Which of the step's images they are.
        """
        settings, config, times = self.settings, self.config, self.options.drawn_per_image
        random = np.random.default_rng([settings.seed, DRAWN_STREAM, step])
        scale = 1 + (self.options.max_guidance_scale - 1) * random.random()
        count, own = times * settings.batch_size, slice(times * positions.start, times * positions.stop)
        size = (count, config.num_tokens, config.patch_dim)
        drawn = torch.from_numpy(random.standard_normal(size, dtype=np.float32)[own])
        labels = None
        if config.num_classes:
            classes = torch.from_numpy(random.integers(config.num_classes, size=count)[own])
            dropped = torch.from_numpy(random.random(count)[own] < settings.label_drop)
            labels = classes.masked_fill(dropped, -1).to(self.accelerator.device)
        spread = 1 + (self.pipe.config.temperature - 1) * random.random((count, 1, 1))  # up to the saved
        drawn = drawn * torch.from_numpy(spread[own]).float()
        batch = self._of_the_flow(batch)
        inputs: MicroBatch = self.noisy(batch, step, positions)
        clean = self.clean(batch, step, positions)[0]
        assert clean is not None
        return self.teacher.lesson(inputs, clean, drawn, labels, guidance_scale=scale)

    def train(self) -> bool:
        """Trains to the end, or until a stop signal; False if it was stopped."""
        loader = make_loader(
            self.images,
            self.data,
            self.image_format,
            self.layout,
            seed=self.settings.seed,
            steps=range(self.step, self.schedule.total_steps),
            pin_memory=self.accelerator.device.type == "cuda",
            encoded=None if self.latents is None else (self.latents, collate_latents),
        )
        log = TrainingLog(
            self.accelerator,
            self.folder / "metrics.jsonl",
            total_steps=self.schedule.total_steps,
            batch_size=self.settings.batch_size,
            start=self.step,
        )
        parts = iter(loader)
        with log, StopSignal() as signal:
            signal.hold()
            self.look_if_due(log)
            while self.step < self.schedule.total_steps:
                batches = [next(parts) for _ in range(self.layout.micro_batches)]
                lessons = [
                    self.lesson(batch, self.step, self.layout.positions(index)) for index, batch in enumerate(batches)
                ]
                replaced = sum(len(batch.bad_rows) for batch in batches)
                result = self.trainer.step(cast(Any, lessons), bad_images=replaced, stop=signal.reason is not None)
                log.advance(self.step)
                if self.schedule.due(self.step, self.options.log_every):
                    self.report(log, result)
                if result.stop or self.schedule.due(self.step, self.options.checkpoint_every):
                    self.save()
                if result.stop:
                    log.say(f"stopped after step {self.step}; the same command goes on from here")
                    return False
                self.look_if_due(log)
            log.write(self.step, self.look(write=True))
        if self.accelerator.is_main_process:
            print(f"{self.folder}: pipeline with its inverse and decoders.png after {self.step} steps")
        return True

    def report(self, log: TrainingLog, result: StepResult) -> None:
        """Writes the averages since the last line of metrics."""
        progress = self.trainer.progress
        found = progress.close_window()
        values = {
            "loss": found["loss"],
            "image_rms": found["bits_per_dim"] ** 0.5,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "skipped_images": progress.skipped_images,
        }
        log.write(self.step, values)
        log.speed(self.step)

    def look_if_due(self, log: TrainingLog) -> None:
        """Measures, if it is time to, after the checkpoint, which a failure here would not cost."""
        if 0 < self.step < self.schedule.total_steps and self.schedule.due(self.step, self.options.eval_every):
            log.write(self.step, self.look(write=False))

    def save(self) -> None:
        """Writes a checkpoint. All processes call it together."""
        state = self.trainer.state()
        if self.accelerator.is_main_process:
            folder, keep = self.folder / "checkpoints", self.options.keep_checkpoints
            write_checkpoint(folder, self.step, state, self.configuration, keep=keep)
        self.accelerator.wait_for_everyone()

    def look(self, *, write: bool) -> dict[str, float]:
        """The median exact error of drawn latents with the averaged weights, and the picture of the decoders.

        Args:
            write: Whether to write the pipeline too.
        """
        found: dict[str, float] = {}
        with self.trainer.evaluation_model() as model:
            if not self.accelerator.is_main_process:
                return found
            model.config.num_training_steps = self.step
            self.pipe.register_modules(inverse=model)
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = min(self.config.num_classes, 10) or 4
            labels = [row for row in range(rows) for _ in range(4)] if self.config.num_classes else None
            own = torch.Generator().manual_seed(_LOOK_SEED)
            latents = self.pipe.prepare_latents(4 * rows, own, temperature=self.pipe.config.temperature)
            for scale in sorted({1.0, self.options.max_guidance_scale}):
                error = self.pipe.reconstruction_error(latents, labels, guidance_scale=scale)
                found[f"validation_error_at_guidance_{scale:g}"] = error.median().item()
            save_decoders(self.pipe, latents, labels, self.folder / "decoders.png")
            if write:
                self.pipe.save_pretrained(self.folder)
                options = published_options(self.data, self.settings, self.options, seen_from=self.folder)
                (self.folder / "recipe.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
                page = inverse_page(
                    self.pipe,
                    self.data,
                    self.settings,
                    self.options,
                    repo_id=f"your-name/{self.folder.resolve().name}",
                    command="accelerate launch examples/train_inverse.py recipe.yaml",
                    samples="decoders.png",
                )
                save_page(page, self.folder / "README.md")
            self.pipe.register_modules(inverse=None)
        return found


def save_decoders(
    pipe: TarFlowPipeline, latents: torch.Tensor, labels: list[int] | None, path: Path, columns: int = 4
) -> None:
    """Writes one picture of the same latents decoded exactly, in one pass and refined: three times the columns.

    Args:
        pipe: The pipeline, with a trained inverse, at its saved guidance scale or the largest that is learned.
        latents: (images, tokens, patch_dim), as many in a row as there are columns.
        labels: The class of each, or None.
        path: PNG file.
        columns: Images of one decoder in a row.

    Example:
        >>> from pathlib import Path
        >>> flow = TarFlowModel(TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2)).eval()
        >>> config = TarFlowInverseConfig(flow=flow.config, hidden_size=64, num_layers=3, num_training_steps=1)
        >>> pipe = TarFlowPipeline(transformer=flow, inverse=TarFlowInverseModel(config).eval())
        >>> from tarflow_hf.training.inverse import save_decoders
        >>> save_decoders(pipe, torch.randn(4, 16, 4), None, Path("decoders.png"), columns=2)
    """
    scale = min(pipe.sampling_defaults["guidance_scale"], pipe.inverse.config.max_guidance_scale)  # type: ignore[union-attr]
    images = [
        list(pipe(labels, latents=latents, guidance_scale=scale, decoder=decoder, return_dict=False)[0])
        for decoder in get_args(Decoder)
    ]
    cells = [
        image
        for start in range(0, len(latents), columns)
        for part in images
        for image in part[start : start + columns]
    ]
    names = [name.replace("_", " ") for name in get_args(Decoder)]
    above = [names[column // columns] if column % columns == 0 else "" for column in range(3 * columns)]
    save_image_grid(cells, path, columns=3 * columns, column_labels=above)


__all__ = ["GROUPS", "InverseRun", "InverseTrainer", "save_decoders"]

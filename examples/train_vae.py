"""Trains a small autoencoder for data that no public one knows, or fine-tunes a public one's decoder to noisy latents.

    accelerate launch examples/train_vae.py examples/recipes/latents/fashion_vae.yaml
    accelerate launch examples/train_vae.py recipe.yaml --init_from user/model --freeze_encoder --output_dir runs/vae
    python examples/train_vae.py --help                                # every option

The folder of a run holds the averaged autoencoder in the format of diffusers, its latents scaled to variance 1
(`latents_mean`, `latents_std`, or `scaling_factor`), clean_ and noisy_reconstructions.png with held-out images beside
what is made of them, metrics.jsonl and checkpoints/. The same command started again goes on from the last checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from tarflow_hf.hub.autoencoders import load_autoencoder
from tarflow_hf.images.arguments import DataArguments, public_place
from tarflow_hf.images.arrays import format_of
from tarflow_hf.images.batches import StoredImages, collate, make_loader
from tarflow_hf.images.latents import Autoencoder, pad_to_grid, posterior_moments
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.images.plotting import save_image_grid
from tarflow_hf.images.processing import to_pixel_values
from tarflow_hf.images.sources import ImageData, load_image_data
from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.autoencoder import (
    AutoencoderArguments,
    reconstruct,
    reconstruction_loss,
    trainable_parameters,
)
from tarflow_hf.training.checkpoints import latest_checkpoint, read_checkpoint, write_checkpoint
from tarflow_hf.training.ema import ExponentialMovingAverage
from tarflow_hf.training.launchers import first_on_each_machine, make_accelerator
from tarflow_hf.training.lock import one_writer
from tarflow_hf.training.log import TrainingLog
from tarflow_hf.training.option_groups import parse_groups, refuse_unused
from tarflow_hf.training.results import check_folder
from tarflow_hf.training.schedule import learning_rate
from tarflow_hf.training.stopping import STOPPED, StopSignal, leave_stopping_to_the_run

AUTOENCODER_STREAM = 2  # tells the random numbers of a step from those of the order of the images
GROUPS = (DataArguments, AutoencoderArguments)
_UNUSED = {
    "vae": "it is what is trained",
    "latents_dir": "an autoencoder is trained on images",
    "streaming": "images are stored",
    "array_layout": "an autoencoder is trained on images",
    "condition_columns": "an autoencoder is told nothing but the image",
    "label_column": "an autoencoder is told nothing but the image",
    "class_names": "an autoencoder is told nothing but the image",
}


def main(argv: Sequence[str]) -> int:
    """Trains as the command line says; the exit status, 0 if finished, 143 if stopped early with a checkpoint."""
    data, options = parse(argv)
    folder = Path(options.output_dir)
    check_folder(folder)
    accelerator = make_accelerator(OptimizationArguments(max_steps=options.max_steps), trackers=(), folder=folder)
    with one_writer(folder, accelerator):
        with first_on_each_machine(accelerator):
            train, held_out = load_image_data(data, class_conditional=False, eval_images=options.eval_images)
        run = AutoencoderRun(data, options, accelerator, train, held_out)
        try:
            finished = run.train()
        finally:
            accelerator.free_memory()
            accelerator.end_training()
    return 0 if finished else STOPPED


class AutoencoderRun:
    """One run: autoencoder, optimizer, average and data.

    Args:
        data: Where the images come from.
        options: The options of the training.
        accelerator: The processes and their devices.
        train: The images to train on.
        held_out: The images to reconstruct, if there are any.
    """

    def __init__(
        self,
        data: DataArguments,
        options: AutoencoderArguments,
        accelerator: Accelerator,
        train: ImageData,
        held_out: ImageData | None,
    ) -> None:
        self.data, self.options, self.accelerator, self.train_data = data, options, accelerator, train
        self.folder = Path(options.output_dir)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # by which the folder is known as a run's
        self.image_format = format_of(options.image_size, options.num_channels, data)
        torch.manual_seed(options.seed)
        vae = options.new_autoencoder() if options.init_from is None else load_autoencoder(options.init_from)
        self.vae: Autoencoder = vae.to(accelerator.device)
        self.parameters = trainable_parameters(self.vae, options)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.ema = ExponentialMovingAverage(self.vae, options.ema_decay)
        self.loss, self.error, self.window_steps = 0.0, 0.0, 0  # sums since the last line of the log
        self.step = self.resume()
        self.layout = BatchLayout(
            options.batch_size, process_index=accelerator.process_index, num_processes=accelerator.num_processes
        )
        self.shown = None if held_out is None else self.read_all(held_out)

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        values = asdict(self.data) | asdict(self.options)
        for name in ("data", "eval_data", "init_from"):
            values[name] = values[name] and public_place(values[name])
        fixed = [item.name for group in GROUPS for item in fields(group) if not item.metadata["may_change"]]
        return {name: values[name] for name in fixed} | {"num_images": len(self.train_data.rows)}

    def read_all(self, data: ImageData) -> torch.Tensor:
        """(images, channels, height, width) pixel values of a few images, in [-1, 1]."""
        images = StoredImages(data, self.image_format, skip_bad_images=self.data.skip_bad_images)
        batch = collate([images[row] for row in range(len(images))])
        return to_pixel_values(batch.levels.to(self.accelerator.device))

    def train(self) -> bool:
        """Trains to the end, or until a stop signal; False if it was stopped."""
        options = self.options
        loader = make_loader(
            self.train_data,
            self.data,
            self.image_format,
            self.layout,
            seed=options.seed,
            steps=range(self.step, options.max_steps),
        )
        loader.worker_init_fn = leave_stopping_to_the_run
        log = TrainingLog(
            self.accelerator,
            self.folder / "metrics.jsonl",
            total_steps=options.max_steps,
            batch_size=options.batch_size,
            start=self.step,
        )
        self.vae.train()
        with log, StopSignal() as signal:
            signal.hold()
            if self.step > 0:
                self.write_autoencoder(log)
            for batch in loader:
                if batch.bad_rows:
                    log.say(f"unreadable images in rows {list(batch.bad_rows)}, replaced")
                self.take_step(to_pixel_values(batch.levels.to(self.accelerator.device)))
                log.advance(self.step)
                asked = torch.tensor(float(signal.reason is not None), device=self.accelerator.device)
                stop = self.accelerator.reduce(asked, "sum").item() > 0
                end = self.step == options.max_steps
                if end or self.step % options.log_every == 0:
                    count = self.window_steps
                    log.write(self.step, {"loss": self.loss / count, "rms": (self.error / count) ** 0.5})
                    self.loss, self.error, self.window_steps = 0.0, 0.0, 0
                if end or stop or self.step % options.eval_every == 0:
                    self.save(log)
                if stop:
                    log.say(f"stopped after step {self.step}; the same command goes on from here")
                    return False
        if self.accelerator.is_main_process:
            print(f"{self.folder}: the autoencoder after {self.step} steps, its reconstructions and metrics.jsonl")
        return True

    def take_step(self, pixel_values: torch.Tensor) -> None:
        """One optimizer step; flips and noise follow from seed, step and process alone."""
        options = self.options
        place = np.random.SeedSequence([options.seed, AUTOENCODER_STREAM, self.step, self.layout.process_index])
        generator = torch.Generator().manual_seed(int(place.generate_state(1)[0]))
        if self.data.horizontal_flip:
            flipped = torch.rand(len(pixel_values), 1, 1, 1, generator=generator) < 0.5
            pixel_values = torch.where(flipped.to(pixel_values.device), pixel_values.flip(3), pixel_values)
        rate = learning_rate(
            self.step,
            highest=options.learning_rate,
            lowest=0.0,
            warmup_steps=options.warmup_steps,
            total_steps=options.max_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, error = reconstruction_loss(self.vae, pixel_values, options, generator)
        if not self.accelerator.reduce(loss.detach(), "mean").isfinite():
            raise RuntimeError(f"the loss of step {self.step + 1} is not finite: lower learning_rate")
        loss.backward()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))
        nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.vae)
        self.loss += self.accelerator.reduce(loss.detach(), "mean").item()
        self.error += self.accelerator.reduce(error, "mean").item()
        self.window_steps += 1
        self.step += 1

    def save(self, log: TrainingLog) -> None:
        """Writes a checkpoint, then the autoencoder."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "window": [self.loss, self.error, self.window_steps],
        }
        write_checkpoint(self.folder / "checkpoints", self.step, state, self.configuration, keep=2)
        self.write_autoencoder(log)

    def write_autoencoder(self, log: TrainingLog) -> None:
        """Writes the averaged autoencoder and what it makes of held-out images. The main process does."""
        if not self.accelerator.is_main_process:
            return
        with self.ema.applied_to(self.vae), torch.no_grad():
            self.vae.eval()
            if not self.options.freeze_encoder:
                self.standardise()
            if self.shown is not None:
                log.write(self.step, self.look())
            self.vae.save_pretrained(self.folder)
            self.vae.train()

    def standardise(self) -> None:
        """Writes the mean and deviation of the latents of the first 2,048 training images into the configuration."""
        rows = self.train_data.rows.select(range(min(2048, len(self.train_data.rows))))
        pixel_values = self.read_all(ImageData(rows, self.train_data.name, self.train_data.image_column, None, ()))
        multiple = self.options.grid_multiple
        padded = (pad_to_grid(part, self.vae, multiple) for part in pixel_values.split(64))
        parts = [posterior_moments(self.vae, part)[0] for part in padded]
        std, mean = torch.std_mean(torch.cat(parts).float(), dim=(0, 2, 3))
        if type(self.vae).__name__ == "AutoencoderKL":
            values = {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0}
        else:  # whose configurations have one number for all channels
            values = {"scaling_factor": float(1 / std.square().mean().sqrt())}
        self.vae.register_to_config(**values)

    def look(self) -> dict[str, float]:
        """The reconstruction error of held-out images without noise and at the strongest; writes a few of them."""
        assert self.shown is not None
        generator, found, multiple = torch.Generator().manual_seed(1), {}, self.options.grid_multiple
        for name, strength in (("clean", 0.0), ("noisy", self.options.latent_noise)):
            parts = []
            for part in self.shown.split(64):
                shape = posterior_moments(self.vae, pad_to_grid(part[:1], self.vae, multiple))[0].shape[1:]
                noise = strength * torch.randn(len(part), *shape, generator=generator).to(part)
                parts.append(reconstruct(self.vae, part, noise, multiple).clamp(-1, 1))
            decoded = torch.cat(parts)
            found[f"validation_{name}_rms"] = (decoded - self.shown).square().mean().sqrt().item()
            pairs = [picture for pair in zip(self.shown[:32], decoded, strict=False) for picture in pair]
            save_image_grid(
                [_picture(picture) for picture in pairs], self.folder / f"{name}_reconstructions.png", columns=16
            )
        return found

    def resume(self) -> int:
        """Goes on from the newest complete checkpoint, if there is one; the steps taken."""
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is None:
            return 0
        state = read_checkpoint(checkpoint, self.configuration)
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.loss, self.error, self.window_steps = state["window"]
        return int(state["step"])


def _picture(pixel_values: torch.Tensor) -> Image.Image:
    levels = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().movedim(0, -1).squeeze(-1)
    return Image.fromarray(levels.numpy())


def parse(argv: Sequence[str]) -> tuple[DataArguments, AutoencoderArguments]:
    """The options of a recipe and the command line, which overrides single values of it."""
    data, options = parse_groups(argv, GROUPS, description="Train an autoencoder.")
    refuse_unused(_UNUSED, data)
    return data, options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

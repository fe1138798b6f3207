"""The first line of a run: what runs where, and what it takes."""

import shutil
from pathlib import Path

from tarflow_hf.flow.class_names import confusing_ids
from tarflow_hf.images.order import BatchLayout
from tarflow_hf.training.footprint import Footprint, existing_parent, readable_bytes
from tarflow_hf.training.launchers import strategy
from tarflow_hf.training.sharding import is_sharded
from tarflow_hf.training.trainer import Trainer


def overview(folder: Path, trainer: Trainer, layout: BatchLayout, *, images: str, total_steps: int) -> str:
    """Processes, devices, strategy, precision, parameters, tokens of a step, memory, checkpoints, disk: one line.

    Args:
        folder: The folder of the run.
        trainer: Its model and processes.
        layout: How a batch is divided.
        images: What it is trained on, in words.
        total_steps: Planned length of the training.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> from tarflow_hf.images.order import BatchLayout
        >>> from tarflow_hf.training.schedule import Schedule
        >>> from tarflow_hf.training.trainer import Trainer
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> settings = OptimizationArguments(batch_size=4, max_steps=10)
        >>> trainer = Trainer(Accelerator(cpu=True), TarFlowModel(config), settings, Schedule(10, 0))
        >>> overview(Path("runs"), trainer, BatchLayout(4), images="50 images", total_steps=10)  # doctest: +ELLIPSIS
        'runs: 0.1 M parameters, 50 images, 0 classes, 1 process on cpu (alone), float32, steps 0 to 10, 64 tokens ...'
    """
    config, settings, accelerator = trainer.model.config, trainer.settings, trainer.accelerator
    processes = accelerator.num_processes
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    footprint = Footprint.estimate(
        config,
        settings,
        num_parameters=num_parameters,
        micro_batch_size=layout.micro_batch_size,
        shards=processes if is_sharded(trainer.model) else 1,
    )
    ids = confusing_ids(config.id2label or {})
    classes = f"{config.num_classes} classes" + (f" ({ids})" if ids else "")
    free = shutil.disk_usage(existing_parent(folder)).free
    return (
        f"{folder}: {num_parameters / 1e6:.1f} M parameters, {images}, {classes}, "
        f"{processes} {'process' if processes == 1 else 'processes'} on {accelerator.device.type} "
        f"({strategy(accelerator)}), {settings.precision}, steps {trainer.progress.step} to {total_steps}, "
        f"{settings.batch_size * config.num_tokens} tokens a step, about {readable_bytes(footprint.memory)} of memory "
        f"a process, checkpoints of about {readable_bytes(footprint.checkpoint)}, {readable_bytes(free)} of disk left"
    )


__all__ = ["overview"]

"""A training run from its options to its exit status, in every process that a launcher started."""

from pathlib import Path

from accelerate.utils import DistributedType

from tarflow_hf.hub.bars import no_bars_off_a_terminal
from tarflow_hf.images.sources import load_image_data
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.launchers import first_on_each_machine, in_main_process, make_accelerator
from tarflow_hf.training.lock import one_writer
from tarflow_hf.training.results import PushError, check_folder, prepare_push
from tarflow_hf.training.run import Run
from tarflow_hf.training.stopping import STOPPED, StopSignal
from tarflow_hf.training.trackers import start_trackers


def train(arguments: TrainingArguments) -> int:
    """Trains to the end, or until it is asked to stop, in every process that a launcher started.

    Args:
        arguments: All options.

    Returns:
        The exit status of the process: 0 if the run is finished, 143 if it stopped early with a checkpoint.

    Raises:
        RunLockedError: If another run writes into the folder.
        CheckpointError: If there are checkpoints that cannot be gone on from, or one cannot be written.
        PushError: If there is a repository to push to and it cannot be written to.
        NonFiniteTrainingError: If the run diverged and going back did not help.
        SystemExit: In the other processes, where the main one is refused the folder or the repository.
        ValueError: If options, launcher or files in the folder are not what they must be.

    Example:
        >>> from tarflow_hf.training.recipes import parse_arguments
        >>> options = ["--max_steps", "2", "--hidden_size", "64", "--num_blocks", "2", "--layers_per_block", "1"]
        >>> options += ["--eval_images", "8", "--sample_rows", "1", "--sample_columns", "2", "--cache_images", "false"]
        >>> arguments = parse_arguments(options, default_recipe="examples/recipes/digits.yaml")
        >>> train(arguments)  # doctest: +ELLIPSIS
        runs/digits: ...
        runs/digits: pipeline, samples.png, curve.png and metrics.jsonl after 2 steps
        0
    """
    folder = Path(arguments.output.output_dir)
    no_bars_off_a_terminal()
    check_folder(folder)
    with StopSignal(arguments.output.max_hours) as stop:
        accelerator = make_accelerator(arguments.optimization, trackers=arguments.output.report_to, folder=folder)
        if arguments.start.lora is not None and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("lora cannot be trained under FSDP: use data parallelism, as in accelerate/ddp.yaml")
        with one_writer(folder, accelerator):
            if arguments.output.push_to_hub:
                in_main_process(accelerator, lambda: prepare_push(arguments.output), PushError)
            with first_on_each_machine(accelerator):
                train_data, eval_data = load_image_data(
                    arguments.data,
                    class_conditional=arguments.model.class_conditional,
                    eval_images=arguments.output.eval_images,
                )
            start_trackers(accelerator, arguments.published(), folder=folder)
            run = Run(arguments, accelerator, train_data, eval_data, stop)
            try:
                finished = run.train()
            finally:
                run.checkpoints.close()
                run.trainer.release()
                accelerator.end_training()
    return 0 if finished else STOPPED


__all__ = ["train"]

"""The processes and devices of a run, as a launcher made them: what it promised is kept or refused by name."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from tarflow_hf.training.arguments import OptimizationArguments
from tarflow_hf.training.waiting import patient_group

_HEAR_OUT_SECONDS = 2.0  # at the first failure a launcher ends the other processes, also the one that is saying why
_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "fp8"}
_FSDP_2 = "use version 2 (fsdp_version: 2, as in examples/accelerate/fsdp.yaml), or data parallelism"


def make_accelerator(settings: OptimizationArguments, *, trackers: Sequence[str], folder: Path) -> Accelerator:
    """The processes and devices of this run, as `accelerate launch`, torchrun or a plain start made them.

    Args:
        settings: The options of the optimisation.
        trackers: Names of the experiment trackers.
        folder: Where trackers may write.

    Raises:
        ValueError: If a tracker is not installed, or the launcher asks for what training does not do.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> settings = OptimizationArguments(batch_size=4, max_steps=10, learning_rate=1e-2)
        >>> accelerator = make_accelerator(settings, trackers=[], folder=Path("runs"))
        >>> accelerator.num_processes, accelerator.is_main_process
        (1, True)
    """
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise ValueError(f"report_to names trackers that are not installed: pip install {' '.join(missing)}")
    check_launcher(settings, os.environ)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said aloud, or several processes would not find each other
        mixed_precision="no",  # the training step casts by itself, so that evaluation and sampling stay in float32
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=settings.process_group_timeout)),
        ],
    )
    check_strategy(accelerator)
    return accelerator


@contextmanager
def first_on_each_machine(accelerator: Accelerator) -> Iterator[None]:
    """Lets one process on each machine prepare the data while the others wait, however long that takes.

    Args:
        accelerator: The processes.

    Example:
        >>> from accelerate import Accelerator
        >>> with first_on_each_machine(Accelerator(cpu=True)):
        ...     print("preparing")
        preparing
    """
    if accelerator.num_processes == 1:
        yield
        return
    group = patient_group()
    if not accelerator.is_local_main_process:
        dist.barrier(group)
    try:
        yield
    finally:  # where it fails, the others are to meet the same error, not to wait
        if accelerator.is_local_main_process:
            dist.barrier(group)


def in_main_process(accelerator: Accelerator, work: Callable[[], object], *refusals: type[Exception]) -> None:
    """Lets the main process do something that may be refused: then all processes end, and one of them says why.

    Args:
        accelerator: The processes.
        work: What the main process does.
        *refusals: Errors that it may raise.

    Raises:
        Exception: What `work` raised, in the main process.
        SystemExit: In the other processes, if it raised.

    Example:
        >>> from accelerate import Accelerator
        >>> in_main_process(Accelerator(cpu=True), lambda: print("writable"), OSError)
        writable
    """
    refusal: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except refusals as error:
            refusal = error
    (refused,) = broadcast_object_list([refusal is not None])
    if refusal is not None:
        raise refusal
    if refused:
        time.sleep(_HEAR_OUT_SECONDS)
        raise SystemExit(1)


def check_launcher(settings: OptimizationArguments, environment: Mapping[str, str]) -> None:
    """Raises ValueError if a launcher's environment asks for what training does not do, or not so.

    Args:
        settings: The options of the optimisation.
        environment: Environment variables, as `accelerate launch` sets them.

    Example:
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> check_launcher(OptimizationArguments(max_steps=1), {"ACCELERATE_MIXED_PRECISION": "bf16"})
        Traceback (most recent call last):
            ...
        ValueError: the launcher asks for mixed_precision=bf16 and the recipe for precision: float32; give --p...
    """

    def asked(name: str) -> bool:
        return environment.get(name, "").lower() in ("true", "1", "yes")

    if asked("ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"FSDP version {environment.get('FSDP_VERSION', '1')} is not supported: {_FSDP_2}")
    for name, title in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if asked(f"ACCELERATE_USE_{name}"):
            raise ValueError(f"{title} is not supported: to shard weights and optimizer use FSDP version 2")
    sizes = {kind: environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("TP", "CP", "SP", "DP_SHARD")}
    split = [f"{kind.lower()}_size={size}" for kind, size in sizes.items() if size not in ("", "1", "None")]
    if asked("ACCELERATE_USE_PARALLELISM_CONFIG") and split:
        raise ValueError(
            f"tensor, context or sequence parallelism ({', '.join(split)}) is not supported: use FSDP version 2"
        )
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = _PRECISIONS.get(launched, launched)
    if launched != "no" and wanted != settings.precision:
        advice = f"give --precision {wanted}, or" if wanted in _PRECISIONS.values() and wanted != "fp8" else ""
        raise ValueError(
            f"the launcher asks for mixed_precision={launched} and the recipe for precision: {settings.precision}; "
            f"{advice} launch with --mixed_precision no: the recipe decides"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(f"the launcher asks for dynamo_backend={backend}: give --compile true in its place")
    parts = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts != "1":
        raise ValueError(
            f"the launcher asks for gradient_accumulation_steps={parts}: give --gradient_accumulation_steps {parts} "
            "to the trainer in its place"
        )


def check_strategy(accelerator: Accelerator) -> None:
    """Raises ValueError if the processes work together in a way that training does not do.

    Args:
        accelerator: The processes that the launcher has started, however they are to share the work.

    Example:
        >>> from accelerate import Accelerator
        >>> check_strategy(Accelerator(cpu=True))
    """
    kind = accelerator.distributed_type
    version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 2) if kind == DistributedType.FSDP else 2
    if version != 2:
        raise ValueError(f"FSDP version {version} is not supported: {_FSDP_2}")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ValueError(f"{kind.value} is not supported: to shard weights and optimizer use FSDP version 2")


def strategy(accelerator: Accelerator) -> str:
    """How the processes share the work, in words.

    Args:
        accelerator: The processes.

    Example:
        >>> from accelerate import Accelerator
        >>> strategy(Accelerator(cpu=True))
        'alone'
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return "weights sharded by FSDP 2"
    return "alone" if accelerator.num_processes == 1 else "data parallel"


def missing_processes(accelerator: Accelerator) -> str | None:
    """A warning where the launcher was asked for more processes than it started, or None.

    `accelerate launch --cpu --num_processes 2` starts one, without a word.

    Args:
        accelerator: The processes.

    Example:
        >>> from accelerate import Accelerator
        >>> missing_processes(Accelerator(cpu=True)) is None
        True
    """
    try:
        command = " ".join(psutil.Process().parent().cmdline())
    except (psutil.Error, AttributeError):
        return None
    asked = re.search(r"accelerate.* --num[_-]processes[= ](\d+)", command)
    if asked is None or int(asked[1]) <= accelerator.num_processes:
        return None
    return (
        f"accelerate launch was asked for {asked[1]} processes and started {accelerator.num_processes}; on CPUs "
        f"`torchrun --nproc_per_node {asked[1]}` starts them"
    )


__all__ = [
    "check_launcher",
    "check_strategy",
    "first_on_each_machine",
    "in_main_process",
    "make_accelerator",
    "missing_processes",
    "strategy",
]

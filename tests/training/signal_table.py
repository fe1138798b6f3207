"""What a run does when it is asked to stop: every signal, way of starting, moment and addressee, with real processes.

    PYTHONPATH=.:tests python tests/training/signal_table.py                      # the whole table, about half an hour
    PYTHONPATH=.:tests python tests/training/signal_table.py --ways python        # some of it

Each cell starts a run, waits for the moment, sends the signal and prints the exit status of what was started, the step
of the newest checkpoint, whether the evaluation or grid was broken off, and the processes that were still there 60
seconds after the launcher's end.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil
from training_runs import command, environments

from tarflow_hf.training.checkpoints import complete_checkpoints, step_of

ROOT = Path(__file__).parents[2]
ADDRESSEES = ("launcher", "worker")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LONG = {"max_steps": 100_000, "checkpoint_every": 1_000_000, "eval_every": "null", "sample_every": "null"}
SLOW_LOOK = {"eval_batch_size": 1, "sample_rows": 10, "sample_columns": 40, "eval_images": 297}
SLOW_LOOK |= {"num_blocks": 6, "layers_per_block": 4}
_ACCELERATE = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
_ACCELERATE += ["--num_machines", "1"]
WAYS = {
    "python": (1, lambda port: []),
    "accelerate 1": (1, lambda port: [*_ACCELERATE, "--num_processes", "1"]),
    "accelerate 2": (
        2,
        lambda port: [*_ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    ),
    "torchrun 2": (2, lambda port: ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]),
}


def rows(folder: Path) -> int:
    """Lines of metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _saving(folder: Path) -> bool:
    return any(folder.glob("*/.unfinished-*"))


MOMENTS: dict[str, tuple[dict[str, object], Callable[[Path], bool]]] = {
    "step": (LONG, lambda folder: rows(folder) >= 4),
    "evaluation": (LONG | SLOW_LOOK | {"eval_every": 4}, lambda folder: rows(folder) >= 4),
    "grid": (LONG | SLOW_LOOK | {"sample_every": 4}, lambda folder: rows(folder) >= 4),
    "saving": (LONG | {"checkpoint_every": 1, "hidden_size": 64}, _saving),
}


@dataclass(frozen=True)
class Stopped:
    """How a run ended.

    Args:
        status: Exit status of what was started: of the launcher, where there is one.
        step: Step of the newest complete checkpoint; None without one.
        lines: Lines of metrics.jsonl.
        orphans: Processes that were left.
        seconds: From the signal to the end of the last process.
        log: Everything that was printed.
    """

    status: int
    step: int | None
    lines: int
    orphans: int
    seconds: float
    log: str


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Waits for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def launch(way: str, folder: Path, **options: object) -> subprocess.Popen[bytes]:
    """Starts a run; its output goes to `log` beside the folder."""
    processes, start = WAYS[way]
    port = environments(2)[0]["MASTER_PORT"] if processes == 2 else ""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *start(port), str(ROOT / "examples/train.py"), *command(folder, **options)]
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(arguments, env=environment, stdout=log, stderr=log, cwd=folder.parent)


def trainers(started: subprocess.Popen[bytes], way: str) -> list[psutil.Process]:
    """The processes that train: those of the launcher, or the only one."""
    process = psutil.Process(started.pid)
    return [process] if way == "python" else process.children()


def stop(way: str, moment: str, number: signal.Signals, *, addressee: str, folder: Path) -> Stopped:
    """Starts a run, sends the signal at the moment, and waits for the end of all its processes.

    Args:
        way: One of `WAYS`.
        moment: One of `MOMENTS`.
        number: The signal.
        addressee: `launcher`, or `worker` for the last of the processes that train.
        folder: Of the run.
    """
    options, reached = MOMENTS[moment]
    log = folder.with_suffix(".log")
    started = launch(way, folder, **options)
    try:
        wait_until(lambda: reached(folder) or started.poll() is not None)
        assert started.poll() is None, log.read_text()[-3000:]
        family = psutil.Process(started.pid).children(recursive=True)
        target = started.pid if addressee == "launcher" else trainers(started, way)[-1].pid
        begin = time.monotonic()
        os.kill(target, number)
        status = started.wait(300)
        _, orphans = psutil.wait_procs(family, timeout=60)
        seconds = time.monotonic() - begin
    finally:
        started.kill()
    for process in orphans:
        process.kill()
    checkpoints = complete_checkpoints(folder / "checkpoints")
    step = step_of(checkpoints[-1]) if checkpoints else None
    return Stopped(status, step, rows(folder), len(orphans), seconds, log.read_text())


def main() -> None:
    """Prints the table as Markdown, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [number.name for number in SIGNALS]
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--signals", nargs="+", choices=names, default=names)
    parser.add_argument("--addressees", nargs="+", choices=ADDRESSEES, default=ADDRESSEES)
    wanted = parser.parse_args()
    print("| started by | signal | to | moment | exit status | checkpoint | lines | orphans | seconds |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for way, name, addressee, moment in product(wanted.ways, wanted.signals, wanted.addressees, MOMENTS):
        if (way, addressee) == ("python", "worker"):
            continue  # the only process is what was started
        with tempfile.TemporaryDirectory() as place:
            found = stop(way, moment, signal.Signals[name], addressee=addressee, folder=Path(place) / "run")
        cells = [way, name, addressee, moment, found.status, found.step, found.lines, found.orphans]
        print("| " + " | ".join(map(str, [*cells, f"{found.seconds:.1f}"])) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Whole runs of examples/train.py and train_inverse.py in processes of their own, which tests may kill.

The processes are forked from a server that has imported everything once, so that a start takes a fraction of a second.
"""

import gc
import importlib
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file

TINY = {
    "cache_images": False,
    "hidden_size": 16,
    "head_dim": 8,
    "mlp_ratio": 2,
    "num_blocks": 2,
    "layers_per_block": 1,
    "batch_size": 8,
    "max_steps": 18,
    "warmup_steps": 4,
    "learning_rate": 3e-3,
    "ema_decay": 0.9,
    "log_every": 1,
    "eval_every": 8,
    "eval_images": 20,
    "sample_every": 8,
    "sample_rows": 3,
    "sample_columns": 2,
    "checkpoint_every": 4,
}

TINY_INVERSE = {
    "hidden_size": 16,
    "head_dim": 8,
    "mlp_ratio": 2,
    "num_layers": 4,
    "batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 3e-3,
    "ema_decay": 0.9,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint_every": 4,
}
TINY_RUNS = {"train": TINY, "train_inverse": TINY_INVERSE}

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # not 5 s of rest whenever the reading of a stream ends
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["training_runs", "examples.train", "tarflow_hf.training.command", "tarflow_hf.training.inverse"]
)


def command(folder, example="train", **options):
    """The command line of a tiny run on the digits."""
    values = TINY_RUNS[example] | {"output_dir": folder} | options
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def start_processes(function, arguments, environments):
    """Starts a process for each environment, which calls the function with the arguments."""
    processes = [
        _context.Process(target=_call, args=(function, arguments, environment)) for environment in environments
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes):
    """Waits for the end of processes."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _call(function, arguments, environment):
    gc.freeze()  # what was forked is never garbage, and looking through it would copy it
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, which then end with their process
    function(*arguments)


def train(argv, output, file_limit, example):
    """In a process: a run of an example with its output in a file, of which it may write so many bytes."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(importlib.import_module(f"examples.{example}").main(argv))


class Run:
    """The processes of one start of a run, each of which calls `train`."""

    def __init__(self, folder, *, processes=1, file_limit=None, example="train", train=train, **options):
        self.folder = Path(folder)
        self.log = self.folder.with_suffix(".log")
        arguments = (command(folder, example, **options), str(self.log), file_limit, example)
        self.processes = start_processes(train, arguments, environments(processes))

    def signal(self, number, rank=None):
        """Sends a signal to all processes, or to that of one rank."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def join(self):
        """Waits for the end; the exit codes."""
        return exit_codes(self.processes)

    def finish(self):
        """Waits for the end and shows the output of a run that failed."""
        codes = self.join()
        assert codes == [0] * len(codes), (codes, self.log.read_text()[-3000:])
        return self

    def wait_for(self, rows):
        """Waits until metrics.jsonl has so many lines, or the processes have ended; whether they still run."""
        metrics = self.folder / "metrics.jsonl"
        while all(process.is_alive() for process in self.processes):
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
                return True
            time.sleep(0.002)
        return False


def environments(processes):
    """What a launcher tells its processes."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def kill_and_restart(folder, kills, *, seed, example="train", **options):
    """Runs to the end, killed with SIGKILL at random moments on the way."""
    chance = random.Random(seed)
    options["example"] = example
    for row in sorted(chance.sample(range(1, TINY_RUNS[example]["max_steps"] - 2), kills)):
        run = Run(folder, **options)
        assert run.wait_for(row), run.log.read_text()[-3000:]
        time.sleep(chance.random() * 0.03)
        run.signal(signal.SIGKILL)
        codes = run.join()
        assert codes == [-signal.SIGKILL] * len(codes)
    return Run(folder, **options).finish()


def outcome(folder):
    """Everything a run leaves that must not depend on interruptions, by the name of the file."""
    folder = Path(folder)
    names = ["metrics.jsonl", "samples.png", *sorted(str(p.relative_to(folder)) for p in folder.glob("grids/*"))]
    return {name: (folder / name).read_bytes() for name in names}


def weights(folder):
    """The saved model, and everything in the last checkpoint, as flat tensors by name."""
    state = torch.load(max(Path(folder).glob("checkpoints/step-*")) / "state.pt", weights_only=True)
    flat = {
        f"saved.{name}": tensor for name, tensor in load_file(Path(folder) / "transformer/model.safetensors").items()
    }

    def flatten(prefix, value):
        if isinstance(value, dict):
            for name, item in value.items():
                flatten(f"{prefix}.{name}", item)
        elif isinstance(value, list):
            flatten(prefix, dict(enumerate(value)))
        else:
            flat[prefix] = value if isinstance(value, torch.Tensor) else torch.tensor(float(value or 0))

    flatten("state", state)
    return flat

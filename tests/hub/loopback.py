"""Starts the loopback Hub and runs clients of it, each in a process of its own (the endpoint is read once)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


class LoopbackHub:
    """The server's process; use as a context."""

    def __init__(self, home: Path):
        self.home = home

    def __enter__(self) -> "LoopbackHub":
        command = [sys.executable, "-m", "tests.hub.server"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=10)

    def log(self) -> list[str]:
        """Every request answered so far, as "METHOD path"."""
        with urlopen(f"{self.url}/log") as answer:
            return json.load(answer)

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment of a client: this Hub, alice's token, a home of its own, the package importable."""
        inherited = {name: value for name, value in os.environ.items() if name not in OFFLINE_VARIABLES}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_alice",
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **variables,
        }

    def run(self, script: str, *arguments: str, **variables: str) -> Any:
        """What the script of this folder prints as JSON on its last line; an error of the script is an error here."""
        command = [sys.executable, str(Path(__file__).parent / script), *arguments]
        done = subprocess.run(
            command, cwd=self.home, env=self.environment(**variables), capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

"""Starts the loopback Hub and runs clients of it, each in a process of its own (the endpoint is read once)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

TESTS = Path(__file__).parents[1]
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
# Warnings are errors, but for what huggingface_hub 2.4 does against its own HTTP library when it uploads a file.
WARNINGS = ("-W", "error", "-W", "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class LoopbackHub:
    """The server's process; use as a context."""

    def __init__(self, home: Path):
        self.home = home

    def __enter__(self) -> "LoopbackHub":
        command = [sys.executable, "-m", "hub.server"]
        self.process = subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
            **variables,
        }

    def run(self, client: str, *arguments: str, **variables: str) -> Any:
        """What a client (a module of this folder) prints as JSON on its last line; its failure is an error here."""
        command = [sys.executable, *WARNINGS, "-m", f"hub.{client}", *arguments]
        done = subprocess.run(
            command, cwd=self.home, env=self.environment(**variables), capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"{client} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

"""When a run is to stop before its end: on a signal, when its launcher is gone, when its time is up.

A polite stop is noted and obeyed at the next moment that loses nothing. The exit status of a run that stopped so is
[`STOPPED`], whatever the reason: a scheduler that starts such a job again goes on from its checkpoint.
"""

import os
import signal
import threading
import time
from multiprocessing import active_children
from multiprocessing.util import Finalize
from types import FrameType

import torch
from accelerate import Accelerator

STOPPED = 143
"""Exit status of a run that was stopped and can be gone on with; of a finished one it is 0."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and by torchrun
_LAUNCHER_CHECK_SECONDS = 0.5


class Interrupted(Exception):
    """An evaluation or a grid of samples was broken off, as the run is to stop."""


class StopSignal:
    """Notes why this process is asked to stop, so that the run can save and end by itself.

    SIGTERM, SIGINT and SIGUSR1 are noted, also when they are repeated; the end of the launcher is (a process that
    `accelerate launch` or torchrun started would otherwise train on, unseen, beside the next start); and so is the end
    of the time the run was given. Before [`hold`] there is nothing to lose: a signal ends the process at once.

    Args:
        max_hours: How long the run may take from now; None: as long as it needs.

    Example:
        >>> import os, signal
        >>> with StopSignal() as stop:
        ...     stop.hold()
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print(stop.reason)
        SIGTERM
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.end = None if max_hours is None else time.monotonic() + max_hours * 3600
        self.slowest: dict[str, float] = {}
        self._noted: str | None = None
        self._holds = False
        self._closed = threading.Event()

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if any(name in os.environ for name in _LAUNCHERS):
            self._watch_launcher()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on a request to stop is only noted: the run looks at `reason`."""
        self._holds = True

    def took(self, what: str, seconds: float) -> None:
        """Tells how long a step or a checkpoint took, so that the last ones fit into the time that is left."""
        self.slowest[what] = max(seconds, self.slowest.get(what, 0.0))

    @property
    def reason(self) -> str | None:
        """Why the run is to stop, or None."""
        if self._noted is None and self.end is not None:
            if time.monotonic() + sum(self.slowest.values()) >= self.end:
                self._noted = "max_hours"
        return self._noted

    @property
    def received(self) -> bool:
        """Whether the run is to stop."""
        return self.reason is not None

    def check(self) -> None:
        """Raises Interrupted if the run is to stop; for work that is done again after the resume."""
        if self.received:
            raise Interrupted(self.reason)

    def request(self, reason: str) -> None:
        """Asks the run to stop, from any thread."""
        self._noted = self._noted or reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        if not self._holds:
            raise SystemExit(STOPPED)

    def _watch_launcher(self) -> None:
        launcher = os.getppid()

        def watch() -> None:
            while not self._closed.wait(_LAUNCHER_CHECK_SECONDS):
                if os.getppid() != launcher:
                    self.request("the end of its launcher")
                    if not self._holds:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return

        threading.Thread(target=watch, name="launcher watch", daemon=True).start()


class StopTogether:
    """One decision of all processes whether to stop.

    Args:
        signal: Whether this process was asked to.
        accelerator: The processes.

    Example:
        >>> from accelerate import Accelerator
        >>> with StopSignal() as signal:
        ...     StopTogether(signal, Accelerator(cpu=True)).check_together()  # nobody was
    """

    def __init__(self, signal: StopSignal, accelerator: Accelerator) -> None:
        self.signal = signal
        self.accelerator = accelerator

    def check(self) -> None:
        """Raises Interrupted if this process is to stop."""
        self.signal.check()

    def check_together(self) -> None:
        """Raises Interrupted in every process if any is to stop. All processes call it together.

        What a process is asked while they talk, it says the next time: alone it would leave the others waiting.
        """
        received = self.signal.received
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(float(received), device=self.accelerator.device)
            received = self.accelerator.reduce(asked, "sum").item() > 0
            if received:
                self.signal.request("a signal to another process")
        if received:
            raise Interrupted(self.signal.reason)


def leave_stopping_to_the_run(worker: int) -> None:
    """Makes a process that reads images ignore what asks to stop: one that ended first would take the run with it.

    Args:
        worker: Its number.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([1, 2], num_workers=1, worker_init_fn=leave_stopping_to_the_run)
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_readers_at_exit() -> None:
    """Has the exit of this process kill the ones that read images, where an error has left some.

    multiprocessing asks them by SIGTERM, which they ignore, and would wait for them for ever.

    Example:
        >>> end_readers_at_exit()
    """
    Finalize(None, _kill_daemons, exitpriority=0)


def _kill_daemons() -> None:
    for child in active_children():
        if child.daemon:
            child.kill()


__all__ = [
    "STOPPED",
    "Interrupted",
    "StopSignal",
    "StopTogether",
    "end_readers_at_exit",
    "leave_stopping_to_the_run",
]

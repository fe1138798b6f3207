"""One writer for the folder of a run: a file that names who writes there, and tells that it is alive."""

import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from accelerate import Accelerator

from tarflow_hf.training.launchers import in_main_process

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 10.0
"""How often a run tells that it is alive, by the lock's time of change."""
STALE_SECONDS = 120.0
"""After so long without a sign of life a run on another machine is taken for dead."""


class RunLockedError(RuntimeError):
    """Another run writes into the folder."""


class RunLock:
    """Holds the lock of a folder as a context.

    A lock that a dead process of this machine left is taken over at once. Of another machine only the heartbeat can
    tell: its lock is taken over once it is [`STALE_SECONDS`] old, by the clock of the file system.

    Args:
        folder: The folder of the run, made if it is missing.
        lost: Called with a reason, from a thread, if the lock is gone or another run's: this run must stop writing.

    Raises:
        RunLockedError: If a living run holds the lock; the message names it.

    Example:
        >>> with RunLock("run"):
        ...     RunLock("run").acquire()
        Traceback (most recent call last):
            ...
        tarflow_hf.training.lock.RunLockedError: run is written by another run: process ... on ..., since ...
    """

    def __init__(self, folder: str | Path, *, lost: Callable[[str], object] = print) -> None:
        self.path = Path(folder) / LOCK_FILE
        self.lost = lost
        self.owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": _machine(),
            "process_started": psutil.Process().create_time(),
            "token": uuid.uuid4().hex,
        }
        self._released = threading.Event()

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock."""
        self.made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._try():
            pass
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Gives the lock back; a folder that was made for it alone goes too."""
        self._released.set()
        if self._owner().get("token") == self.owner["token"]:
            self.path.unlink(missing_ok=True)
        if self.made_folder:
            with suppress(OSError):  # it holds a run by now
                self.path.parent.rmdir()

    def _try(self) -> bool:
        """One attempt; False if the file was exchanged meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no such locks: then a hair's breadth is open
                    fcntl.lockf(descriptor, fcntl.LOCK_EX)
            if not self.path.exists() or os.stat(self.path).st_ino != os.fstat(descriptor).st_ino:
                return False
            owner = _parse(os.read(descriptor, 1 << 16))
            if owner and self._alive(owner):
                raise RunLockedError(
                    f"{self.path.parent} is written by another run: process {owner.get('process')} on "
                    f"{owner.get('host')}, since {owner.get('started')}. Wait for its end or stop it; if it is surely "
                    f"dead, remove {self.path}"
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(self.owner).encode(), 0)
            os.fsync(descriptor)
            return True
        finally:
            os.close(descriptor)

    def _alive(self, owner: dict[str, Any]) -> bool:
        if owner.get("machine") == self.owner["machine"]:
            try:
                started = psutil.Process(owner["process"]).create_time()
            except (psutil.Error, KeyError, TypeError, ValueError):
                return False
            return abs(started - owner.get("process_started", 0.0)) < 1
        return self._now() - self.path.stat().st_mtime < STALE_SECONDS

    def _now(self) -> float:
        """The time by the clock of the file system."""
        probe = self.path.with_name(f".{LOCK_FILE}-{self.owner['token']}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _owner(self) -> dict[str, Any]:
        try:
            return _parse(self.path.read_bytes())
        except OSError:
            return {}

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            found = self._owner()
            if found.get("token") == self.owner["token"]:
                with suppress(OSError):  # a network file system may be away for a while
                    os.utime(self.path)
            elif found and not self._released.is_set():
                self.lost(f"process {found.get('process')} on {found.get('host')}, which took over the lock")
                return


@contextmanager
def one_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Holds the lock of a folder in the main process; if it is another run's, every process ends.

    If another run takes it over meanwhile, which took this one for dead, the main process ends at once: what it wrote
    from then on, a last checkpoint too, would be written into the other's run.

    Args:
        folder: The folder of the run.
        accelerator: The processes.

    Raises:
        RunLockedError: In the main process, if another run holds the lock; SystemExit in the others.

    Example:
        >>> from pathlib import Path
        >>> from accelerate import Accelerator
        >>> with one_writer(Path("run"), Accelerator(cpu=True)):
        ...     print(Path("run/run.lock").exists())
        True
    """
    with ExitStack() as held:
        in_main_process(accelerator, lambda: held.enter_context(RunLock(folder, lost=_leave)), RunLockedError)
        yield


def _leave(owner: str) -> None:
    print(f"the folder of this run is written by {owner}: it ends here", file=sys.stderr, flush=True)
    os._exit(1)


def _parse(text: bytes) -> dict[str, Any]:
    """The owner that a lock names; nothing where it is empty or damaged, as a crash can leave it."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _machine() -> str:
    """What two processes share that can see each other: the machine as it runs now, and its numbering of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    running = boot.read_text().strip() if boot.exists() else str(round(psutil.boot_time(), -1))
    numbering = os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {running} {numbering}"


__all__ = ["HEARTBEAT_SECONDS", "LOCK_FILE", "STALE_SECONDS", "RunLock", "RunLockedError", "one_writer"]

"""Files written to the disk with the checksum of what was meant, and folders removed."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

logger = logging.getLogger(__name__)


class _Summed:
    """A file that keeps the checksum of what is written to it: of what was meant, whatever the disk makes of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.checksum = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> int:
        self.checksum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def remove(path: Path) -> None:
    """Removes a checkpoint, or what stands in its place: of a link the link alone, a file."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def remove_if_possible(path: Path) -> None:
    """Removes what is not needed any more; what cannot be removed stays, and the log says so."""
    try:
        remove(path)
    except OSError as error:
        logger.warning("cannot remove %s, which stays: %s", path, error)


def checksum_of(path: Path) -> str:
    """The checksum of a file."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            checksum.update(data)
    return checksum.hexdigest()


def write_summed(path: Path, write: Callable[[Any], object]) -> str:
    """Writes a file to the disk; its checksum."""
    with path.open("wb") as file:
        summed = _Summed(file)
        write(summed)
        file.flush()
        os.fsync(file.fileno())
    return summed.checksum.hexdigest()


def flush_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__: list[str] = []

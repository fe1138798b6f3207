"""Files that are either complete or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; what was written takes the place of `path` if the block ends without an error.

    Args:
        path: The file to write or replace. The partial file beside it has the same suffix.
    """
    path = Path(path)
    partial = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["replacing"]

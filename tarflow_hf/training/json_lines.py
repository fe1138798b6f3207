"""Files of one JSON object a line, which a kill may cut short in the last line and nowhere else."""

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file with a `step` in each; none if there is no file.

    Args:
        path: The file.

    Raises:
        ValueError: If a line is something else: the file is damaged, or not this run's.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    return [_row(path, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError(
            f"{path}, line {number}, must be an object with a whole number 'step', got {line.strip()[:60]!r}. The "
            "file is damaged or of something else: mend the line, or move the file away to start one anew"
        )
    return row


__all__ = ["read_rows"]

"""What happened to a run: its starts, changed options, rollbacks and stops, one JSON object a line."""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tarflow_hf.training.json_lines import read_rows


class History:
    """The file `history.jsonl` of a run. Unlike `metrics.jsonl` it has times, and nothing of it is ever removed.

    Args:
        path: The file; it is appended to.

    Example:
        >>> from pathlib import Path
        >>> history = History(Path("history.jsonl"))
        >>> history.append("change", 200, {"max_steps": [200, 300]})
        >>> history.append("rollback", 260, {"to": 240})
        >>> history.changes()
        {'step 200': 'max_steps 200 to 300'}
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes that something happened after a step."""
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (text := self.path.read_bytes()).endswith(b"\n"):
            os.truncate(self.path, text.rfind(b"\n") + 1)  # a line that a kill or a full disk cut short
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time, "event": event, "step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def changes(self) -> dict[str, str]:
        """The options that were changed on the way, by "step N"; a start from an earlier step undoes later ones."""
        found: dict[int, dict[str, str]] = {}
        for row in read_rows(self.path):
            if row.get("event") == "start":
                found = {step: changed for step, changed in found.items() if step < row["step"]}
            if row.get("event") == "change":
                values = {name: pair for name, pair in row.items() if isinstance(pair, list) and len(pair) == 2}
                found[row["step"]] = {name: f"{name} {old} to {new}" for name, (old, new) in values.items()}
        return {f"step {step}": ", ".join(changed.values()) for step, changed in sorted(found.items())}


__all__ = ["History"]

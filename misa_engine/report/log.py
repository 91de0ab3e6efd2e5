"""The run log: one JSON object a line, from which every picture and table of a run is made.

    {"type": "run",     "step": 0,  "time_s": 0.0, "units": [...], "total_parameters": ..., "config": {...}, ...}
    {"type": "switch",  "step": 50, "time_s": 9.1, "round": 1, "active": [...], "probabilities": {...}, ...}
    {"type": "metrics", "step": 60, "time_s": 9.9, "loss": 2.31, "learning_rate": 1e-05, ...}

Lines are only ever appended, each in one write, so a run that is killed loses at most the line it was writing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Name of the log in a run's output directory.
LOG_NAME = "misa_log.jsonl"


class RunLog:
    """Append-only log of one run.

    ``time_s`` of an entry counts from the beginning of the run; a resumed run goes on counting from the last entry
    that is left, so that the log reads like one run.

    Args:
        path: the log file (its name ends in .jsonl), or the output directory that holds it under ``LOG_NAME``. Created
            by the first ``append``.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = log_path(path)
        self._started: float | None = None

    def append(self, type: str, step: int, **fields: Any) -> None:
        """Write one entry.

        Args:
            type: "run", "switch", "metrics", "memory", "baseline" or "end".
            step: optimizer steps made when it happened.
            **fields: anything JSON can hold, tensors and arrays included; inf and nan become null, which every JSON
                reader takes.
        """
        if self._started is None:
            earlier = self.read(self.path) if self.path.exists() else []
            self._started = time.monotonic() - (earlier[-1]["time_s"] if earlier else 0.0)
        entry = {"type": type, "step": int(step), "time_s": round(time.monotonic() - self._started, 3), **fields}
        line = (json.dumps(_plain(entry), allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            _cut_half_written_line(file)
            file.write(line)

    def truncate_after(self, step: int) -> None:
        """Forget what happened after ``step``, because the run goes on from a checkpoint of that step.

        An "end" entry is forgotten at any step: the run is not at its end. A negative step empties the log, whatever it
        holds. The file is replaced in one move; whatever interrupts that leaves either the old log or the new one.
        """
        if not self.path.exists():
            return
        entries = self.read(self.path) if step >= 0 else []
        kept = [entry for entry in entries if entry["step"] <= step and entry["type"] not in ("baseline", "end")]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.writelines((json.dumps(entry) + "\n").encode() for entry in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._started = None

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """All entries in the order they were written.

        A last line that is not whole is left out: the run was killed while writing it.

        Raises:
            ValueError: there is no log, or a line before the last is not an entry; file and line are named.
        """
        path = log_path(path)
        if not path.is_file():
            raise ValueError(f"no run log at {path}. A log is written by 'misa train' into its --output_dir.")
        lines = path.read_bytes().rstrip(b"\n").split(b"\n")
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                entry["type"], entry["step"], entry["time_s"]
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{path}, line {number} is not an entry of a run log: {line[:60]!r} ({error}). "
                    "Restore the file, or remove that line."
                ) from error
            entries.append(entry)
        return entries


def log_path(path: str | os.PathLike[str]) -> Path:
    """The log file, given itself or the output directory."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / LOG_NAME


def _cut_half_written_line(file: Any) -> None:
    """Remove what follows the last newline, so that the next entry begins a line of its own."""
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        file.truncate(position)


def _plain(value: Any) -> Any:
    """``value`` in types that strict JSON has."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    return str(value)

"""Results on disk: one JSON and one file of records for each model and task, so that a killed evaluation goes on.

OUTPUT/LABEL/TASK.json         the result, written whole when it is complete
OUTPUT/LABEL/TASK.jsonl        its records
OUTPUT/LABEL/TASK.jsonl.part   records of a task that was interrupted, under the key that they were made with
OUTPUT/results.json            all results of the last call and their comparisons
OUTPUT/index.html              the same to be looked at
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from misa_engine.evaluation.results import Record, Result
from misa_engine.evaluation.statistics import Estimate
from misa_engine.files import write_whole

#: Seconds between two lines of progress.
EVERY = 60.0


def slug(task: str) -> str:
    """A task's name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", task)


class Progress:
    """Records of one model on one task as they are made; those of an interrupted run with the same key are kept.

    Args:
        path: of the records when they are complete.
        key: of what decides them.
        say: gets a line a minute while records are made.
    """

    def __init__(self, path: Path, key: str, say: Callable[[str], None] | None = None) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.key = key
        self.done: dict[str, Record] = {}
        """By id."""
        self.total = 0
        """How many there will be, where the task knows."""
        self._file: IO[str] | None = None
        self._say, self._said = say, time.monotonic()
        self._read()

    def _read(self) -> None:
        if not self.part.exists():
            return
        kept = self.part.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [line for line in kept if line.endswith("\n")]  # a kill may cut the last one
        try:
            head, *records = [json.loads(line) for line in lines] or [{}]
        except ValueError:
            head, records = {}, []
        if head.get("key") == self.key:
            self.done = {one["id"]: Record(**one) for one in records}
        else:
            self.part.unlink()

    def add(self, record: Record) -> None:
        """Keep a record, at once on disk."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.part.open("w", encoding="utf-8") as file:  # without a line that a kill has cut
                for line in ({"key": self.key}, *(one.to_dict() for one in self.done.values())):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file = self.part.open("a", encoding="utf-8")
        self.done[record.id] = record
        self._file.write(json.dumps(record.to_dict(), ensure_ascii=False) + "\n")
        self._file.flush()
        if self._say is not None and time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self._say(f"{len(self.done)} of {self.total or '?'}")

    def close(self) -> None:
        """Let the file go; what was added stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> tuple[Record, ...]:
        """All records in the order of their ids, under their final name.

        Raises:
            ValueError: there are none.
        """
        self.close()
        if not self.done:
            raise ValueError(f"{self.path.stem} gave no records")
        records = tuple(sorted(self.done.values(), key=lambda one: _natural(one.id)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in records)
        write_whole(self.path, whole)
        self.part.unlink(missing_ok=True)
        return records


def _natural(text: str) -> list[Any]:
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"(\d+)", text) if piece]


def stored(path: Path) -> Result | None:
    """A result as it was written, with its records; None where there is none or it cannot be read."""
    try:
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lines = path.with_name(made["records_file"]).read_text(encoding="utf-8").splitlines()
        made["metrics"] = {name: Estimate(**one) for name, one in made["metrics"].items()}
        return Result(**made, records=tuple(Record(**json.loads(line)) for line in lines))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def what_changed(before: Result, facts: dict[str, Any], digest: str, versions: dict[str, str]) -> str:
    """Why a stored result does not answer the present question."""
    if before.model_digest != digest:
        return "the model's files have changed"
    then, now = _named(before.settings, before.versions), _named(facts, versions)
    for name, value in now.items():
        if then.get(name) != value:
            return f"{name} was {then.get(name)!r} and is {value!r}"
    return "settings have changed"


def _named(settings: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    return {**settings, **{f"version of {name}": version for name, version in versions.items()}}

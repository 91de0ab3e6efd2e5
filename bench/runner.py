"""Runs the cases of ``misa bench`` one after the other: results are whole after each, whatever ends the run.

``results.json`` holds ``environment``, ``settings``, ``cases`` (a row each), ``results`` (one for each method on a
model), and in a round ``plans`` and ``checks``. A run that was interrupted goes on with ``resume``.
"""

from __future__ import annotations

import json
import re
import signal
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench.baselines import BASELINES
from misa_engine.bench.cases import Case, Row
from misa_engine.bench.checks import ask_plan, is_judged, judge
from misa_engine.bench.measure import environment
from misa_engine.bench.named import name_of
from misa_engine.bench.presets import Bench
from misa_engine.bench.processes import CaseProcesses
from misa_engine.bench.training import LongestCase
from misa_engine.errors import UserError
from misa_engine.files import PART, replacing, write_whole

#: Seconds below which no case is begun.
SHORTEST_S = 15
#: Status of a case that was not brought to an end; ``resume`` runs it again.
UNFINISHED = ("not run", "interrupted", "started")
#: What an archive leaves out: raw allocator snapshots, half-written files.
NOT_PACKED = (".pickle", PART)


def run_bench(
    bench: Bench,
    cases: Sequence[Case],
    output: Path,
    *,
    deadline_s: float = float("inf"),
    resume: bool = False,
    archive: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the cases that have no result yet; ``output``/results.json and ``archive`` are whole after each.

    Args:
        bench: settings of the run.
        cases: what to run.
        output: folder of the results.
        deadline_s: seconds of the whole run; cases get no more than what is left.
        resume: keep what an earlier run of the same settings has measured.
        archive: a .tar.gz that gets the folder without raw snapshots.
        say: takes a line for each case.

    Raises:
        KeyboardInterrupt: also at SIGTERM, after the running case was ended and the results were written.
        UserError: ``resume`` found the results of other settings.
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(bench)))
    rows = earlier_rows(output, settings) if resume else []
    where = environment(torch.device(bench.device))
    document = {"environment": where, "settings": settings, "cases": rows, "results": merge(rows)}
    plans: dict[str, Any] = {}
    if bench.suite in ("round", "residents"):
        plans = document["plans"] = {case.name: ask_plan(case) for case in cases if is_judged(case)}
    if rows and archive is not None:
        pack(output, archive)  # an earlier call may have been killed between results.json and the archive
    processes = CaseProcesses(bench.device)
    with terminated_as_interrupt():
        for number, case in enumerate(cases, start=1):
            if any(row["case"] == case.name for row in document["cases"]):
                continue
            began = time.monotonic()
            left = deadline_s - (began - started)
            row = case.row("interrupted")
            try:
                row = _run(case, processes, plans, left)
            finally:
                row["case_s"] = time.monotonic() - began
                document["cases"].append(row)
                document["results"] = merge(document["cases"])
                if plans:
                    document["checks"] = judge(document["cases"], plans)
                write(document, output / "results.json")
                if archive is not None:
                    pack(output, archive)
                say(f"[{number}/{len(cases)}] {row['case_s']:5.1f} s  {case.name}: {row['status']}")
    return document


def _run(case: Case, processes: CaseProcesses, plans: dict[str, Any], left_s: float) -> Row:
    """The row of one case, or why it was not run."""
    if left_s < SHORTEST_S:
        return case.row("not run: the time of the whole run was over")
    if isinstance(case, LongestCase) and case.name in plans:
        case = case.as_planned(plans[case.name])
    row = processes.run(case, min(case.timeout_s, left_s))
    for name in ("folder", "log"):  # this machine's folders say nothing to a reader
        if row["settings"].get(name):
            row["settings"][name] = Path(row["settings"][name]).name
    return row


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM (``timeout``, a batch system) ends the run as Ctrl-C does: with its results."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt("terminated; results so far are kept, --resume (learning: the same words) goes on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- rows ----


def earlier_rows(output: Path, settings: Row) -> list[Row]:
    """Finished rows of a run that is to go on."""
    path = output / "results.json"
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    differs = [name for name, value in settings.items() if document["settings"].get(name) != value]
    if differs:
        raise UserError(f"--resume: {path} is of a run with other settings ({', '.join(differs)}); give those again.")
    return [row for row in document["cases"] if not row["status"].startswith(UNFINISHED)]


def merge(rows: Sequence[Row]) -> list[Row]:
    """One result a method on a model: its timed steps."""
    results: list[Row] = [dict(row) for row in rows if row["kind"] == "steps"]
    for result in results:
        baseline = BASELINES[name_of(result["settings"]["method"])]
        result |= {"summary": baseline.summary, "notes": baseline.notes}
    return results


# ---- files ----


def write(document: dict[str, Any], path: Path) -> None:
    """Write JSON in one go, so that an interrupted run leaves a whole file; pairs of numbers take one line."""
    text = re.sub(r"\[\s+([^][,{}]+),\s+([^][,{}\s]+)\s+\]", r"[\1, \2]", json.dumps(document, indent=1))
    write_whole(path, text + "\n")


def pack(folder: Path, archive: Path) -> None:
    """Put the results of a folder into one .tar.gz, also in one go."""
    with replacing(archive) as part, tarfile.open(part, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in NOT_PACKED and path != archive:
                tar.add(path, path.relative_to(folder.parent))

"""Runs the cases of ``misa bench`` one after the other: results are whole after each, whatever ends the run.

``results.json`` holds ``environment``, ``settings``, ``cases`` (a row each), ``results`` (one for each method on a
model), and in a round ``plans`` and ``checks``. A run that was interrupted goes on with ``resume``.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench.baselines import BASELINES
from misa_engine.bench.cases import Case, Row, TrainingCase
from misa_engine.bench.checks import JUDGED, ask_plan, judge
from misa_engine.bench.limits import LongestCase
from misa_engine.bench.loss import LossCase
from misa_engine.bench.measure import environment
from misa_engine.bench.presets import Bench
from misa_engine.bench.processes import CaseProcesses
from misa_engine.bench.steps import StepCase
from misa_engine.bench.suites import BASE_WEIGHTS
from misa_engine.errors import UserError

#: Seconds below which no case is begun.
SHORTEST_S = 15
#: Status of a case that was not brought to an end; ``resume`` runs it again.
UNFINISHED = ("not run", "interrupted", "started")
#: What an archive leaves out: raw allocator snapshots, weights, half-written files.
NOT_PACKED = (".pickle", ".safetensors", ".part")


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
    document: dict[str, Any] = {
        "environment": environment(torch.device(bench.device)),
        "settings": json.loads(json.dumps(asdict(bench))),
        "cases": earlier_rows(output, bench) if resume else [],
        "results": [],
    }
    judged = bench.suite == "round"
    plans: dict[str, Any] = {}
    if judged:
        planned = (c for c in cases if isinstance(c, (StepCase, LongestCase)) and c.method in JUDGED and not _speed(c))
        plans = document["plans"] = {case.name: ask_plan(case) for case in planned}
    processes = CaseProcesses(bench.device)
    with terminated_as_interrupt():
        for number, case in enumerate(cases, start=1):
            if any(row["case"] == case.name for row in document["cases"]):
                continue
            began = time.monotonic()
            left = deadline_s - (began - started)
            row = case.row("interrupted")
            try:
                row = _run(case, document, processes, plans, left)
            finally:
                row["case_s"] = time.monotonic() - began
                document["cases"].append(row)
                document["results"] = merge(document["cases"])
                if judged:
                    document["checks"] = judge(document["cases"], plans)
                write(document, output / "results.json")
                if archive is not None:
                    pack(output, archive)
                say(f"[{number}/{len(cases)}] {row['case_s']:5.1f} s  {case.name}: {row['status']}")
    (output / BASE_WEIGHTS).unlink(missing_ok=True)
    return document


def _run(
    case: Case, document: dict[str, Any], processes: CaseProcesses, plans: dict[str, Any], left_s: float
) -> dict[str, Any]:
    """The row of one case, or why it was not run."""
    if left_s < SHORTEST_S:
        return case.row("not run: the time of the whole run was over")
    if isinstance(case, LossCase) and case.start_from:
        known = [row["status"] for row in document["cases"] if row.get("method") == case.method]
        hopeless = next((status for status in known if status.startswith(("missing", "unsupported"))), None)
        if hopeless or not Path(case.start_from).exists():
            return case.row(hopeless or "not run: the base model could not be trained")
    if isinstance(case, LongestCase) and case.name in plans:
        case = case.as_planned(plans[case.name])
    row = processes.run(case, min(case.timeout_s, left_s))
    for name in ("start_from", "save_to", "snapshot", "log"):  # this machine's folders say nothing to a reader
        if row["settings"].get(name):
            row["settings"][name] = Path(row["settings"][name]).name
    return row


def _speed(case: TrainingCase) -> bool:
    return case.name.startswith("speed ")


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM (``timeout``, a batch system) ends the run as Ctrl-C does: with its results."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt("terminated; results so far are kept, --resume goes on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- rows ----


def earlier_rows(output: Path, bench: Bench) -> list[Row]:
    """Finished rows of a run that is to go on."""
    path = output / "results.json"
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    differs = [
        name for name, value in json.loads(json.dumps(asdict(bench))).items() if document["settings"].get(name) != value
    ]
    if differs:
        raise UserError(f"--resume: {path} is of a run with other settings ({', '.join(differs)}); give those again.")
    return [row for row in document["cases"] if not row["status"].startswith(UNFINISHED)]


def merge(rows: Sequence[Row]) -> list[Row]:
    """One result a method on a model: its timed steps, and its loss at the best of the learning rates."""
    results: list[Row] = [dict(row) for row in rows if row["kind"] == "steps"]
    losses: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "loss" and row["settings"]["start_from"]:
            losses.setdefault(row["method"], []).append(row)
    for method, own in losses.items():
        result = next((row for row in results if row["method"] == method), None)
        if result is None:
            result = {**own[0], "step_time_s": None, "status": own[0]["status"]}
            results.append(result)
        result |= best_loss(own)
        if result["kind"] == "loss":
            result["status"] = result["loss_status"]
    for result in results:
        result["summary"] = BASELINES[result["method"]].summary
    return results


def best_loss(rows: Sequence[Row]) -> dict[str, Any]:
    """Held-out loss and curve at the learning rate whose runs end lowest (median of the seeds)."""
    by_lr: dict[float, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            by_lr.setdefault(row["settings"]["lr"], []).append(row)
    if not by_lr:
        return {"heldout_loss": None, "loss_status": rows[0]["status"]}
    medians = {lr: statistics.median(row["heldout_loss"] for row in runs) for lr, runs in by_lr.items()}
    lr = min(medians, key=lambda key: (medians[key] != medians[key], medians[key]))
    losses = sorted(row["heldout_loss"] for row in by_lr[lr])
    return {
        "heldout_loss": medians[lr],
        "heldout_loss_spread": [losses[0], losses[-1]],
        "heldout_loss_by_lr": {f"{key:g}": value for key, value in medians.items()},
        "lr": lr,
        "curve": min(by_lr[lr], key=lambda row: abs(row["heldout_loss"] - medians[lr]))["curve"],
        "loss_status": "ok",
    }


# ---- files ----


def write(document: dict[str, Any], path: Path) -> None:
    """Write JSON in one go, so that an interrupted run leaves a whole file; pairs of numbers take one line."""
    part = path.with_suffix(".part")
    text = re.sub(r"\[\s+([^][,{}]+),\s+([^][,{}\s]+)\s+\]", r"[\1, \2]", json.dumps(document, indent=1))
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def pack(folder: Path, archive: Path) -> None:
    """Put the results of a folder into one .tar.gz, also in one go."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in NOT_PACKED and path not in (part, archive):
                tar.add(path, path.relative_to(folder.parent))
    part.replace(archive)

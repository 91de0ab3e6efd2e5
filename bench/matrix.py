"""``misa bench learning``: methods x learning rates x seeds on tasks, from one pretrained base.

Each run is a fresh process and a file of its own, DIR/runs/NAME.json, in the shape of peft's method comparison. What
has a file is not run again: a matrix that was killed goes on where it stopped, one with more methods, rates or seeds
extends it, and two of them may write to one DIR. results.json, its page and its pictures are made of all these files.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from misa_engine.bench.named import file_name
from misa_engine.bench.presets import LEARNING, RECIPES, Learning
from misa_engine.cli.parsing import Parser, names, positive, positive_size
from misa_engine.errors import DONE, FAILED, UserError, did_you_mean

USAGE = """misa bench learning --output DIR [--preset NAME] [options]

presets, with all methods on 2 cores:
  quick   one learning rate and seed from a 1M base made in a minute: within 10 minutes
  small   3 rates x 5 seeds from a 2.5M base made in some minutes: a night
  real    3 rates x 3 seeds x 3 tasks from --base DIR (misa fetch): days; choose --tasks, --methods and --seeds"""
#: What must be the same for all runs of a folder.
FIXED = (
    "base", "steps", "batch", "length", "delta", "inner_steps", "rows", "questions", "points", "dtype",
)  # fmt: skip
#: Status of a run that ``DIR/runs`` does not keep, so that it is run again.
AGAIN = ("started", "interrupted", "timed out", "killed")


def run(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    options = _parser().parse_args(words)
    if options.preset not in LEARNING:
        hint = did_you_mean(options.preset, LEARNING)
        raise UserError(f"unknown preset {options.preset!r}.{hint} Known: {', '.join(LEARNING)}.")
    given = {entry.name: value for entry in fields(Learning) if (value := getattr(options, entry.name)) is not None}
    matrix = Learning(**{**LEARNING[options.preset], **given})
    output = Path(options.output).expanduser()
    work = Path(options.work).expanduser() if options.work else output / "work"
    check(matrix, output)
    cases = list(cases_of(matrix, str(work.resolve())))
    if options.list:
        print("\n".join(case.name for case in cases))
        return DONE
    rows = run_matrix(matrix, cases, output, deadline_s=options.deadline_s, say=lambda line: print(line, flush=True))
    return DONE if any(row["status"] == "ok" for row in rows) else FAILED


def check(matrix: Learning, output: Path) -> None:
    """Refuse what cannot run, before anything is built.

    Raises:
        UserError: an unknown method, task or base; or ``output`` holds a matrix of other settings.
    """
    from misa_engine.bench.learners import learner_of
    from misa_engine.bench.tasks import TASKS

    for method in matrix.methods:
        learner_of(method)
    for task in matrix.tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}.{did_you_mean(task, TASKS)} Known: {', '.join(TASKS)}.")
    if matrix.base not in RECIPES and not (Path(matrix.base).expanduser() / "config.json").is_file():
        raise UserError(
            f"--base {matrix.base or '(none)'}: neither {', '.join(RECIPES)} nor a model directory. "
            "misa fetch smollm2-135m DIR makes one."
        )
    if matrix.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {matrix.dtype}: float32 or bfloat16.")
    known = output / "settings.json"
    mine = fixed(matrix)
    if known.exists():
        theirs = json.loads(known.read_text(encoding="utf-8"))
        differs = [f"{name} {theirs.get(name)}" for name, value in mine.items() if theirs.get(name) != value]
        if differs:
            raise UserError(f"{output} holds runs with other settings ({', '.join(differs)}): choose another --output.")


def fixed(matrix: Learning) -> dict[str, Any]:
    """The settings that all runs of a folder share, as JSON knows them; a base by its name alone."""
    values = {name: getattr(matrix, name) for name in FIXED}
    return {**values, "base": Path(matrix.base).name}


def cases_of(matrix: Learning, work: str) -> Iterator[Any]:
    """What all share, then each task's base as it is, then seed by seed all methods at all rates."""
    from misa_engine.bench.bases import BaseCase
    from misa_engine.bench.learners import LEARNERS, learner_of
    from misa_engine.bench.learning import LearningCase

    base = str(Path(matrix.base).expanduser().resolve()) if matrix.base not in RECIPES else matrix.base
    place: dict[str, Any] = {
        "base": base,
        "work": work,
        "threads": matrix.threads,
        "timeout_s": float(matrix.timeout_s),
    }
    yield BaseCase(name=f"base {Path(base).name}", **place)
    names = ("dtype", "batch", "length", "points", "rows", "questions", "delta", "inner_steps")
    shared: dict[str, Any] = {name: getattr(matrix, name) for name in names} | place
    methods = [name for name in matrix.methods or LEARNERS if name != "base"]
    for task in matrix.tasks:
        own = {"task": task, "questions": matrix.questions if task == "math" else 0}
        yield LearningCase(name=f"{task} base", learner="base", **{**shared, **own, "steps": 0})
    for seed in matrix.seeds:
        for task in matrix.tasks:
            own = {"task": task, "questions": matrix.questions if task == "math" else 0, "seed": seed}
            for method in methods:
                for lr in matrix.lrs or [f * matrix.base_lr * learner_of(method).rate for f in matrix.factors]:
                    lr = float(f"{lr:.3g}")
                    name = f"{task} {method} lr {lr:g} seed {seed}"
                    run = {"learner": method, "lr": lr, "steps": matrix.steps}
                    yield LearningCase(name=name, **{**shared, **own, **run})


def run_matrix(
    matrix: Learning, cases: list[Any], output: Path, *, deadline_s: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run what has no result yet; returns all rows of the folder, those of other matrices too."""
    from misa_engine.bench.learning_results import document_of
    from misa_engine.bench.rendering import render
    from misa_engine.bench.runner import write

    output.mkdir(parents=True, exist_ok=True)
    write(fixed(matrix), output / "settings.json")
    try:
        run_pending(cases, output / "runs", deadline_s=deadline_s, say=say, shown=_heldout)
    finally:
        rows = read_rows(output)
        if rows:
            write(document_of(rows, fixed(matrix)), output / "results.json")
            render(output / "results.json")
    return rows


def _heldout(row: dict[str, Any]) -> str:
    result = row.get("learning", {}).get("heldout_loss")
    return f" held-out {result:.4f}" if result is not None else ""


def run_pending(
    cases: Sequence[Any],
    folder: Path,
    *,
    device: str = "cpu",
    deadline_s: float = math.inf,
    say: Callable[[str], None],
    shown: Callable[[dict[str, Any]], str] = lambda row: "",
    unkept: tuple[str, ...] = ("base",),
    private: tuple[str, ...] = ("base", "work"),
    preload: tuple[str, ...] = (),
) -> None:
    """Run the cases that have no file in ``folder`` yet, each in a process of its own, and write theirs.

    Args:
        cases: what to run, in this order.
        folder: of the rows, one file a case; made where it is missing.
        device: that the cases use.
        deadline_s: seconds of all of them; none is begun afterwards.
        say: takes a line for each case.
        shown: what a line says of a row beside its status.
        unkept: kinds of cases that prepare what the others need: run every time, no file, and they must succeed.
        private: settings that name folders of this machine; files hold their last part alone.
        preload: modules to import once for all cases.

    Raises:
        KeyboardInterrupt: also at SIGTERM; what is done is kept, and the same call goes on.
        UserError: a case of a kind in ``unkept`` failed.
    """
    from misa_engine.bench.processes import CaseProcesses
    from misa_engine.bench.runner import terminated_as_interrupt, write

    folder.mkdir(parents=True, exist_ok=True)
    started, processes = time.monotonic(), CaseProcesses(device, preload)
    with terminated_as_interrupt():
        for number, case in enumerate(cases, start=1):
            path = file_of(case, folder)
            left = deadline_s - (time.monotonic() - started)
            if left <= 0:
                break
            if case.kind not in unkept and path.exists():
                continue
            began = time.monotonic()
            row = processes.run(case, min(case.timeout_s, left))
            row["case_s"] = time.monotonic() - began
            for name in private:  # this machine's folders say nothing to a reader
                if row["settings"].get(name):
                    row["settings"][name] = Path(row["settings"][name]).name
            if case.kind not in unkept and not row["status"].startswith(AGAIN):
                write(row, path)
            say(f"[{number}/{len(cases)}] {row['case_s']:6.1f} s  {case.name}: {row['status']}{shown(row)}")
            if case.kind in unkept and row["status"] != "ok":
                raise UserError(f"the {case.kind} could not be made: {row['status']}")


def file_of(case: Any, folder: Path) -> Path:
    """Where a run's row is kept."""
    return folder / file_name(case.name)


def read_rows(output: Path) -> list[dict[str, Any]]:
    """All runs of a folder, by name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "runs").glob("*.json"))]
    return sorted(found, key=lambda row: row["case"])


def _parser() -> Parser:
    parser = Parser(
        "misa bench learning", usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="results; what is there is kept and added to")
    add("--preset", default="quick", help=f"{', '.join(LEARNING)} (default: quick)")
    add("--work", metavar="DIR", help="bases that are trained here, and text (default: work in --output)")
    add("--list", action="store_true", help="name the runs and end")
    add("--deadline_s", type=positive_size, default=float("inf"), help="seconds of the whole matrix")
    types: dict[str, Any] = {"int": positive, "float": positive_size, "str": str, "tuple[str, ...]": names}
    types["tuple[float, ...]"] = lambda text: tuple(map(positive_size, names(text)))
    types["tuple[int, ...]"] = lambda text: tuple(map(int, names(text)))
    for entry in fields(Learning):
        add(f"--{entry.name}", type=types[str(entry.type)], help=entry.metadata["help"])
    return parser

"""``misa reproduce``: an experiment of the paper, run by run, to one page beside the paper's numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from misa_engine.bench.reproduce.experiments import EXPERIMENTS, Run, runs_of
from misa_engine.cli.parsing import Parser, positive_size
from misa_engine.errors import DONE, FAILED, UserError, did_you_mean

USAGE = """misa reproduce NAME [--scale tiny] [--output DIR] [options]
       misa reproduce --list
       misa reproduce NAME --list | --cost

experiments:
""" + "\n".join(f"  {name:<12} {one.title}" for name, one in EXPERIMENTS.items())
SCALES = ("paper", "tiny")
VARIANTS = ("official", "paper")
#: What a folder's runs share.
FIXED = ("experiment", "scale", "recipe", "device")


def run(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    options = _parser().parse_args(words)
    if options.name is None:
        if options.list:
            print(
                "\n".join(f"{name:<12} {len(runs_of(name)):>3} runs  {one.title}" for name, one in EXPERIMENTS.items())
            )
            return DONE
        raise UserError(f"misa reproduce needs an experiment: {', '.join(EXPERIMENTS)}.")
    if options.name not in EXPERIMENTS:
        hint = did_you_mean(options.name, EXPERIMENTS)
        raise UserError(f"unknown experiment {options.name!r}.{hint} Known: {', '.join(EXPERIMENTS)}.")
    every = runs_of(options.name, scale=options.scale)
    chosen = runs_of(options.name, options.runs, options.scale)
    if not chosen:
        raise UserError(f"no run of {options.name} matches --runs {options.runs!r}; --list names them.")
    if options.list:
        print("\n".join(one.name for one in chosen))
        return DONE
    if options.cost:
        print(cost_text(chosen, options.recipe))
        return DONE
    return _reproduce(options, every, chosen)


def _reproduce(options: argparse.Namespace, every: list[Run], chosen: list[Run]) -> int:
    from misa_engine.bench.command import check_device
    from misa_engine.bench.matrix import run_pending
    from misa_engine.bench.reproduce.building import Place, case_of, check_inputs
    from misa_engine.bench.reproduce.toys import ToyCase
    from misa_engine.bench.runner import write

    ending = "-tiny" if options.scale == "tiny" else ""
    output = Path(options.output or f"runs/reproduce-{options.name}{ending}").expanduser()
    device = options.device or _device(options.scale)
    check_device(device)
    place = Place(
        options.scale, output.resolve(), Path(options.data).expanduser(), Path(options.models).expanduser(), device,
        options.recipe,
    )  # fmt: skip
    check_inputs(chosen, place)
    fixed = {"experiment": options.name, "scale": options.scale, "recipe": options.recipe, "device": device}
    check_folder(output, fixed)
    output.mkdir(parents=True, exist_ok=True)
    write(fixed, output / "settings.json")
    cases: list[Any] = [case_of(one, place) for one in chosen]
    if options.scale == "tiny" and EXPERIMENTS[options.name].source:
        cases.insert(0, ToyCase(name="toys", folder=str(place.work / "toys")))
    try:
        run_pending(
            cases, output / "runs", device=device, deadline_s=options.deadline_s, unkept=("toys",),
            private=("directory", "data", "judged", "evaluated", "folder"),
            preload=preload_of(EXPERIMENTS[options.name].tasks.values()), say=lambda line: print(line, flush=True),
        )  # fmt: skip
    finally:
        rows = finish(options.name, fixed, output, every)
    names = {one.name for one in chosen}
    return DONE if any(row["status"] == "ok" for row in rows if row["case"] in names) else FAILED


def preload_of(tasks: Iterable[str]) -> tuple[str, ...]:
    """Modules that a run of these tasks spends seconds on: lm-eval's index of its tasks is read once for all runs."""
    from misa_engine.evaluation.adapters import PREFIX

    return () if all(task.startswith(PREFIX) for task in tasks) else ("misa_engine.evaluation.harness_index",)


def finish(name: str, fixed: dict[str, str], output: Path, every: Sequence[Run]) -> list[dict[str, Any]]:
    """Write results.json and the page from what has been run so far; returns the runs' rows."""
    from misa_engine.bench.matrix import read_rows
    from misa_engine.bench.reproduce.page import page_of
    from misa_engine.bench.reproduce.results import document_of
    from misa_engine.bench.runner import write
    from misa_engine.files import write_whole

    rows = read_rows(output)
    if not rows:
        return []
    document = document_of(name, fixed["scale"], fixed["recipe"], fixed["device"], every, rows)
    write(document, output / "results.json")
    page = output / f"{name}.html"
    write_whole(page, page_of(document))
    print(f"page     {page}")
    return rows


def check_folder(output: Path, fixed: dict[str, str]) -> None:
    """Refuse a folder that holds runs of something else.

    Raises:
        UserError: it does.
    """
    known = output / "settings.json"
    if known.exists():
        theirs = json.loads(known.read_text(encoding="utf-8"))
        differs = [f"{name} {theirs.get(name)}" for name in FIXED if theirs.get(name) != fixed[name]]
        if differs:
            raise UserError(f"{output} holds runs of {', '.join(differs)}: choose another --output.")


def cost_text(runs: Sequence[Run], variant: str) -> str:
    """A line for each run and their sum: computed, not measured."""
    from misa_engine.bench.reproduce.cost import ASSUMED_FLOPS, cost_of

    lines = [f"{'run':<48} {'steps':>8} {'GPU-hours':>10} {'VRAM':>10}  (computed, not measured)"]
    total = 0.0
    for one in runs:
        cost = cost_of(one, variant)
        total += cost.gpu_hours
        vram = f"{cost.vram_bytes / 2**30:.2f} GiB" if cost.vram_bytes else "–"
        lines.append(f"{one.name:<48} {cost.steps:>8,} {cost.gpu_hours:>10.1f} {vram:>10}  {cost.how}")
    lines.append(f"{'together':<48} {'':>8} {total:>10.1f}")
    lines.append(
        f"hours: arithmetic of training at an assumed {ASSUMED_FLOPS:.0e} operations a second, without evaluation"
    )
    return "\n".join(lines)


def _device(scale: str) -> str:
    import torch

    return "cuda:0" if scale == "paper" and torch.cuda.is_available() else "cpu"


def _parser() -> Parser:
    parser = Parser(
        "misa reproduce", usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", nargs="?", help="the experiment")
    add("--scale", choices=SCALES, default="paper", help="paper: its models and data; tiny: toys, minutes on a CPU")
    add("--recipe", choices=VARIANTS, default="official",
        help="sampler of the rows named MISA: the published code's or Algorithm 1's (default: official)")  # fmt: skip
    add("--output", metavar="DIR", help="results and page; what is there is kept and added to "
        "(default: runs/reproduce-NAME)")  # fmt: skip
    add("--data", metavar="DIR", default="data", help="training files and tasks (default: data)")
    add("--models", metavar="DIR", default="models", help="model directories (default: models)")
    add("--runs", metavar="PATTERN", default="", help="only runs whose name contains this, or matches it with *")
    add("--list", action="store_true", help="name the runs and end")
    add("--cost", action="store_true", help="GPU-hours and VRAM of each run, computed, and end")
    add("--device", help="cpu or cuda:0 (default: the GPU where there is one; tiny: the CPU)")
    add("--deadline_s", type=positive_size, default=float("inf"), help="seconds of all runs together")
    return parser

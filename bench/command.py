"""``misa bench``: memory, speed and learning of MISA beside what one would use instead."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from misa_engine.bench.presets import PRESETS, PROFILED_STEPS, SUITES, Bench
from misa_engine.cli.parsing import MODEL_FLAGS, Parser, names, positive, positive_size, truth
from misa_engine.errors import DONE, FAILED, UserError, did_you_mean

USAGE = """misa bench [SUITE] --output DIR [--preset NAME] [options]
       misa bench learning --help
       misa bench --render DIR/results.json [--into README.md]

suites:
""" + "\n".join(f"  {name:<11} {text}" for name, text in SUITES.items())
#: Other names of options.
FLAGS = {"model": MODEL_FLAGS, "methods": ("--methods", "--method")}
#: What a round takes of the options; all else is fixed in its cases.
ROUND_OPTIONS = {"suite", "device", "vram_gib", "delta", "sizes"}


def run(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    if words[:1] == ["learning"]:  # a matrix of many short runs has settings of its own
        from misa_engine.bench.matrix import run as run_learning

        return run_learning(words[1:])
    options = _parser().parse_args(words)
    into = Path(options.into) if options.into else None
    if options.render:
        from misa_engine.bench.rendering import render

        render(Path(options.render), into)
        return DONE
    known(options.suite, SUITES, "benchmark")
    if not options.output:  # before anything slow is imported
        raise UserError("misa bench needs --output DIR, where results.json, the page and the pictures go.")
    output = Path(options.output).expanduser()
    results = output / "results.json"
    if results.exists() and not (options.overwrite or options.resume):
        raise UserError(f"{results} exists: choose another --output, or say --overwrite or --resume.")
    bench = settings_of(options)
    from misa_engine.bench.rendering import render
    from misa_engine.bench.runner import pack, run_bench
    from misa_engine.bench.suites import cases_of

    cases = [case for case in cases_of(bench, output) if options.cases in case.name]
    if options.list or not cases:
        print("\n".join(case.name for case in cases) or f"no case has {options.cases!r} in its name")
        return DONE if cases else FAILED
    archive = Path(options.archive) if options.archive else None
    limits: dict[str, Any] = {"deadline_s": options.deadline_s, "resume": options.resume, "archive": archive}
    try:
        document = run_bench(bench, cases, output, **limits, say=lambda line: print(line, flush=True))
    finally:
        if results.exists():
            render(results, into)
        if archive is not None:  # with page and pictures
            pack(output, archive)
    failed = [row for row in document["cases"] if row["kind"] == "command" and row["status"] != "ok"]
    return DONE if not failed and any(row["status"] == "ok" for row in document["cases"]) else FAILED


def profile(words: list[str]) -> int:
    """``misa profile``: the suite of this name."""
    return run(["profile", *words])


def known(word: str, all_known: Iterable[str], what: str) -> None:
    """Refuse a name that is not known.

    Raises:
        UserError: with the closest known one and all of them.
    """
    all_known = list(all_known)
    if word not in all_known:
        hint = did_you_mean(word, all_known)
        raise UserError(f"unknown {what} {word!r}.{hint} Known: {', '.join(all_known)}.")


def check_device(device: str) -> None:
    """Refuse a device that is not known or not here.

    Raises:
        UserError: what to give instead.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: give cpu or cuda:0.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is visible. Use --device cpu.")


def settings_of(options: argparse.Namespace) -> Bench:
    """The preset with the options given beside it, checked before anything runs."""
    import torch

    from misa_engine.bench.baselines import BASELINES
    from misa_engine.bench.named import case_options, name_of
    from misa_engine.bench.workload import SMALL_SHAPES, documents, fitting_delta
    from misa_engine.planner.cards import MODELS

    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    fixed = options.suite in ("round", "residents")
    preset = options.preset or ("gpu" if on_gpu else "quick" if fixed else "cpu")
    known(preset, PRESETS, "preset")
    entries = {entry.name for entry in fields(Bench)}
    given = {name: value for name, value in vars(options).items() if name in entries and value is not None}
    ignored = sorted(set(given) - ROUND_OPTIONS)
    if fixed and ignored:
        raise UserError(
            f"misa bench {options.suite} has cases of its own; it takes no --{ignored[0]}. --cases WORD chooses."
        )
    bench = Bench(**{**PRESETS[preset], **given})
    for method in bench.methods:
        known(name_of(method), BASELINES, "method")
        case_options(method)
    known(bench.model.strip().lower(), [*SMALL_SHAPES, *MODELS], "model")
    check_device(bench.device)
    if bench.delta > 1:
        raise UserError(f"--delta {bench.delta:g}: a share of the model above 0 and at most 1.")
    if bench.length < 2:
        raise UserError("--length must be at least 2")
    if "delta" not in given and (delta := fitting_delta(bench.model, bench.delta)) > bench.delta:
        print(f"{bench.model}: its largest matrix needs --delta {delta:g}")
        bench = replace(bench, delta=delta)
    if bench.suite == "profile" and "steps" not in given:
        bench = replace(bench, steps=PROFILED_STEPS)
    if bench.suite == "throughput" and bench.steps < 2 * bench.inner_steps:
        if "inner_steps" not in given:
            bench = replace(bench, inner_steps=max(1, bench.steps // 2))
        print(f"{bench.steps} timed steps: a switch every {bench.inner_steps} of them")
    try:
        documents(bench.data)
    except ValueError as error:
        raise UserError(str(error)) from error
    return bench


def _parser() -> Parser:
    parser = Parser(
        "misa bench", usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("suite", nargs="?", default="throughput", help="what to run (default: throughput)")
    add("--output", metavar="DIR", help="where results.json, its page and pictures go")
    add("--overwrite", action="store_true", help="replace the results in DIR")
    add("--resume", action="store_true", help="run what DIR has no result of yet")
    add("--render", metavar="FILE", help="only draw tables and pictures of stored results")
    add("--into", metavar="FILE.md", help="also put the page between the markers in this file, as in README.md")
    add("--preset", help=f"{', '.join(PRESETS)} (default: gpu where there is one, else cpu)")
    add("--cases", default="", metavar="WORD", help="only cases whose name contains this")
    add("--list", action="store_true", help="name the cases and end")
    add("--deadline_s", type=positive_size, default=float("inf"), help="seconds of the whole run")
    add("--archive", metavar="FILE.tar.gz", help="also pack the results, without raw memory snapshots")
    types: dict[str, Any] = {"int": positive, "float": positive_size, "str": str, "tuple[str, ...]": names}
    types["tuple[float, ...]"] = lambda text: tuple(map(positive_size, names(text)))
    for entry in fields(Bench):
        if text := entry.metadata.get("help"):
            if entry.type == "bool":
                add(f"--{entry.name}", nargs="?", const=True, type=truth, metavar="BOOL", help=text)
            else:
                add(*FLAGS.get(entry.name, (f"--{entry.name}",)), type=types[str(entry.type)], help=text)
    return parser

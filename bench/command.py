"""``misa bench``: memory, speed and held-out loss of MISA beside what one would use instead, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from misa_engine.errors import DONE, UserError, did_you_mean

USAGE = """misa bench memory|throughput|loss|all --output DIR [--preset cpu] [options]
       misa bench --render DIR/results.json"""


def run(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    options = _parser().parse_args(words)
    into = Path(options.into) if options.into else None
    if options.render:
        return _render(Path(options.render), into)
    bench = settings_of(options)
    if not options.output:
        raise UserError("misa bench needs --output DIR, where results.json, the page and the pictures go.")
    output = Path(options.output).expanduser()
    if (output / "results.json").exists() and not options.overwrite:
        raise UserError(f"{output / 'results.json'} exists: choose another --output, or say --overwrite.")
    from misa_engine.bench.suite import run_bench

    run_bench(bench, output, lambda line: print(line, flush=True))
    return _render(output / "results.json", into)


def settings_of(options: argparse.Namespace) -> Any:
    """The preset with the options given beside it, checked before anything runs."""
    import torch

    from misa_engine.bench.baselines import BASELINES
    from misa_engine.bench.corpus import documents
    from misa_engine.bench.suite import PRESETS, SUITES, Bench
    from misa_engine.bench.workload import SMALL_SHAPES, model_config
    from misa_engine.planner.cards import MODELS

    suite = options.suite or "all"
    if suite not in SUITES:
        raise UserError(f"unknown benchmark {suite!r}.{did_you_mean(suite, SUITES)} Known: {', '.join(SUITES)}.")
    preset = options.preset or ("gpu" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}.{did_you_mean(preset, PRESETS)} Known: {', '.join(PRESETS)}.")
    names = {entry.name for entry in fields(Bench)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    bench = Bench(**{**PRESETS[preset], **given, "suite": suite})
    unknown = [name for name in bench.methods if name not in BASELINES]
    if unknown:
        hint = did_you_mean(unknown[0], BASELINES)
        raise UserError(f"unknown method {unknown[0]!r}.{hint} Known: {', '.join(BASELINES)}.")
    for shape in (bench.model, bench.loss_model):
        if shape not in SMALL_SHAPES:
            try:
                model_config(shape)
            except ValueError as error:
                known = ", ".join([*SMALL_SHAPES, *MODELS])
                raise UserError(
                    f"unknown model {shape!r}.{did_you_mean(shape, known.split(', '))} Known: {known}."
                ) from error
    if bench.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {bench.device}: no CUDA device is visible. Use --preset cpu.")
    if bench.steps < 1 or bench.inner_steps < 1 or bench.batch < 1 or bench.length < 2 or bench.seeds < 1:
        raise UserError("steps, inner_steps, batch and seeds must be at least 1 and length at least 2")
    if bench.suite != "loss" and bench.steps < 2 * bench.inner_steps:
        bench = replace(bench, steps=2 * bench.inner_steps)  # two switches at least are in the timed steps
    for source in {bench.data, bench.loss_data}:
        try:
            documents(source)
        except ValueError as error:
            raise UserError(str(error)) from error
    return bench


def _render(path: Path, into: Path | None = None) -> int:
    """Tables, page and pictures from a stored run; ``into`` gets the page between its markers."""
    from misa_engine.bench import page

    try:
        document = json.loads(path.read_text())
        drawn = page.pictures(document, path.parent)
    except OSError as error:
        raise UserError(f"--render {path}: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"--render {path} is not the results.json of misa bench: {error!r}") from error
    except ModuleNotFoundError as error:
        drawn = []
        print(f"no pictures: {error}; pip install 'misa_engine[bench]'", file=sys.stderr)
    (path.parent / "results.md").write_text(
        page.markdown(document, [Path(name.name) for name in drawn]), encoding="utf-8"
    )
    if into is not None:
        try:
            page.insert(document, drawn, into)
        except (OSError, ValueError) as error:
            raise UserError(f"--into {into}: {error}") from error
    page.print_tables(document)
    print("\n".join(str(name) for name in (path, path.parent / "results.md", *drawn)))
    return DONE


def _parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(f"misa bench: {message}. See misa bench --help.")

    parser = Parser(prog="misa bench", usage=USAGE, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("suite", nargs="?", help="memory, throughput (the same cases), loss or all (default)")
    add("--output", metavar="DIR", help="where results.json, results.md and pictures go")
    add("--overwrite", action="store_true", help="replace the results in DIR")
    add("--render", metavar="FILE", help="only draw tables and pictures of a stored results.json")
    add("--into", metavar="FILE.md", help="also put the page between the markers in this file, as in README.md")
    add("--preset", help="cpu, quick, gpu or gpu-8b (default: gpu where there is one, else cpu)")
    add("--methods", type=lambda text: tuple(text.split(",")), metavar="A,B", help="methods, separated by commas")
    add("--model", help="configuration for time and memory, random weights")
    add("--loss_model", help="configuration for the loss curves")
    add("--device", help="cpu or cuda:0")
    add("--vram", "--vram_gib", dest="vram_gib", type=float, help="GiB that the allocator may reserve on a GPU")
    for name, text in (
        ("batch", "sequences of a micro-batch"), ("length", "tokens of a sequence"),
        ("accumulation", "micro-batches of a step"), ("steps", "timed steps"), ("warm_up", "steps before them"),
        ("inner_steps", "steps between two switches"), ("seeds", "seeds of the loss curves"),
        ("loss_steps", "steps of the loss curves"), ("base_steps", "steps of the base model"),
        ("loss_batch", "sequences of a step there"), ("timeout_s", "seconds that a case may take"),
    ):  # fmt: skip
        add(f"--{name}", type=int, help=text)
    for name, text in (("delta", "share that trains at a time"), ("loss_delta", "the same for the loss curves")):
        add(f"--{name}", type=float, help=text)
    add("--lrs", type=lambda text: tuple(map(float, text.split(","))), metavar="A,B", help="learning rates tried")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=None, help="recompute activations")
    add("--loss", choices=("plain", "lean"), help="all logits at once, or in chunks (Liger's on a GPU)")
    add("--data", help="stdlib, arithmetic or a text file: base model, time and memory")
    add("--loss_data", help="the same for the loss curves")
    return parser

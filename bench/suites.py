"""The cases of each suite of ``misa bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from misa_engine.bench.cases import ROOT, Case, CommandCase, TrainingCase
from misa_engine.bench.named import case_options, name_of
from misa_engine.bench.presets import GIB, PROFILED_STEPS, Bench
from misa_engine.bench.training import LongestCase, StepCase, SwitchCase
from misa_engine.planner.activations import CONTEXT_BYTES

#: A search keeps one active set: the plan's worst draw, or without a plan layer 0, so that every layer's input is kept.
WORST_SET = {"rule": "static", "static_weights": {"*.layers.0.*": 1e12}}

OneCase = TypeVar("OneCase", bound=TrainingCase)


def make(kind: Callable[..., OneCase], bench: Bench, **own: Any) -> OneCase:
    """A case with every setting that it shares with the run, ``own`` ones last."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    shared = {name: value for name, value in vars(bench).items() if name in names}
    misa, named = case_options(own.get("method", TrainingCase.method))
    if misa:
        own["misa"] = {**own.get("misa", {}), **misa}
    case = kind(**{**shared, "limit_bytes": int(bench.vram_gib * GIB), **own, **named})
    # what updates inside the backward pass cannot clip by the norm of all gradients, nor accumulate them
    return replace(case, max_grad_norm=None, accumulation=1) if name_of(case.method) == "misa-backward" else case


def cases_of(bench: Bench, output: Path) -> list[Case]:
    """All cases of a run whose results go to ``output``, in their order."""
    if bench.suite == "round":
        return round_cases(bench, output)
    if bench.suite == "residents":
        return resident_cases(bench)
    if bench.suite == "profile":
        return profile_cases(bench, output)
    return step_cases(bench, bench.methods)


def step_cases(bench: Bench, methods: Iterable[str], prefix: str = "") -> list[Case]:
    """One case a method."""
    name = f"{prefix}{bench.model}"
    return [make(StepCase, bench, name=f"{name} {m}", shape=bench.model, method=m, phases=True) for m in methods]


def profile_cases(bench: Bench, output: Path, prefix: str = "") -> list[Case]:
    """One case a method, whose rounds are as long as the profile of ``bench.steps``, so that it holds one switch."""
    shared = {"shape": bench.model, "data": "random", "folder": str(output.resolve()), "timeline": True}
    shared |= {"warm_up": bench.steps, "inner_steps": bench.steps}
    return [make(StepCase, bench, name=f"{prefix}{bench.model} {m}", method=m, **shared) for m in bench.methods]


# ---- the round ----

MEMORY_PEERS = ("lora", "adamw8bit", "badam", "adamw", "misa-backward", "lisa", "uniform")
SPEED_8B = ("misa", "misa-int8", "lora", "badam", "lisa", "unfused-misa", "adamw8bit")
SPEED_1B = ("misa", "misa-int8", "adamw8bit", "lora", "badam", "lisa", "unfused-misa", "flashadamw")


def round_cases(bench: Bench, output: Path) -> list[Case]:
    """The round, most important cases first: what a deadline cuts off, a second call adds.

    The engine's and the kernels' tests, the kernels' speed, the memory promises, then peers and speed beside them.
    Without a CUDA device tiny shapes take the same way.
    """
    on_gpu = bench.device != "cpu"
    first, second, small = ("llama-3-8b", "qwen2.5-7b", "tinyllama") if on_gpu else ("tiny", "tiny-qwen", "tiny")
    tests, kernels = command_cases(bench, output)
    profiled = replace(bench, model=small, methods=("misa",), batch=2, steps=PROFILED_STEPS, timeout_s=90)
    peers = [memory_case(bench, first, method, steps=8, timeout_s=90) for method in MEMORY_PEERS]
    speed = replace(bench, batch=2, accumulation=1, inner_steps=10 if on_gpu else 4, timeout_s=60, data="random")
    cases = [
        tests,
        kernels,
        *memory_cases(bench, first),
        *resident_cases(bench),
        *peers[:3],
        *step_cases(replace(speed, model=first, steps=20 if on_gpu else 8), SPEED_8B, "speed "),
        *profile_cases(profiled, output, "profile "),
        *(case for case in memory_cases(bench, second) if case.kind != "longest"),
        *step_cases(replace(speed, model=small, steps=30 if on_gpu else 8), SPEED_1B, "speed "),
        *peers[3:],
    ]
    return list({case.name: case for case in cases}.values())  # on a CPU both speeds are of one shape


def memory_case(bench: Bench, shape: str, method: str, **own: Any) -> StepCase:
    """Peak memory of a method over whole steps with accumulation, data as random as the weights."""
    case = {"batch": 2, "length": bench.length, "steps": 12, "warm_up": 3, "inner_steps": 5, "timeout_s": 120, **own}
    if bench.device == "cpu":
        case |= {"steps": 4, "warm_up": 1, "inner_steps": 2}
    name = f"memory {shape} {case['batch']}x{case['length']} {method}"
    return make(StepCase, bench, name=name, shape=shape, method=method, accumulation=2, data="random", **case)


def memory_cases(bench: Bench, shape: str) -> list[Case]:
    """MISA on one shape: main case, 8-bit moments, longest sequence, a long sequence, many switches."""
    on_gpu = bench.device != "cpu"
    alone: dict[str, Any] = {"shape": shape, "batch": 1, "accumulation": 1, "timeout_s": 120}
    long, small = (8192, 256) if on_gpu else (4 * bench.length, 16)
    return [
        memory_case(bench, shape, "misa", timeline=True),
        memory_case(bench, shape, "misa-int8", timeline=True),
        make(
            LongestCase, bench, name=f"memory {shape} longest", length=long, inner_steps=10**6, misa=WORST_SET,
            length_step=256 if on_gpu else 64, longest=32768 if on_gpu else 256, **alone,
        ),
        memory_case(bench, shape, "misa", batch=1, length=long, steps=4, warm_up=2),
        make(
            SwitchCase, bench, name=f"memory {shape} switches", length=small, inner_steps=1,
            switches=200 if on_gpu else 20, **alone,
        ),
    ]  # fmt: skip


def resident_cases(bench: Bench) -> list[Case]:
    """8B in 12 GiB and 14B in 24 with random weights of the real shapes: a card's promise, in under 9 minutes.

    Steps with two switches among them, 8-bit moments, 1 x 2,048 tokens; the allocator gets the card less the context.
    """
    on_gpu = bench.device != "cpu"
    shapes = (("llama-3-8b", 12), ("qwen2.5-14b", 24)) if on_gpu else (("tiny", 12), ("tiny-qwen", 24))
    shared: dict[str, Any] = {
        "method": "misa-int8",
        "residents": "int8",
        "batch": 1,
        "data": "random",
        "timeout_s": 250,
    }
    shared |= {"steps": 8, "warm_up": 2, "inner_steps": 4, "checkpointing": True, "loss": "lean", "accumulation": 1}
    return [
        make(
            StepCase, bench, name=f"residents {shape} int8 in {gib} GiB", shape=shape,
            length=2048 if on_gpu else bench.length, limit_bytes=gib * GIB - CONTEXT_BYTES, **shared,
        )
        for shape, gib in shapes
    ]  # fmt: skip


def command_cases(bench: Bench, output: Path) -> list[CommandCase]:
    """The GPU's tests (files that need neither TRL nor datasets) and kernel benchmarks."""
    out, on_gpu = output.resolve(), bench.device != "cpu"
    # the engine's before the kernels': one says whether training is right, the others where it is not
    tests = sorted((str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*gpu.py")), reverse=True)
    sizes = [*(["--sizes", bench.sizes] if bench.sizes else []), *([] if on_gpu else ["--rounds", "2"])]

    def pytest(name: str, limit_s: int, *words: str) -> CommandCase:
        log = str(out / f"{name.replace(' ', '_')}.txt")
        return CommandCase(name=name, words=("-m", "pytest", "--durations=5", *words, "-q"), log=log, timeout_s=limit_s)

    benchmarks = ("bench/", "--benchmark-only", *sizes, f"--benchmark-json={out}/kernels.json")
    # the tests compile every variant of every kernel on a fresh machine, the benchmarks few and by then cached ones
    return [pytest("GPU tests", 240, *tests, "-m", "gpu"), pytest("kernels", 150, *benchmarks)]

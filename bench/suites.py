"""The cases of each suite of ``misa bench``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from misa_engine.bench.cases import Case, CommandCase, TrainingCase
from misa_engine.bench.limits import LongestCase, SwitchCase
from misa_engine.bench.loss import BaseModelCase, LossCase
from misa_engine.bench.presets import GIB, QUESTIONS, Bench
from misa_engine.bench.steps import StepCase

BASE_WEIGHTS = "base.safetensors"
#: A search keeps one active set: the plan's worst draw, or without a plan layer 0, so that every layer's input is kept.
WORST_SET = {"rule": "static", "static_weights": {"*.layers.0.*": 1e12}}

OneCase = TypeVar("OneCase", bound=TrainingCase)


def make(kind: Callable[..., OneCase], bench: Bench, **own: Any) -> OneCase:
    """A case with every setting that it shares with the run, ``own`` ones last."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    shared = {name: value for name, value in vars(bench).items() if name in names}
    case = kind(**{**shared, "limit_bytes": int(bench.vram_gib * GIB), **own})
    # what updates inside the backward pass cannot clip by the norm of all gradients, nor accumulate them
    return replace(case, max_grad_norm=None, accumulation=1) if case.method == "misa-backward" else case


def cases_of(bench: Bench, output: Path) -> list[Case]:
    """All cases of a run whose results go to ``output``, in their order."""
    if bench.suite == "round":
        return round_cases(bench, output)
    if bench.suite in QUESTIONS:
        return question_cases(bench)
    cases: list[Case] = []
    if bench.suite != "loss":
        cases += step_cases(bench)
    if bench.suite in ("loss", "all"):
        base = base_case(bench, output / BASE_WEIGHTS)
        cases += [base, *loss_cases(bench, base)]
    return cases


def step_cases(bench: Bench, prefix: str = "") -> list[Case]:
    """One case a method."""
    name = f"{prefix}{bench.model}"
    return [make(StepCase, bench, name=f"{name} {m}", shape=bench.model, method=m, phases=True) for m in bench.methods]


def base_case(bench: Bench, weights: Path) -> BaseModelCase:
    """The model from which all loss curves start: AdamW on all parameters."""
    return make(
        BaseModelCase,
        bench,
        name=f"{bench.loss_model} base",
        shape=bench.loss_model,
        method="adamw",
        batch=bench.loss_batch,
        accumulation=1,
        checkpointing=False,
        loss="plain",
        limit_bytes=0,
        steps=bench.base_steps,
        eval_every=bench.base_steps,
        lr=bench.base_lr,
        timeout_s=2 * bench.timeout_s,
        save_to=str(weights),
    )


def loss_cases(bench: Bench, base: BaseModelCase) -> list[Case]:
    """A case for each method, learning rate and seed, like the base model's but for what is told here."""
    shared = {entry.name: getattr(base, entry.name) for entry in fields(LossCase)}
    shared |= {"data": bench.loss_data, "steps": bench.loss_steps, "eval_every": -(-bench.loss_steps // 6)}
    shared |= {"start_from": base.save_to, "delta": bench.loss_delta, "timeout_s": bench.timeout_s}
    return [
        make(LossCase, bench, **{**shared, "name": f"{bench.loss_model} {method} lr {lr:g} seed {seed}",
             "method": method, "lr": lr, "seed": seed, "data_seed": seed})
        for method in bench.methods for lr in bench.lrs for seed in range(bench.seeds)
    ]  # fmt: skip


def question_cases(bench: Bench) -> list[Case]:
    """A case for each setting of a question and seed, from random weights."""
    shared: dict[str, Any] = {
        "shape": bench.loss_model, "batch": bench.loss_batch, "lr": bench.lrs[-1], "schedule_warm_up": 20,
        "steps": bench.loss_steps, "eval_every": bench.loss_steps, "delta": bench.loss_delta, "loss": "plain",
    }  # fmt: skip
    return [
        make(LossCase, bench, name=f"{setting}, seed {seed}", seed=seed, misa=options, **shared)
        for setting, options in QUESTIONS[bench.suite].items()
        for seed in range(bench.seeds)
    ]


# ---- the round ----

MEMORY_PEERS = ("lora", "adamw8bit", "badam", "adamw", "misa-backward", "lisa", "uniform")
SPEED_8B = ("misa", "misa-int8", "lora", "badam", "lisa", "unfused-misa", "adamw8bit")
SPEED_1B = ("misa", "misa-int8", "adamw8bit", "lora", "badam", "lisa", "unfused-misa", "flashadamw")


def round_cases(bench: Bench, output: Path) -> list[Case]:
    """The round, most important cases first: what a deadline cuts off is what is only nice to have.

    Without a CUDA device tiny shapes take the same way.
    """
    on_gpu = bench.device != "cpu"
    first, second, speed_8b, speed_1b = (
        ("llama-3-8b", "qwen2.5-7b", "llama-3-8b", "tinyllama") if on_gpu else ("tiny", "tiny-qwen", "tiny", "tiny")
    )
    main = memory_cases(bench, first)
    peers = [_memory(bench, first, method, steps=8, timeout_s=90) for method in MEMORY_PEERS]
    speed = replace(bench, batch=2, accumulation=1, inner_steps=10 if on_gpu else 4, timeout_s=60, data="random")
    eight = step_cases(replace(speed, model=speed_8b, methods=SPEED_8B, steps=20 if on_gpu else 8), "speed ")
    one = step_cases(replace(speed, model=speed_1b, methods=SPEED_1B, steps=30 if on_gpu else 8), "speed ")
    if not on_gpu:  # one shape for both
        one = [case for case in one if case.name not in {other.name for other in eight}]
    commands = {case.name: case for case in command_cases(bench, output)}
    return [
        commands["GPU tests"],
        *main,
        commands["kernels"],
        *peers[:3],
        *eight,
        commands["profile"],
        *memory_cases(bench, second, longest=False),
        *one,
        *peers[3:],
    ]


def _memory(bench: Bench, shape: str, method: str, **own: Any) -> StepCase:
    """Peak memory of a method over whole steps with accumulation, data as random as the weights."""
    length = own.get("length", bench.length)
    name = f"memory {shape} {own.get('batch', 2)}x{length} {method}"
    shared: dict[str, Any] = {"steps": 12, "warm_up": 3, "inner_steps": 5, "batch": 2, "accumulation": 2}
    if bench.device == "cpu":
        shared, own = {**shared, "warm_up": 1, "inner_steps": 2}, {**own, "steps": 4}
    shared |= {"timeout_s": 120, "data": "random"}
    return make(StepCase, bench, name=name, shape=shape, method=method, **{**shared, **own})


def memory_cases(bench: Bench, shape: str, longest: bool = True) -> list[Case]:
    """MISA on one shape: main case, 8-bit moments, longest sequence, a long sequence, many switches."""
    on_gpu = bench.device != "cpu"
    alone: dict[str, Any] = {"shape": shape, "batch": 1, "accumulation": 1, "timeout_s": 120}
    long, small = (8192, 256) if on_gpu else (4 * bench.length, 16)
    search = make(
        LongestCase, bench, name=f"memory {shape} longest", length=long, inner_steps=10**6, misa=WORST_SET,
        length_step=256 if on_gpu else 64, longest=32768 if on_gpu else 256, **alone,
    )  # fmt: skip
    switching = make(
        SwitchCase, bench, name=f"memory {shape} switches", length=small, inner_steps=1,
        switches=200 if on_gpu else 20, **alone,
    )  # fmt: skip
    return [
        _memory(bench, shape, "misa", timeline=True),
        _memory(bench, shape, "misa-int8", timeline=True),
        *([search] if longest else []),
        _memory(bench, shape, "misa", batch=1, length=long, steps=4, warm_up=2),
        switching,
    ]


def command_cases(bench: Bench, output: Path) -> list[CommandCase]:
    """The GPU's tests (files that need neither TRL nor datasets), kernel benchmarks and a profile."""
    out = output.resolve()
    on_gpu = bench.device != "cpu"
    tests = sorted(str(path.relative_to(path.parents[1])) for path in _root().glob("tests/test_*gpu.py"))
    kernels = ["bench/", "--benchmark-only", *(["--sizes", bench.sizes] if bench.sizes else [])]
    kernels += [] if on_gpu else ["--rounds", "2"]
    profiled = ["--model", "tinyllama" if on_gpu else "tiny", "--length", str(bench.length), "--batch", "2"]
    commands: dict[str, tuple[int, list[str]]] = {
        "GPU tests": (150, ["pytest", *tests, "-m", "gpu", "-q"]),
        "kernels": (150, ["pytest", *kernels, "-q", f"--benchmark-json={out / 'kernels.json'}"]),
        "profile": (90, ["misa_engine", "profile", *profiled, "--device", bench.device, "--output", f"{out}/profile"]),
    }
    return [
        CommandCase(name=name, words=("-m", *words), log=str(out / f"{name.replace(' ', '_')}.txt"), timeout_s=limit)
        for name, (limit, words) in commands.items()
    ]


def _root() -> Path:
    return Path(__file__).resolve().parents[1]

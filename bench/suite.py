"""``misa bench``: which cases a comparison consists of, and how their rows become one result a method.

memory, throughput    one process a method: step time, phases, peak memory (and, for MISA, its own overhead)
loss                  a base model trained once, then one process a method, learning rate and seed from its weights
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench.baselines import BASELINES
from misa_engine.bench.cases import Case, empty_row
from misa_engine.bench.measure import environment
from misa_engine.bench.processes import make_processes

SUITES = ("memory", "throughput", "loss", "all")
#: What every comparison should hold, in the order of its tables.
METHODS = ("adamw", "lora", "galore", "badam", "lisa", "uniform", "unfused-misa", "misa", "misa-int8")
GIB = 1 << 30


@dataclass(frozen=True)
class Bench:
    """One comparison: everything that all methods share."""

    suite: str = "all"
    model: str = "llama-90m"
    """Of memory and throughput: random weights of a configuration."""
    loss_model: str = "llama-2m"
    """Of the loss curves, trained for real."""
    methods: tuple[str, ...] = METHODS
    device: str = "cpu"
    vram_gib: float = 0.0
    """What the allocator may reserve (CUDA); 0 is the whole card."""
    batch: int = 4
    length: int = 128
    accumulation: int = 1
    checkpointing: bool = False
    loss: str = "plain"
    """How the loss is computed: plain or lean (see ``workload.make_loss``)."""
    delta: float = 0.03
    inner_steps: int = 10
    """Steps between two switches, for every method that switches; a timed run has two switches at least."""
    max_grad_norm: float = 1.0
    warm_up: int = 3
    steps: int = 20
    data: str = "stdlib"
    """Text of memory and throughput, and of the base model."""
    loss_data: str = "arithmetic"
    """What the loss curves learn, starting from the base model; another kind of text than it was trained on."""
    loss_steps: int = 80
    loss_batch: int = 8
    loss_delta: float = 0.1
    """δ of the loss curves: a small model's largest matrix is 5% of it."""
    base_steps: int = 150
    base_lr: float = 2e-3
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates tried; each method counts with the one at which its held-out loss ends lowest."""
    seeds: int = 1
    timeout_s: int = 300


#: Named settings for ``--preset``; options given beside them win.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "quick": {
        "device": "cpu", "model": "tiny", "loss_model": "tiny", "length": 64, "loss_steps": 10, "base_steps": 5,
        "lrs": (1e-3,), "delta": 0.1, "inner_steps": 4, "steps": 8, "warm_up": 1, "loss_batch": 2,
    },
    "gpu": {
        "device": "cuda:0", "model": "tinyllama", "loss_model": "llama-90m", "batch": 2, "length": 2048,
        "checkpointing": True, "loss": "lean", "inner_steps": 10, "steps": 30, "accumulation": 1, "loss_steps": 400,
        "base_steps": 400, "loss_batch": 32, "vram_gib": 24564 / 1024,
    },
    "gpu-8b": {
        "device": "cuda:0", "suite": "throughput", "model": "llama-3-8b", "batch": 2, "length": 2048,
        "checkpointing": True, "loss": "lean", "inner_steps": 10, "steps": 20, "vram_gib": 24564 / 1024,
    },
}  # fmt: skip


def throughput_cases(bench: Bench) -> list[Case]:
    """One case a method."""
    return [
        _adapted(
            Case(
                f"{bench.model} {name}",
                "throughput",
                bench.model,
                method=name,
                batch=bench.batch,
                length=bench.length,
                accumulation=bench.accumulation,
                delta=bench.delta,
                inner_steps=bench.inner_steps,
                max_grad_norm=bench.max_grad_norm,
                checkpointing=bench.checkpointing,
                steps=bench.steps,
                warm_up=bench.warm_up,
                limit_bytes=int(bench.vram_gib * GIB),
                device=bench.device,
                timeout_s=bench.timeout_s,
                loss=bench.loss,
                data=bench.data,
            )
        )
        for name in bench.methods
    ]


def base_case(bench: Bench, weights: Path) -> Case:
    """The model from which all loss curves start: AdamW on all parameters."""
    return Case(
        f"{bench.loss_model} base",
        "pretrain",
        bench.loss_model,
        method="adamw",
        batch=bench.loss_batch,
        length=bench.length,
        accumulation=1,
        checkpointing=False,
        steps=bench.base_steps,
        eval_every=bench.base_steps,
        device=bench.device,
        timeout_s=2 * bench.timeout_s,
        loss="plain",
        data=bench.data,
        lr=bench.base_lr,
        save_to=str(weights),
    )


def loss_cases(bench: Bench, weights: Path) -> list[Case]:
    """A case for each method, learning rate and seed."""
    return [
        _adapted(
            replace(
                base_case(bench, weights),
                name=f"{bench.loss_model} {name} lr {lr:g} seed {seed}",
                kind="loss",
                method=name,
                data=bench.loss_data,
                data_seed=seed,
                steps=bench.loss_steps,
                eval_every=max(1, bench.loss_steps // 6),
                delta=bench.loss_delta,
                inner_steps=bench.inner_steps,
                max_grad_norm=bench.max_grad_norm,
                start_from=str(weights),
                save_to=None,
                lr=lr,
                seed=seed,
                timeout_s=bench.timeout_s,
            )
        )
        for name in bench.methods
        for lr in bench.lrs
        for seed in range(bench.seeds)
    ]


def _adapted(case: Case) -> Case:
    """What updates inside the backward pass cannot clip by the norm of all gradients."""
    return replace(case, max_grad_norm=None) if case.method == "misa-backward" else case


# ---- running ----


def run_bench(bench: Bench, output: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run everything; ``output``/results.json is complete after each case."""
    output.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "environment": environment(torch.device(bench.device)),
        "settings": asdict(bench),
        "results": [],
        "cases": [],
    }
    # On a CPU, peak memory is the process's: a fork would begin with its parent's. Losses do not care.
    fresh = make_processes("fresh" if bench.device == "cpu" else "auto", bench.device)
    forked = make_processes("auto", bench.device) if bench.suite in ("loss", "all") else fresh
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "base.safetensors"
        cases = throughput_cases(bench) if bench.suite != "loss" else []
        if bench.suite in ("loss", "all"):
            cases += [base_case(bench, weights), *loss_cases(bench, weights)]
        hopeless: dict[str, str] = {}
        for number, case in enumerate(cases, start=1):
            began = time.monotonic()
            if case.kind == "loss" and (case.method in hopeless or not weights.exists()):
                row = empty_row(case, hopeless.get(case.method, "not run: the base model could not be trained"))
            else:
                row = (fresh if case.kind == "throughput" else forked).run(case, case.timeout_s)
            row["case_s"] = time.monotonic() - began
            if row["status"].startswith(("missing", "unsupported")):
                hopeless[case.method] = row["status"]
            for name in ("start_from", "save_to"):  # a temporary folder's path says nothing to a reader
                row["settings"][name] = Path(row["settings"][name]).name if row["settings"][name] else None
            document["cases"].append(row)
            document["results"] = merge(bench, document["cases"])
            write(document, output)
            say(f"[{number}/{len(cases)}] {row['case_s']:5.1f} s  {case.name}: {row['status']}")
    fresh.close()
    forked.close()
    return document


def merge(bench: Bench, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a method: its throughput row, and its loss at the best of the learning rates."""
    results = []
    for name in bench.methods:
        own = [row for row in rows if row["method"] == name and row["kind"] in ("throughput", "loss")]
        if not own:
            continue
        timed = next((row for row in own if row["kind"] == "throughput"), None)
        result = dict(timed or empty_row(_case_of(own[0]), own[0]["status"]))
        result["summary"] = BASELINES[name].summary
        result |= best_loss([row for row in own if row["kind"] == "loss"])
        results.append(result)
    return results


def best_loss(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Held-out loss and curve at the learning rate whose runs end lowest (median of the seeds)."""
    by_lr: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            by_lr.setdefault(row["settings"]["lr"], []).append(row)
    if not by_lr:
        return {"heldout_loss": None, "loss_status": rows[0]["status"]} if rows else {}
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


def _case_of(row: dict[str, Any]) -> Case:
    return Case(**row["settings"])


def write(document: dict[str, Any], output: Path) -> Path:
    """Write results.json in one go, so that an interrupted run leaves a whole file."""
    path = output / "results.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(part, path)
    return path

"""One case of the memory round: what a fresh process measures. ``run_case`` reports what it has as it goes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench import compare
from misa_engine.bench.baselines import BASELINES, Method, Settings, Unavailable, build
from misa_engine.bench.measure import (
    held_bytes,
    is_out_of_memory,
    limit_memory,
    memory_counters,
    release_cache,
    spread,
    synchronize,
)
from misa_engine.bench.timeline import record_timeline
from misa_engine.bench.workload import build_model, load_weights, make_loss, token_batches

CPU_NOTE = "cpu: no memory claim"
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """What to measure, and under which limit."""

    name: str
    """Of the row, unique in a round."""
    kind: str
    """A key of KINDS: train, longest or switches (the memory round); throughput, loss or pretrain (misa bench)."""
    shape: str
    method: str = "misa"
    batch: int = 2
    length: int = 2048
    accumulation: int = 2
    delta: float = 0.03
    inner_steps: int = 5
    max_grad_norm: float | None = 1.0
    checkpointing: bool = True
    misa: dict[str, Any] = field(default_factory=dict)
    """Further options of MisaConfig."""
    steps: int = 12
    """Timed steps (train) or switches (switches)."""
    warm_up: int = 3
    timeline: bool = False
    """Record the allocator for two steps afterwards."""
    limit_bytes: int = 0
    """What the allocator may reserve; 0 is the whole card."""
    reserve_bytes: int = 0
    """longest: kept free in a first search, as the plan does."""
    length_step: int = 256
    longest: int = 32768
    """longest: no more tokens than this are tried."""
    guess: int = 0
    """longest: where to begin; 0 is ``length``."""
    device: str = "cuda:0"
    timeout_s: int = 120
    snapshot: str | None = None
    """Where the raw allocator snapshot goes; None keeps none."""
    loss: str = "lean"
    """lean: in chunks, or Liger's; plain: the model's own, as every method computes it in a small model."""
    lr: float = Settings.lr
    seed: int = 0
    """Of the weights and of the method's own choices."""
    data: str = "stdlib"
    """throughput, loss: what is trained on (see ``corpus``)."""
    data_seed: int = 0
    eval_every: int = 20
    """loss: steps between two points of the curve."""
    start_from: str | None = None
    """A safetensors file with the weights to begin with."""
    save_to: str | None = None
    """pretrain: where the weights go."""

    @property
    def settings(self) -> Settings:
        """What the method gets of it."""
        return Settings(
            lr=self.lr,
            seed=self.seed,
            delta=self.delta,
            inner_steps=self.inner_steps,
            max_grad_norm=self.max_grad_norm,
            accumulation=self.accumulation,
            misa=self.misa,
        )


def empty_row(case: Case, status: str) -> dict[str, Any]:
    """A row with every field that a result has, and no result yet."""
    return {
        "case": case.name,
        "kind": case.kind,
        "shape": case.shape,
        "method": case.method,
        "status": status,
        "note": CPU_NOTE if case.device == "cpu" else None,
        "settings": asdict(case),
        "step_time_s": None,
        "tokens_per_s": None,
        "peak_bytes": None,
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
        "process_bytes": None,
        "device_used_bytes": None,
        "trainable_parameters": None,
        "heldout_loss": None,
    }


def run_case(case: Case, report: Report) -> None:
    """Measure and report the row, also when the method is missing, memory runs out or something fails.

    Args:
        case: what to measure.
        report: takes the row; called as soon as there is something, and at the end.
    """
    device = torch.device(case.device)
    row = empty_row(case, "started")
    report(row)
    try:
        status = BASELINES[case.method].missing()  # before seconds go into a model
        if status is not None:
            raise Unavailable(status)
        limit_memory(device, case.limit_bytes)
        started = time.perf_counter()
        model = build_model(case.shape, device, checkpointing=case.checkpointing, seed=case.seed)
        if case.start_from:
            load_weights(model, case.start_from)
        synchronize(device)
        row["build_s"] = time.perf_counter() - started
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["weights_bytes"] = sum(p.nbytes for p in model.parameters())
        row["loss_kind"], loss = make_loss(model, device, case.loss)
        method = build(case.method, model, loss, case.settings)
        row["trainable_parameters"] = method.trainable_parameters
        report(row)
        KINDS[case.kind](case, method, device, row, report)
        row["status"] = "ok"
    except Unavailable as error:
        row["status"] = str(error)
    except Exception as error:
        row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if is_out_of_memory(error):
            row["status"], row["error"] = "out of memory", str(error)
            row |= memory_counters(device)
    report(row)


# ---- kinds ----


def _train(case: Case, method: Method, device: torch.device, row: dict[str, Any], report: Report) -> None:
    """Step time, tokens per second and peak memory over the whole life of the process, model building included."""
    batches = token_batches(method.model, case.batch, case.length, device)
    times: list[float] = []
    switches_before = 0
    for number in range(case.warm_up + case.steps):
        micro_batches = list(islice(batches, case.accumulation))
        if number == case.warm_up:
            switches_before = method.switches()
        synchronize(device)
        started = time.perf_counter()
        loss = method.step(micro_batches)
        synchronize(device)
        if number >= case.warm_up:
            times.append(time.perf_counter() - started)
    row |= memory_counters(device)
    row["step_time_s"] = spread(times)
    row["tokens_per_s"] = case.batch * case.length * case.accumulation / row["step_time_s"]["median"]
    row["timed_steps"], row["timed_switches"] = len(times), method.switches() - switches_before
    row["last_loss"] = float(loss)
    row["trainable_parameters"] = method.trainable_parameters
    row["optimizer_bytes"] = method.optimizer_bytes()
    report(row)
    if case.timeline:
        snapshot = Path(case.snapshot) if case.snapshot else None
        row["timeline"] = record_timeline(method, batches, case.accumulation, device, row["weights_bytes"], snapshot)
        report(row)


def _switches(case: Case, method: Method, device: torch.device, row: dict[str, Any], report: Report) -> None:
    """Memory held after each of many switches.

    Active sets differ in what their backward pass stores, which the allocator's cache follows. Two steps at four times
    the length come first, so that what grows afterwards grows because of switching.
    """
    for ids in islice(token_batches(method.model, case.batch, 4 * case.length, device), 2):
        method.step([ids])
    batches = token_batches(method.model, case.batch, case.length, device)
    held: list[tuple[int, int]] = []
    times: list[float] = []
    while len(held) < case.steps:
        before = method.switches()
        started = time.perf_counter()
        method.step(list(islice(batches, case.accumulation)))
        synchronize(device)
        times.append(time.perf_counter() - started)
        if method.switches() > before:
            held.append(held_bytes(device))
    row |= memory_counters(device)
    after_second = held[min(1, len(held) - 1)]
    row["switches"] = len(held)
    row["growth_allocated_bytes"] = max(allocated for allocated, _ in held[1:]) - after_second[0]
    row["growth_reserved_bytes"] = max(reserved for _, reserved in held[1:]) - after_second[1]
    row["held_bytes"] = [list(pair) for pair in held]
    row["step_time_s"] = spread(times)
    row["optimizer_bytes"] = method.optimizer_bytes()


def _longest(case: Case, method: Method, device: torch.device, row: dict[str, Any], report: Report) -> None:
    """The largest length that runs, first with the plan's reserve kept free, then with all of the limit."""
    attempts: list[dict[str, Any]] = []

    def runs(length: int) -> bool:
        started = time.perf_counter()
        release_cache(device)
        fits = _fits(method, case, length, device)
        reserved = held_bytes(device)[1]
        attempts.append({"length": length, "runs": fits, "s": time.perf_counter() - started, "reserved": reserved})
        row["attempts"] = attempts
        report(row)
        return fits

    guess = case.guess or case.length
    _fits(method, case, case.length_step, device)  # kernels are compiled at the first step, which takes memory
    if case.reserve_bytes:
        limit_memory(device, case.limit_bytes - case.reserve_bytes)
        found = largest(runs, case.length_step, case.longest, case.length_step, guess)
        row["longest_with_reserve"] = guess = found
        limit_memory(device, case.limit_bytes)
        report(row)
    row["longest"] = largest(runs, case.length_step, case.longest, case.length_step, guess)
    row |= memory_counters(device)
    row["optimizer_bytes"] = method.optimizer_bytes()


def _fits(method: Method, case: Case, length: int, device: torch.device) -> bool:
    """Whether two steps of one batch of ``length`` tokens run; leaves no gradient and no activation behind."""
    try:
        for ids in islice(token_batches(method.model, case.batch, length, device), 2):
            method.step([ids] * case.accumulation)
        synchronize(device)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    method.forget_gradients()  # after the except block: the exception's frames held the activations
    gc.collect()
    return False


def largest(runs: Callable[[int], bool], low: int, high: int, step: int, guess: int) -> int:
    """The largest multiple of ``step`` in [low, high] for which ``runs`` is true, 0 when there is none.

    ``runs`` is true up to some length and false beyond. Strides double away from ``guess`` until the border lies
    between two tries, then the interval is halved: about 2·log2(distance/step) tries.
    """
    first, last = -(-low // step), high // step
    at = min(max(guess // step, first), last)
    good, bad = first - 1, last + 1
    stride = 1
    while bad - good > 1:
        if runs(at * step):
            good = at
            at = at + stride if bad == last + 1 else (good + bad) // 2
        else:
            bad = at
            at = at - stride if good == first - 1 else (good + bad) // 2
        stride *= 2
        at = min(max(at, good + 1), bad - 1)
    return good * step if good >= first else 0


KINDS: dict[str, Callable[[Case, Method, torch.device, dict[str, Any], Report], None]] = {
    "train": _train,
    "longest": _longest,
    "switches": _switches,
    "throughput": compare.throughput,
    "loss": compare.held_out_loss,
    "pretrain": compare.pretrain,
}

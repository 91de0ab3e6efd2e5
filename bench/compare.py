"""What one process measures of one method for ``misa bench``: step time by phase, memory, overhead, held-out loss."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from misa_engine import MISA
from misa_engine.bench.baselines import Method
from misa_engine.bench.corpus import batches, rows
from misa_engine.bench.ledger import overhead
from misa_engine.bench.measure import memory_counters, spread, synchronize

if TYPE_CHECKING:
    from misa_engine.bench.cases import Case

Report = Callable[[dict[str, Any]], None]
#: Rows of held-out text behind each point of a loss curve.
EVALUATION_ROWS = 64


class PhaseClock:
    """Adds up the time between marks, the device drained at each; the step as a whole is timed without it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._name, self._since = "", 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, phase: str) -> None:
        """Phase begins; the one before ends."""
        synchronize(self._device)
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] += now - self._since
        self._name, self._since = phase, now

    def end(self) -> dict[str, float]:
        """The last phase ends."""
        self("")
        return dict(self.seconds)


def throughput(case: Case, method: Method, device: torch.device, row: dict[str, Any], report: Report) -> None:
    """Step time, tokens per second, phases, peak memory, and for MISA the time over a step without any optimizer."""
    stream = _stream(case, device)
    times, at_switch, phases = [], [], []
    for number in range(case.warm_up + case.steps):
        micro_batches = list(islice(stream, case.accumulation))
        before, clock = method.switches(), PhaseClock(device)
        mark = clock if device.type == "cpu" else _unmarked  # on a GPU each mark would drain the device
        seconds = _timed(lambda batch=micro_batches, mark=mark: method.step(batch, mark), device)
        if number >= case.warm_up:
            times.append(seconds)
            at_switch.append(method.switches() > before)
            phases.append(clock.end())
    row |= memory_counters(device)
    row["step_time_s"] = spread(times)
    row["tokens_per_s"] = case.batch * case.length * case.accumulation / row["step_time_s"]["median"]
    row["timed_steps"], row["timed_switches"] = len(times), sum(at_switch)
    row["trainable_parameters"] = method.trainable_parameters
    row["optimizer_bytes"] = method.optimizer_bytes()
    report(row)
    if device.type != "cpu":
        at_switch, phases = _marked_steps(case, method, device, stream)
    row["phases_s"] = by_phase(phases, at_switch)
    if isinstance(method.optimizer, MISA) and case.method.startswith("misa"):
        row["overhead"] = overhead(method.model, method.loss, method.optimizer, stream, max(10, case.inner_steps))
    report(row)


def _unmarked(phase: str) -> None:
    """Nothing happens at a mark."""


def _marked_steps(
    case: Case, method: Method, device: torch.device, stream: Iterator[Tensor]
) -> tuple[list[bool], list[dict[str, float]]]:
    """Further steps with the device drained at every mark: whether each switched, and its seconds by phase."""
    switched: list[bool] = []
    found: list[dict[str, float]] = []
    for _ in range(case.inner_steps + 1):
        clock, before = PhaseClock(device), method.switches()
        method.step(list(islice(stream, case.accumulation)), clock)
        found.append(clock.end())
        switched.append(method.switches() > before)
    return switched, found


def by_phase(found: list[dict[str, float]], switched: list[bool]) -> dict[str, float]:
    """Median seconds of each phase of a step without a switch, and what a switch takes on top."""
    plain = [phases for phases, at_switch in zip(found, switched, strict=True) if not at_switch] or found
    result = {name: statistics.median(phases.get(name, 0.0) for phases in plain) for name in plain[0]}
    switches = [phases.get("step", 0.0) for phases, at_switch in zip(found, switched, strict=True) if at_switch]
    result["switch"] = max(0.0, statistics.median(switches) - result.get("step", 0.0)) if switches else 0.0
    return result


def held_out_loss(case: Case, method: Method, device: torch.device, row: dict[str, Any], report: Report) -> None:
    """Held-out loss against tokens and against the time spent in training steps."""
    train, held_out = rows(case.data, case.length, case.data_seed)
    stream = batches(train, case.batch, device)
    curve: list[dict[str, float]] = []
    spent = 0.0
    per_step = case.batch * case.length * case.accumulation

    def note(step: int) -> None:
        value = evaluate(method, held_out[:EVALUATION_ROWS], case.batch, device)
        curve.append({"step": step, "tokens": step * per_step, "seconds": spent, "heldout_loss": value})
        row["curve"] = curve
        report(row)

    note(0)
    for step in range(1, case.steps + 1):
        micro_batches = list(islice(stream, case.accumulation))
        spent += _timed(lambda batch=micro_batches: method.step(batch), device)
        if step % case.eval_every == 0 or step == case.steps:
            note(step)
    row["heldout_loss"] = curve[-1]["heldout_loss"]
    row["trainable_parameters"] = method.trainable_parameters


def pretrain(case: Case, method: Method, device: torch.device, row: dict[str, Any], report: Report) -> None:
    """Train a base model and save its weights, from which all methods then start."""
    from safetensors.torch import save_file

    held_out_loss(case, method, device, row, report)
    assert case.save_to is not None
    weights = {name: p.detach().cpu().contiguous() for name, p in method.model.named_parameters()}
    save_file(weights, case.save_to)


@torch.no_grad()
def evaluate(method: Method, data: Tensor, size: int, device: torch.device) -> float:
    """Mean next-token loss over rows of token ids."""
    method.model.eval()
    losses = [float(method.loss(part.to(device))) * len(part) for part in data.split(size)]
    method.model.train()
    return sum(losses) / len(data)


def _stream(case: Case, device: torch.device) -> Iterator[Tensor]:
    train, _ = rows(case.data, case.length, case.data_seed)
    return batches(train, case.batch, device)


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started

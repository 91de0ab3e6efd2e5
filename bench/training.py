"""The kinds of training cases: timed steps, the longest sequence that trains, many switches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from misa_engine.bench.cases import Report, Row, TrainingCase
from misa_engine.bench.checks import reserve_bytes
from misa_engine.bench.ledger import StepTimes, overhead, time_step
from misa_engine.bench.measure import (
    held_bytes,
    is_out_of_memory,
    limit_memory,
    memory_counters,
    release_cache,
    spread,
    synchronize,
)
from misa_engine.bench.method import Method
from misa_engine.bench.named import file_name
from misa_engine.bench.profiling import profile_method
from misa_engine.bench.timeline import record_timeline
from misa_engine.bench.workload import batches, rows, token_batches

# ---- time and memory ----

#: The phases that ``Method.step`` marks, and no others: clocks around each gradient would slow a step down.
STEP_PHASES = ("forward", "backward", "clip", "step")


@dataclass(frozen=True, kw_only=True)
class StepCase(TrainingCase):
    """Time and memory over the whole life of the process, model building included."""

    kind: ClassVar[str] = "steps"
    steps: int = 12
    """Timed steps."""
    warm_up: int = 3
    data: str = "random"
    """random tokens, or what ``workload.rows`` knows."""
    timeline: bool = False
    """Record the allocator for two steps afterwards."""
    folder: str = ""
    """Where the trace and the memory snapshot of a profile go; empty profiles nothing."""

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Steps first; what slows them down afterwards."""
        stream = self.stream(method)
        on_cpu = device.type == "cpu"
        times = self._steps(method, stream, self.warm_up + self.steps, marked=on_cpu)[self.warm_up :]
        row |= memory_counters(device)
        row["step_time_s"] = spread([one.seconds for one in times])
        row["tokens_per_s"] = self.batch * self.length * self.accumulation / row["step_time_s"]["median"]
        row["timed_steps"], row["timed_switches"] = len(times), sum(one.switched for one in times)
        row["optimizer_bytes"] = method.optimizer_bytes()
        report(row)
        if self.phases:
            if not on_cpu:  # each mark drains the device, so these are further steps
                times = self._steps(method, stream, self.inner_steps + 1, marked=True)
            row["phases_s"] = by_phase(times)
            if method.floor is not None:
                row["overhead"] = overhead(method, stream, max(10, self.inner_steps), self.inner_steps)
            report(row)
        folder = Path(self.folder) if self.folder else None
        if folder:
            row |= profile_method(
                method, stream, self.inner_steps, folder / file_name(f"trace_{self.method}", ".json.gz")
            )
        if self.timeline:
            snapshot = folder / file_name(f"memory_{self.method}", ".pickle") if folder else None
            row["timeline"] = record_timeline(method, stream, device, row["weights_bytes"], snapshot)

    def stream(self, method: Method) -> Iterator[Tensor]:
        """Endless micro-batches of token ids."""
        device = torch.device(self.device)
        if self.data == "random":
            return token_batches(method.model, self.batch, self.length, device)
        return batches(rows(self.data, self.length)[0], self.batch, device)

    def _steps(self, method: Method, stream: Iterator[Tensor], count: int, *, marked: bool) -> list[StepTimes]:
        """Times of ``count`` steps, by phase where ``marked``."""
        phases = STEP_PHASES if marked else ()
        return [time_step(method, list(islice(stream, self.accumulation)), phases) for _ in range(count)]


def by_phase(times: Sequence[StepTimes]) -> dict[str, float]:
    """Median seconds of each phase of a step without a switch, and what a switch takes on top."""
    plain = [one.phases for one in times if not one.switched] or [one.phases for one in times]
    result = {name: statistics.median(phases.get(name, 0.0) for phases in plain) for name in plain[0]}
    switches = [one.phases.get("step", 0.0) for one in times if one.switched]
    result["switch"] = max(0.0, statistics.median(switches) - result.get("step", 0.0)) if switches else 0.0
    return result


# ---- memory at its limits ----


@dataclass(frozen=True, kw_only=True)
class SwitchCase(TrainingCase):
    """Memory held after each of many switches."""

    kind: ClassVar[str] = "switches"
    switches: int = 200

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Step until there were enough switches.

        Active sets differ in what their backward pass stores, which the allocator's cache follows. Two steps at four
        times the length come first, so that what grows afterwards grows because of switching.
        """
        for ids in islice(token_batches(method.model, self.batch, 4 * self.length, device), 2):
            method.step([ids])
        stream = token_batches(method.model, self.batch, self.length, device)
        held: list[tuple[int, int]] = []
        times: list[StepTimes] = []
        while len(held) < self.switches:
            times.append(time_step(method, list(islice(stream, self.accumulation))))
            if times[-1].switched:
                held.append(held_bytes(device))
        row |= memory_counters(device)
        after_second = held[min(1, len(held) - 1)]
        row["switches"] = len(held)
        row["growth_allocated_bytes"] = max(allocated for allocated, _ in held[1:]) - after_second[0]
        row["growth_reserved_bytes"] = max(reserved for _, reserved in held[1:]) - after_second[1]
        row["held_bytes"] = [list(pair) for pair in held]
        row["step_time_s"] = spread([one.seconds for one in times])
        row["optimizer_bytes"] = method.optimizer_bytes()


@dataclass(frozen=True, kw_only=True)
class LongestCase(TrainingCase):
    """The largest length that runs, first with the plan's reserve kept free, then with all of the limit."""

    kind: ClassVar[str] = "longest"
    length_step: int = 256
    longest: int = 32768
    """No more tokens than this are tried."""
    guess: int = 0
    """Where to begin; 0 is ``length``."""
    reserve_bytes: int = 0
    """Kept free in a first search, as the plan does."""

    def as_planned(self, plan: Mapping[str, Any]) -> LongestCase:
        """The search as its plan sees it: the same worst draw and reserve, begun at the length that it predicts."""
        if plan["status"] != "ok":
            return self
        case = replace(self, misa={**self.misa, "static_weights": dict.fromkeys(plan["worst_draw"], 1e12)})
        if not case.limit_bytes:
            return case
        guess = plan["max_tokens_per_micro_batch"] // case.batch
        return replace(case, guess=guess, reserve_bytes=reserve_bytes(plan))

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Search once, or twice where something is to be kept free."""
        attempts: list[dict[str, Any]] = []

        def runs(length: int) -> bool:
            started = time.perf_counter()
            release_cache(device)
            fits = self._fits(method, length, device)
            reserved = held_bytes(device)[1]
            attempts.append({"length": length, "runs": fits, "s": time.perf_counter() - started, "reserved": reserved})
            row["attempts"] = attempts
            report(row)
            return fits

        guess = self.guess or self.length
        self._fits(method, self.length_step, device)  # kernels are compiled at the first step, which takes memory
        if self.reserve_bytes:
            limit_memory(device, self.limit_bytes - self.reserve_bytes)
            guess = largest(runs, self.length_step, self.longest, self.length_step, guess)
            row["longest_with_reserve"] = guess
            limit_memory(device, self.limit_bytes)
            report(row)
        row["longest"] = largest(runs, self.length_step, self.longest, self.length_step, guess)
        row |= memory_counters(device)
        row["optimizer_bytes"] = method.optimizer_bytes()

    def _fits(self, method: Method, length: int, device: torch.device) -> bool:
        """Whether two steps of one batch of ``length`` tokens run; leaves no gradient and no activation behind."""
        try:
            for ids in islice(token_batches(method.model, self.batch, length, device), 2):
                method.step([ids] * self.accumulation)
            synchronize(device)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        method.model.zero_grad(set_to_none=True)  # after the except block: the exception's frames held the activations
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

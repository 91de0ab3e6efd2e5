"""Timed steps: step time, tokens per second, peak memory, phases, MISA's own overhead, memory over two steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from misa_engine.bench.cases import Report, Row, TrainingCase
from misa_engine.bench.corpus import batches, rows
from misa_engine.bench.ledger import Stopwatch, overhead
from misa_engine.bench.measure import memory_counters, spread, timed
from misa_engine.bench.method import Method
from misa_engine.bench.profiling import profile_method
from misa_engine.bench.timeline import record_timeline
from misa_engine.bench.workload import token_batches
from misa_engine.engine.marks import observed

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
    """random tokens, or what ``corpus.rows`` knows."""
    phases: bool = False
    """Time by phase, and for MISA the ledger of its own overhead."""
    timeline: bool = False
    """Record the allocator for two steps afterwards."""
    folder: str = ""
    """Where the trace and the memory snapshot of a profile go; empty profiles nothing."""

    @property
    def needs_floor(self) -> bool:
        """For the ledger of MISA's own overhead."""
        return self.phases and self.method.startswith("misa")

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Steps first; what slows them down afterwards."""
        stream = self.stream(method)
        on_cpu = device.type == "cpu"
        times, switched, phases = self._steps(method, stream, device, self.warm_up, self.steps, marked=on_cpu)
        row |= memory_counters(device)
        row["step_time_s"] = spread(times)
        row["tokens_per_s"] = self.batch * self.length * self.accumulation / row["step_time_s"]["median"]
        row["timed_steps"], row["timed_switches"] = len(times), sum(switched)
        row["optimizer_bytes"] = method.optimizer_bytes()
        report(row)
        if self.phases:
            if not on_cpu:  # each mark drains the device, so these are further steps
                _, switched, phases = self._steps(method, stream, device, 0, self.inner_steps + 1, marked=True)
            row["phases_s"] = by_phase(phases, switched)
            if method.floor is not None:
                row["overhead"] = overhead(method, stream, max(10, self.inner_steps), self.inner_steps)
            report(row)
        folder = Path(self.folder) if self.folder else None
        if folder:
            row |= profile_method(method, stream, self.inner_steps, folder / f"trace_{self.method}.json.gz")
        if self.timeline:
            snapshot = folder / f"memory_{self.method}.pickle" if folder else None
            row["timeline"] = record_timeline(method, stream, device, row["weights_bytes"], snapshot)

    def stream(self, method: Method) -> Iterator[Tensor]:
        """Endless micro-batches of token ids."""
        device = torch.device(self.device)
        if self.data == "random":
            return token_batches(method.model, self.batch, self.length, device)
        return batches(rows(self.data, self.length)[0], self.batch, device)

    def _steps(
        self, method: Method, stream: Iterator[Tensor], device: torch.device, warm_up: int, steps: int, *, marked: bool
    ) -> tuple[list[float], list[bool], list[dict[str, float]]]:
        """Seconds of each step, whether it switched, and where ``marked`` its seconds by phase."""
        times, switched, phases = [], [], []
        for number in range(warm_up + steps):
            micro_batches = list(islice(stream, self.accumulation))
            before, clock = method.switches(), Stopwatch(device, STEP_PHASES if marked else ())
            with observed(clock.around):
                lasted, _ = timed(device, method.step, micro_batches)
            if number >= warm_up:
                times.append(lasted)
                switched.append(method.switches() > before)
                phases.append(clock.totals)
        return times, switched, phases


def by_phase(found: list[dict[str, float]], switched: list[bool]) -> dict[str, float]:
    """Median seconds of each phase of a step without a switch, and what a switch takes on top."""
    plain = [phases for phases, at_switch in zip(found, switched, strict=True) if not at_switch] or found
    result = {name: statistics.median(phases.get(name, 0.0) for phases in plain) for name in plain[0]}
    switches = [phases.get("step", 0.0) for phases, at_switch in zip(found, switched, strict=True) if at_switch]
    result["switch"] = max(0.0, statistics.median(switches) - result.get("step", 0.0)) if switches else 0.0
    return result

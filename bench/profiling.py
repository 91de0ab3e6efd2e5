"""A profile: the trace of a few steps of a method, and its account by phase."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from misa_engine.bench.ledger import OWN
from misa_engine.bench.measure import synchronize
from misa_engine.bench.method import Method, Settings
from misa_engine.bench.phases import PHASES, WINDOW, Cost, account
from misa_engine.engine.marks import phase


def profile_method(method: Method, batches: Iterator[Tensor], steps: int, trace_file: Path) -> dict[str, Any]:
    """Profile ``steps`` steps of a method that has made some, one switch among them.

    Args:
        method: what trains; a round of it is ``steps`` steps long.
        batches: endless token ids (batch, length).
        steps: profiled steps.
        trace_file: where the trace goes; its name ends in .json.gz.

    Returns:
        ``profile``, a row a phase, and ``profile_summary``.
    """
    first = next(batches)
    cuda = first.device.type == "cuda"

    def one_step() -> None:
        with phase("data"):
            micro_batches = list(islice(batches, method.settings.accumulation))
        method.step(micro_batches)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        one_step()  # the profiler's own first time
        synchronize(first.device)
        before = method.switches()
        with record_function(WINDOW):
            for _ in range(steps):
                one_step()
            with phase("rest (wait)"):
                synchronize(first.device)
        switches = method.switches() - before
    profiler.export_chrome_trace(str(trace_file))
    with gzip.open(trace_file, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    shapes = {tuple(p.shape) for p in method.model.parameters() if p.dim() == 2}
    seconds, costs = account(trace, cuda=cuda, tokens=first.numel(), weight_shapes=shapes)
    rows = [{"phase": name, **costs[name].of_a_step(steps, seconds)} for name in PHASES]
    return {"profile": rows, "profile_summary": summary(seconds, costs, steps, switches)}


def summary(
    seconds: float, costs: Mapping[str, Cost], steps: int, switches: int, inner_steps: int = Settings.inner_steps
) -> dict[str, float | int]:
    """The numbers of a whole step.

    Returns:
        ``step_s`` as profiled; ``overhead``, the share of hooks, norm, update and 1/T of a switch in a step that holds
        1/T of a switch, where T is ``inner_steps``; launches (on a CPU operators) and host reads of a whole step, of
        the optimizer inside a round and of a switch.
    """
    switch = costs["switch"]
    own = [costs[name] for name in OWN if name != "switch"]
    switch_share_s = switch.time_s / switches / inner_steps if switches else 0.0
    own_s = sum(cost.time_s for cost in own) / steps + switch_share_s
    return {
        "steps": steps,
        "switches": switches,
        "inner_steps": inner_steps,
        "step_s": seconds / steps,
        "overhead": own_s / ((seconds - switch.time_s) / steps + switch_share_s),
        "launches_a_step": sum(cost.launches for cost in costs.values()) / steps,
        "own_launches_a_step": sum(cost.launches for cost in own) / steps,
        "host_reads_a_step": sum(cost.host_reads for cost in costs.values()) / steps,
        "own_host_reads_a_step": sum(cost.host_reads for cost in own) / steps,
        "host_reads_a_switch": switch.host_reads / switches if switches else 0.0,
        "peak_bytes": max(cost.peak_bytes for cost in costs.values()),
    }

"""A profile: the trace of a few steps of a method, and its account by the phases marked in it (``engine.marks``).

    data, forward    marked by the benchmark, as are backward, clip and step
    recompute        the forward pass of checkpointed layers, run again inside the backward pass
    backward dW      GEMMs that make weight gradients
    backward dX      all else in the backward pass
    hooks            gradients arriving: hooks of ours, and autograd's AccumulateGrad
    clip/norm, update, switch
    rest             Python between the phases; on CUDA also the time in which the device idles

How dW is told from dX: a GEMM that the engine makes itself is marked. In autograd's own nodes the weight of a linear
layer is ``mat2``, whose gradient ``MmBackward0`` computes first of two and ``AddmmBackward0`` second. A node with a
single GEMM makes dW if the weight's transposition, made just before it in the forward pass, has a backward node (all
shapes here are of torch's Linear). Gradients of norm weights and biases are sums that count for dX.

The trace itself is read, not ``profiler.events()``, whose ranges know only what is left of the memory they took.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from misa_engine.bench.ledger import OWN
from misa_engine.bench.measure import synchronize
from misa_engine.bench.method import Method, Settings
from misa_engine.engine.marks import PREFIX, phase

PHASES = (
    "data", "forward", "recompute", "backward dX", "backward dW", "hooks", "resting", "clip/norm", "update", "switch",
    "rest",
)  # fmt: skip
WINDOW = PREFIX + "profiled steps"
#: Ranges of the host alone: the sampler reads its own host tensors, and the profiler waits for the device.
NO_READS = ("(sampler)", "(wait)")
#: What the phases of ``Method.step`` are in the account.
STEP_PHASES = {"backward": "backward dX", "clip": "clip/norm", "step": "update"}
RUNTIME = ("cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
BLOCKING_COPIES = ("cudaMemcpy", "hipMemcpy", "hipMemcpyWithStream")
_TICK = 0.002  # microseconds; double precision resolves 0.001 at the trace's clock values

#: An event of a trace: what Chrome's format says, with ``parent``, ``children``, ``phase`` and ``range`` (of a mark).
Event = dict[str, Any]


@dataclass
class Cost:
    """What a phase took in all profiled steps together."""

    time_s: float = 0.0
    allocated_bytes: int = 0
    """Sum of all allocations, whether or not they were freed again."""
    peak_bytes: int = 0
    """Most that was held at an allocation of the phase, above what was held when the first step began."""
    launches: int = 0
    """Kernel launches on CUDA; on a CPU operators that no other operator called."""
    host_reads: int = 0
    """Synchronising calls on CUDA; on a CPU reads of single values, each of which would wait on a GPU."""

    def of_a_step(self, steps: int, seconds: float) -> dict[str, float]:
        """The means of ``steps`` steps that took ``seconds`` together; the peak as it is."""
        means = {name: value / steps for name, value in vars(self).items()}
        return {**means, "share": self.time_s / seconds, "peak_bytes": self.peak_bytes}


def account(trace: Mapping[str, Any], *, cuda: bool) -> tuple[float, dict[str, Cost]]:
    """Time, memory, launches and reads of each phase.

    Args:
        trace: a Chrome trace of torch.profiler, recorded with memory; one range named WINDOW in it.
        cuda: count the device's time, and not the host's.

    Returns:
        Seconds of the window, and the costs by phase; their times add up to those seconds.
    """
    events = [{"dur": 0.0, "args": {}, **e} for e in trace["traceEvents"] if e.get("ph") in ("X", "i")]
    window = next(e for e in events if e["name"] == WINDOW and e["cat"] == "user_annotation")
    begin, end = window["ts"] - _TICK, window["ts"] + window["dur"] + _TICK
    threads: dict[Any, list[Event]] = {}
    for e in events:
        seen = e.get("cat") in ("cpu_op", "user_annotation", *RUNTIME)
        if begin <= e["ts"] < end and (seen or _is_memory(e) and e["args"].get("Device Type") == int(cuda)):
            threads.setdefault(e["tid"], []).append(e)
    costs = {name: Cost() for name in PHASES}
    for tid, own in threads.items():
        _nest(own)
        weights = _weight_gemms(own)
        for e in own:
            _set_phase(e, weights, default="rest" if tid == window["tid"] else "backward dX")
            if not _is_memory(e):
                cost = costs[e["phase"]]
                cost.launches += _is_launch(e, cuda)
                cost.host_reads += not e["range"].endswith(NO_READS) and _is_read(e, cuda)
    inside = [e for own in threads.values() for e in own]
    _count_memory(costs, [e for e in inside if _is_memory(e)])
    seconds = window["dur"] * 1e-6
    if cuda:
        # kernels may end after the window only if the caller did not wait for them
        calls = (e for e in inside if e["cat"] in RUNTIME and "correlation" in e["args"])
        launched = {e["args"]["correlation"]: e["phase"] for e in calls}
        for e in events:
            if e.get("cat") in DEVICE and e["args"].get("correlation") in launched:
                costs[launched[e["args"]["correlation"]]].time_s += e["dur"] * 1e-6
        costs["rest"].time_s = seconds - sum(cost.time_s for name, cost in costs.items() if name != "rest")
    else:
        for e in threads[window["tid"]]:
            costs[e["phase"]].time_s += (e["dur"] - sum(child["dur"] for child in e["children"])) * 1e-6
    return seconds, costs


def _is_memory(e: Event) -> bool:
    return bool(e["name"] == "[memory]")


def _nest(events: list[Event]) -> None:
    """Sort a thread's events by time and find each one's parent; an allocation is nobody's child."""
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    stack: list[Event] = []
    for e in events:
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"] + (0 if _is_memory(e) else _TICK):
            stack.pop()
        e["parent"], e["children"] = stack[-1] if stack else None, []
        if not _is_memory(e):
            if stack:
                stack[-1]["children"].append(e)
            stack.append(e)


def _weight_gemms(events: Sequence[Event]) -> set[int]:
    """Ids of the GEMMs in autograd's nodes that make weight gradients."""
    found = set()
    transposed = {node["args"].get("Sequence number") for node in events if node["name"] == "TBackward0"}
    for node in events:
        if node["name"] not in ("MmBackward0", "AddmmBackward0"):
            continue
        gemms = [child for child in node["children"] if child["name"] == "aten::mm"]
        if len(gemms) == 2:
            found.add(id(gemms[0 if node["name"] == "MmBackward0" else 1]))
        elif gemms and node["args"].get("Sequence number", 0) - 1 in transposed:
            # F.linear of an input without gradient: nothing but t has a node before the GEMM's
            found.add(id(gemms[0]))
    return found


def _set_phase(e: Event, weights: set[int], default: str) -> None:
    """The innermost mark decides; parents have been set before."""
    parent = e["parent"] or {"phase": default, "range": ""}
    e["phase"], e["range"] = parent["phase"], parent["range"]
    if e["cat"] == "user_annotation" and e["name"].startswith(PREFIX) and e["name"] != WINDOW:
        e["range"] = e["name"]
        name = e["name"].removeprefix(PREFIX).partition(" (")[0]
        e["phase"] = STEP_PHASES.get(name, name)
    elif e["phase"] == "backward dX":
        if e["name"].startswith("autograd::engine::evaluate_function") and e["name"].endswith("AccumulateGrad"):
            e["phase"] = "hooks"
        elif id(e) in weights or e["name"] == "aten::embedding_backward":
            e["phase"] = "backward dW"


def _is_launch(e: Event, cuda: bool) -> bool:
    if cuda:
        return e["cat"] in RUNTIME and "Launch" in e["name"]
    inner = e["parent"] is not None and e["parent"]["name"].startswith("aten::")
    return e["name"].startswith("aten::") and not inner


def _is_read(e: Event, cuda: bool) -> bool:
    name = e["name"]
    if cuda:
        return e["cat"] in RUNTIME and ("Synchronize" in name or name in BLOCKING_COPIES)
    # Tensor.tolist reads a CPU tensor without any operator, so the engine's one use of it is known by its range
    return name in ("aten::_local_scalar_dense", f"{PREFIX}switch (host copy)")


def _count_memory(costs: dict[str, Cost], events: Sequence[Event]) -> None:
    held = 0
    for e in sorted(events, key=lambda e: e["ts"]):
        cost, size = costs[e["phase"]], e["args"]["Bytes"]
        held += size
        cost.allocated_bytes += max(0, size)
        cost.peak_bytes = max(cost.peak_bytes, held)


# ---- a profile ----


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
    seconds, costs = account(trace, cuda=cuda)
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

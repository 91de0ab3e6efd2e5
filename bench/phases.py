"""Where a step spends its time: the account of a profiler trace in which the phases are marked (``engine.marks``).

    data, forward    marked by the benchmark, as are backward, clip and step
    recompute        the forward pass of checkpointed layers, run again inside the backward pass
    backward dW      GEMMs that make weight gradients
    backward dX      all else in the backward pass
    hooks            gradients arriving: hooks of ours, and autograd's AccumulateGrad
    clip/norm, update, switch
    rest             Python between the phases; on CUDA also the time in which the device idles

How dW is told from dX: a GEMM that the engine makes itself is marked. In autograd's own nodes the weight of a linear
layer is ``mat2``, whose gradient ``MmBackward0`` computes first of two and ``AddmmBackward0`` second. A node with a
single GEMM makes dW if the weight's transposition, made just before it in the forward pass, has a backward node; or,
for weights stored without transposition, if the result has the shape of a weight and no side as long as the tokens are
many. Gradients of norm weights and biases are sums that count for dX.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from misa_engine.engine.marks import PREFIX

PHASES = (
    "data", "forward", "recompute", "backward dX", "backward dW", "hooks", "clip/norm", "update", "switch", "rest",
)  # fmt: skip
WINDOW = PREFIX + "profiled steps"
#: Ranges of the host alone: the sampler reads its own host tensors, and the profiler waits for the device.
NO_READS = ("sampler", "wait")
#: What the phases of ``Method.step`` are in the account.
STEP_PHASES = {"backward": "backward dX", "clip": "clip/norm", "step": "update"}
_TICK = 0.002  # microseconds; double precision resolves 0.001 at the trace's clock values


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


@dataclass
class _Event:
    name: str
    begin: float
    end: float
    category: str
    shapes: Sequence[Any]
    sequence: int | None
    """Of the forward operator that an autograd node belongs to."""
    correlation: int | None
    bytes: int | None
    parent: _Event | None = None
    phase: str = "rest"
    note: str = ""
    children: list[_Event] = field(default_factory=list)

    @property
    def self_us(self) -> float:
        return self.end - self.begin - sum(child.end - child.begin for child in self.children)


HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def account(
    trace: Mapping[str, Any], *, cuda: bool, tokens: int, weight_shapes: Collection[tuple[int, ...]]
) -> tuple[float, dict[str, Cost]]:
    """Time, memory, launches and reads of each phase.

    Args:
        trace: a Chrome trace of torch.profiler, recorded with shapes and memory; one range named WINDOW in it.
        cuda: count the device's time, and not the host's.
        tokens: rows of a micro-batch.
        weight_shapes: of the model's matrices.

    Returns:
        Seconds of the window, and the costs by phase; their times add up to those seconds.
    """
    window = next(e for e in trace["traceEvents"] if e.get("name") == WINDOW and e.get("cat") == "user_annotation")
    begin, end = window["ts"] - _TICK, window["ts"] + window["dur"] + _TICK
    inside = [e for e in trace["traceEvents"] if e.get("ph") in ("X", "i") and begin <= e["ts"] < end]
    threads: dict[Any, list[_Event]] = {}
    for e in inside:
        memory = e.get("name") == "[memory]"
        if e.get("cat") in HOST or memory and e["args"].get("Device Type") == int(cuda):
            threads.setdefault(e["tid"], []).append(_event(e))
    costs = {phase: Cost() for phase in PHASES}
    launched: dict[int, str] = {}
    memory_events: list[tuple[float, int, str]] = []
    for thread, events in threads.items():
        main = thread == window["tid"]
        _nest(events)
        weights = _weight_gemms(events, tokens, weight_shapes)
        for e in events:
            _set_phase(e, weights, default="rest" if main else "backward dX")
            cost = costs[e.phase]
            if e.bytes is not None:
                memory_events.append((e.begin, e.bytes, e.phase))
                cost.allocated_bytes += max(0, e.bytes)
                continue
            if e.correlation is not None:
                launched[e.correlation] = e.phase
            if main and not cuda:
                cost.time_s += e.self_us * 1e-6
            cost.launches += _is_launch(e, cuda)
            cost.host_reads += e.note not in NO_READS and _is_read(e, cuda)
    _peaks(costs, memory_events)
    seconds = window["dur"] * 1e-6
    if cuda:
        # kernels may end after the window only if the caller did not wait for them
        for e in trace["traceEvents"]:
            phase = launched.get(e.get("args", {}).get("correlation")) if e.get("cat") in DEVICE else None
            if phase is not None:
                costs[phase].time_s += e["dur"] * 1e-6
        costs["rest"].time_s = seconds - sum(cost.time_s for phase, cost in costs.items() if phase != "rest")
    return seconds, costs


def _event(e: Mapping[str, Any]) -> _Event:
    args = e.get("args", {})
    return _Event(
        name=e["name"],
        begin=e["ts"],
        end=e["ts"] + e.get("dur", 0.0),
        category=e["cat"],
        shapes=args.get("Input Dims", ()),
        sequence=args.get("Sequence number"),
        correlation=args.get("correlation") if e["cat"] in ("cuda_runtime", "cuda_driver") else None,
        bytes=args["Bytes"] if e["name"] == "[memory]" else None,
    )


def _nest(events: list[_Event]) -> None:
    """Sort a thread's events by time and find each one's parent."""
    events.sort(key=lambda e: (e.begin, -e.end))
    stack: list[_Event] = []
    for e in events:
        while stack and stack[-1].end <= e.begin + (_TICK if e.bytes is None else 0):
            stack.pop()
        if stack:
            e.parent = stack[-1]
            if e.bytes is None:
                stack[-1].children.append(e)
        if e.bytes is None:
            stack.append(e)


def _weight_gemms(events: Sequence[_Event], tokens: int, weight_shapes: Collection[tuple[int, ...]]) -> set[int]:
    """Ids of the GEMMs in autograd's nodes that make weight gradients."""
    found = set()
    transposed = {node.sequence for node in events if node.name == "TBackward0"}
    for node in events:
        if node.name not in ("MmBackward0", "AddmmBackward0"):
            continue
        gemms = [child for child in node.children if child.name == "aten::mm"]
        if len(gemms) == 2:
            found.add(id(gemms[0 if node.name == "MmBackward0" else 1]))
        elif len(gemms) == 1:
            result = (gemms[0].shapes[0][0], gemms[0].shapes[1][1])
            stored_plainly = tokens not in result and (result in weight_shapes or result[::-1] in weight_shapes)
            # F.linear of an input without gradient: nothing but t has a node before the GEMM's
            if stored_plainly or (node.sequence is not None and node.sequence - 1 in transposed):
                found.add(id(gemms[0]))
    return found


def _set_phase(e: _Event, weights: set[int], default: str) -> None:
    """The innermost mark decides; parents have been set before."""
    e.phase, e.note = (e.parent.phase, e.parent.note) if e.parent is not None else (default, "")
    if e.category == "user_annotation" and e.name.startswith(PREFIX) and e.name != WINDOW:
        phase, _, note = e.name[len(PREFIX) :].partition(" (")
        e.phase, e.note = STEP_PHASES.get(phase, phase), note.rstrip(")")
    elif e.phase == "backward dX":
        if e.name.startswith("autograd::engine::evaluate_function") and e.name.endswith("AccumulateGrad"):
            e.phase = "hooks"
        elif id(e) in weights or e.name == "aten::embedding_backward":
            e.phase = "backward dW"


def _is_launch(e: _Event, cuda: bool) -> bool:
    if cuda:
        return e.category in ("cuda_runtime", "cuda_driver") and "Launch" in e.name
    return e.name.startswith("aten::") and not (e.parent is not None and e.parent.name.startswith("aten::"))


def _is_read(e: _Event, cuda: bool) -> bool:
    if cuda:
        runtime = e.category in ("cuda_runtime", "cuda_driver")
        return runtime and ("Synchronize" in e.name or e.name in ("cudaMemcpy", "hipMemcpy", "hipMemcpyWithStream"))
    # Tensor.tolist reads a CPU tensor without any operator, so the engine's one use of it is known by its range
    return e.name == "aten::_local_scalar_dense" or e.name == f"{PREFIX}switch (host copy)"


def _peaks(costs: dict[str, Cost], events: list[tuple[float, int, str]]) -> None:
    held = 0
    for _, size, phase in sorted(events):
        held += size
        costs[phase].peak_bytes = max(costs[phase].peak_bytes, held)

"""The memory of two optimizer steps, one of them with a switch, allocation by allocation.

On CUDA the allocator's own history is replayed into bytes over time; weights and optimizer buffers do not change while
it is recorded, so that what lies above them is activations, logits and temporaries. On a CPU the resident memory at
each phase stands in for it.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misa_engine.bench.measure import held_bytes, synchronize
from misa_engine.bench.method import Method
from misa_engine.engine.marks import observed

#: Points of the line that is kept; each is the highest of its stretch of time.
POINTS = 2000
#: Phases with a colour of their own; what the engine marks inside them is not told apart.
SHOWN = ("forward", "backward", "clip", "step", "switch")
_HISTORY = 400_000  # allocator events: 2 steps x 2 micro-batches x 32 layers make about 30,000


def record_timeline(
    method: Method,
    batches: Iterator[Tensor],
    device: torch.device,
    weights_bytes: int,
    snapshot: Path | None = None,
) -> dict[str, Any]:
    """Train two steps around a switch and return the memory over their time.

    One piece, because samples, phases and the allocator's history share one clock.

    Args:
        method: what trains; steps are made until the next one ends with a switch.
        batches: endless token ids.
        device: where the model is.
        weights_bytes: of the model, the lowest layer of the picture.
        snapshot: where the allocator's raw history goes (CUDA only), for pytorch.org/memory_viz.

    Returns:
        ``points`` [[seconds, bytes]], ``phases`` [{phase, begin_s, end_s}], ``base_bytes`` by what never changes.
    """
    optimizer, switch_every = method.optimizer, method.settings.inner_steps
    accumulation = method.settings.accumulation
    while getattr(optimizer, "inner_step", switch_every - 1) != switch_every - 1:
        method.step(list(islice(batches, accumulation)))
    cuda = device.type == "cuda"
    spells: list[tuple[str, float, float]] = []
    sampled: list[tuple[float, int]] = []

    def sample() -> float:
        now = time.time()
        if not cuda:
            sampled.append((now, held_bytes(device)[0]))
        return now

    @contextmanager
    def around(phase: str) -> Iterator[None]:
        begin = sample() if phase in SHOWN else 0.0
        yield
        if phase in SHOWN:
            spells.append((phase, begin, sample()))

    two_steps = [list(islice(batches, accumulation)) for _ in range(2)]
    synchronize(device)
    before, begin = held_bytes(device)[0], time.time()
    if cuda:
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=_HISTORY)
    with observed(around):
        for micro_batches in two_steps:
            method.step(micro_batches)
    synchronize(device)
    points: Sequence[tuple[float, int]] = sampled
    if cuda:
        history = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        points = replay(history["device_traces"][device.index or 0], before)
        if snapshot is not None:
            snapshot.write_bytes(pickle.dumps(history))
    return {
        "points": [[round(at - begin, 6), held] for at, held in thin(points, POINTS)],
        "phases": [  # a switch after the step that it is part of
            {"phase": name, "begin_s": round(start - begin, 6), "end_s": round(end - begin, 6)}
            for name, start, end in sorted(spells, key=lambda spell: spell[1])
        ],
        "base_bytes": {"weights": weights_bytes, **method.optimizer_bytes()},
        "before_bytes": before,
        "peak_bytes": max((held for _, held in points), default=before),
    }


def replay(trace: Iterable[Mapping[str, Any]], before: int) -> list[tuple[float, int]]:
    """Bytes allocated after each event of the allocator's history.

    Args:
        trace: entries with ``action``, ``size`` in bytes and ``time_us`` since the epoch.
        before: bytes that were allocated when recording began.
    """
    points, held = [], before
    for entry in trace:
        if entry["action"] == "alloc":
            held += entry["size"]
        elif entry["action"] == "free_completed":
            held -= entry["size"]
        else:
            continue
        points.append((entry["time_us"] / 1e6, held))
    return points


def thin(points: Sequence[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    """At most ``most`` points: of each stretch of equal count, the highest."""
    stretch = -(-len(points) // most) if points else 1
    return [max(points[i : i + stretch], key=lambda point: point[1]) for i in range(0, len(points), stretch)]

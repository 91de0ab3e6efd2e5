"""The overhead ledger: a step of MISA against the floor, the same forward and backward with no optimizer at all.

Floor and MISA steps alternate in one process, so that the machine's noise hits both. A floor step trains the same
active matrices: their weight gradients are computed into the same slots, and are dropped as they arrive.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine import MISA
from misa_engine.bench.measure import spread, synchronize
from misa_engine.bench.phases import OWN, annotate

#: Steps that are timed by phase after the comparison; clocks around each hook would slow the compared steps down.
PARTS_STEPS = 5


def overhead(
    model: nn.Module, loss: Callable[[Tensor], Tensor], optimizer: MISA, batches: Iterator[Tensor], steps: int = 20
) -> dict[str, Any]:
    """What MISA adds to the forward and backward passes it needs.

    Trains 1 + ``steps`` + PARTS_STEPS steps. If no switch falls into them, the last round is ended early to time one.

    Args:
        model: what trains.
        loss: token ids -> mean loss of ``model``.
        optimizer: of ``model``, between two steps.
        batches: token ids (batch, length); each one serves a floor step and a MISA step.
        steps: pairs of steps.

    Returns:
        ``floor_s`` and ``misa_s``, medians of a step, the second with its share of a switch; ``overhead``, their ratio
        less 1; ``overhead_of_pairs``, the median of each pair's own, which a drift of the machine's speed leaves alone;
        ``floor_spread_s`` and ``misa_spread_s`` (median, p20, p80; without switches); ``switch_s``;
        ``parts``, seconds of a step by part. On CUDA parts are taken with the device idle before and after each, so
        that together they may exceed the overhead.
    """
    device = next(model.parameters()).device
    floor_step(model, loss, optimizer, ids := next(batches))  # the first of each allocates and compiles
    _misa_step(model, loss, optimizer, ids)
    floors, wholes = [], []
    first_round, switch, clock = optimizer.round, Stopwatch(device), Stopwatch(device)
    for _ in range(steps):
        ids, before = next(batches), switch.total("switch")
        floors.append(_seconds(device, partial(floor_step, model, loss, optimizer, ids)))
        with _timed_switch(optimizer, switch):
            whole = _seconds(device, partial(_misa_step, model, loss, optimizer, ids))
        wholes.append(whole - (switch.total("switch") - before))
    with annotate(optimizer, clock.around):
        for _ in range(PARTS_STEPS):
            _misa_step(model, loss, optimizer, next(batches))
    if optimizer.round == first_round:
        with _timed_switch(optimizer, switch):
            optimizer.end_round()
    switch_s = (switch.total("switch") + clock.total("switch")) / (optimizer.round - first_round)
    inner_steps = optimizer.config.inner_steps
    parts = {phase: clock.total(phase) / PARTS_STEPS for phase in OWN if phase != "switch"}
    parts["switch"] = switch_s / inner_steps
    floor_s, misa_s = statistics.median(floors), statistics.median(wholes) + switch_s / inner_steps
    pairs = zip(wholes, floors, strict=True)
    return {
        "floor_s": floor_s,
        "misa_s": misa_s,
        "overhead": misa_s / floor_s - 1,
        "overhead_of_pairs": statistics.median(w / f - 1 for w, f in pairs) + parts["switch"] / floor_s,
        "parts": parts,
        "switch_s": switch_s,
        "inner_steps": inner_steps,
        "steps": steps,
        "floor_spread_s": spread(floors),
        "misa_spread_s": spread(wholes),
    }


def floor_step(model: nn.Module, loss: Callable[[Tensor], Tensor], optimizer: MISA, ids: Tensor) -> None:
    """Forward and backward with the present active set; gradients are dropped, and nothing else changes.

    Args:
        model: what trains.
        loss: token ids -> mean loss of ``model``.
        optimizer: of ``model``; its gradient slots serve as scratch memory.
        ids: (batch, length) token ids.
    """
    with _dropping(optimizer):
        loss(ids).backward()


def _misa_step(model: nn.Module, loss: Callable[[Tensor], Tensor], optimizer: MISA, ids: Tensor) -> None:
    loss(ids).backward()
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _dropping(optimizer: MISA) -> Iterator[None]:
    """Gradients that arrive are forgotten: not measured, not kept, not used."""

    def drop(name: str, index: int, parameter: nn.Parameter) -> None:
        parameter.grad = None

    intake: Any = optimizer._intake
    gemm = getattr(intake, "_gemm", None)
    intake._arrived = drop
    if gemm is not None:
        written, gemm._written = gemm._written, lambda name: None
    try:
        yield
    finally:
        del intake._arrived
        if gemm is not None:
            gemm._written = written


# ---- clocks ----


class Stopwatch:
    """Seconds by phase; the time of an inner phase does not count for the outer one.

    Args:
        device: waited for at each border between phases.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._totals: dict[str, float] = defaultdict(float)
        self._stack: list[list[Any]] = []  # [phase, seconds of inner phases]

    @contextmanager
    def around(self, label: str) -> Iterator[None]:
        """Time one spell of a phase; a note in brackets is left out."""
        phase = label.partition(" (")[0]
        synchronize(self._device)
        self._stack.append([phase, 0.0])
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            lasted = time.perf_counter() - started
            _, inner = self._stack.pop()
            self._totals[phase] += lasted - inner
            if self._stack:
                self._stack[-1][1] += lasted

    def total(self, phase: str) -> float:
        """Seconds of a phase so far."""
        return self._totals[phase]


@contextmanager
def _timed_switch(optimizer: Any, clock: Stopwatch) -> Iterator[None]:
    original = optimizer._switch

    def timed() -> None:
        with clock.around("switch"):
            original()

    optimizer._switch = timed
    try:
        yield
    finally:
        del optimizer._switch


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started

"""The overhead ledger: a step of MISA against the floor, the same forward and backward with no optimizer at all.

Floor and MISA steps alternate in one process, so that the machine's noise hits both. A floor step trains the same
active matrices of a twin of the model: plain autograd, whose gradients are dropped as they arrive.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine import MISA
from misa_engine.bench.measure import spread, synchronize, timed
from misa_engine.bench.method import Method
from misa_engine.engine.marks import PHASES, observed

#: What a step would do without, if the optimizer did nothing.
OWN = ("hooks", "clip/norm", "update", "switch")
#: Steps that are timed by phase after the comparison; clocks around each hook would slow the compared steps down.
PARTS_STEPS = 5


class Floor:
    """A twin of a model: modules of its own, the same weights in memory, no hooks.

    Args:
        model: before an optimizer puts hooks on its parameters.
        loss_of: gives the twin's loss, token ids -> mean loss.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[Any], Callable[[Tensor], Tensor]]):
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, memo=dict(shared))
        self._loss = loss_of(self.model)

    def __call__(self, active: Collection[str], ids: Tensor) -> None:
        """Forward and backward with the parameters ``active`` training; nothing but the clock has changed afterwards.

        Args:
            active: names of parameters.
            ids: (batch, length) token ids.
        """
        handles = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in active)
            if name in active:
                handles.append(parameter.register_post_accumulate_grad_hook(_drop))
        self._loss(ids).backward()
        for handle in handles:
            handle.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def overhead(method: Method, batches: Iterator[Tensor], steps: int, inner_steps: int) -> dict[str, Any]:
    """What MISA adds to the forward and backward passes it needs.

    Trains 1 + ``steps`` + PARTS_STEPS steps. If no switch falls into them, the last round is ended early to time one.

    Args:
        method: a MISA with its floor, between two steps.
        batches: token ids (batch, length); each one serves a floor step and a MISA step.
        steps: pairs of steps.
        inner_steps: steps over which a switch is spread.

    Returns:
        ``floor_s`` and ``misa_s``, medians of a step, the second with its share of a switch; ``overhead``, their ratio
        less 1; ``overhead_of_pairs``, the median of each pair's own, which a drift of the machine's speed leaves alone;
        ``floor_spread_s`` and ``misa_spread_s`` (median, p20, p80; without switches); ``switch_s``;
        ``parts``, seconds of a step by part. On CUDA parts are taken with the device idle before and after each, so
        that together they may exceed the overhead.
    """
    optimizer, floor = method.optimizer, method.floor
    assert isinstance(optimizer, MISA) and floor is not None
    ids = next(batches)
    device = ids.device
    floor(optimizer.arena.names, ids)  # the first of each allocates and compiles
    method.step([ids])
    floors, pairs = [], []
    for _ in range(steps):
        ids = next(batches)
        floors.append(timed(device, floor, optimizer.arena.names, ids)[0])
        pairs.append(time_step(method, [ids], ("switch",)))
    marked = [time_step(method, [next(batches)], PHASES) for _ in range(PARTS_STEPS)]
    switches = [one.phases["switch"] for one in (*pairs, *marked) if one.switched]
    switch_s = statistics.fmean(switches) if switches else timed(device, optimizer.end_round)[0]
    wholes = [one.seconds - one.phases["switch"] for one in pairs]
    parts = {phase: statistics.fmean(one.phases[phase] for one in marked) for phase in OWN if phase != "switch"}
    parts["switch"] = switch_s / inner_steps
    floor_s, misa_s = statistics.median(floors), statistics.median(wholes) + switch_s / inner_steps
    ratios = [whole / alone - 1 for whole, alone in zip(wholes, floors, strict=True)]
    return {
        "floor_s": floor_s,
        "misa_s": misa_s,
        "overhead": misa_s / floor_s - 1,
        "overhead_of_pairs": statistics.median(ratios) + parts["switch"] / floor_s,
        "parts": parts,
        "switch_s": switch_s,
        "inner_steps": inner_steps,
        "steps": steps,
        "floor_spread_s": spread(floors),
        "misa_spread_s": spread(wholes),
    }


# ---- clock ----


@dataclass(frozen=True)
class StepTimes:
    """What a step took."""

    seconds: float
    switched: bool
    phases: Mapping[str, float]
    """Seconds of those that were timed; 0 for all others."""


def time_step(method: Method, micro_batches: Sequence[Tensor], phases: Collection[str] = ()) -> StepTimes:
    """Train a step with the device idle before and after, and around each of ``phases``."""
    device = micro_batches[0].device
    before, clock = method.switches(), Stopwatch(device, phases)
    with observed(clock.around):
        seconds, _ = timed(device, method.step, micro_batches)
    return StepTimes(seconds, method.switches() > before, clock.totals)


class Stopwatch:
    """Seconds by phase; the time of an inner phase does not count for the outer one.

    Args:
        device: waited for at each border between phases.
        phases: those that are timed; others run as if there were no clock.
    """

    def __init__(self, device: torch.device, phases: Collection[str]):
        self._device, self._phases = device, frozenset(phases)
        self.totals: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # for each open phase, and around all, the seconds of phases inside

    @contextmanager
    def around(self, label: str) -> Iterator[None]:
        """Time one spell of a phase; a note in brackets is left out."""
        if label not in self._phases:
            yield
            return
        synchronize(self._device)
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            lasted = time.perf_counter() - started
            self.totals[label.partition(" (")[0]] += lasted - self._inner.pop()
            self._inner[-1] += lasted

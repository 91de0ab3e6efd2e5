"""SwitchEvent: what happened when one round ended and the next began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from misa_engine.method.partition import Unit
from misa_engine.method.sampling import ImportanceTracker


@dataclass(frozen=True)
class SwitchEvent:
    """One draw, as seen from outside. Unit names throughout; everything is a plain Python value."""

    round: int
    """Number of the round that begins, from 0."""
    step: int
    """Optimizer steps made so far."""
    left: tuple[str, ...]
    came: tuple[str, ...]
    kept: tuple[str, ...]
    active: tuple[str, ...]
    active_share: float
    """Parameters of the active units over all parameters of the model."""
    budget_share: float
    """Parameters of the active units over the budget δ·N."""
    milliseconds: float
    """Host time of the switch, without the wait for the device to finish the round's last step."""
    moved_bytes: int
    """Optimizer state moved within the arena, or between it and the host."""
    scores: dict[str, float]
    probabilities: dict[str, float]
    visits: dict[str, int]
    entropy: float
    """Of ``probabilities``, divided by log B: 1 is uniform, 0 is certain."""
    coverage: float
    """Share of the units that were active at least once."""
    skipped_steps: int
    """Steps left out because of a non-finite gradient, since the beginning."""
    stale_rounds_max: int
    """Rounds since the last visit of the unit that waits longest."""
    starved: tuple[str, ...]
    """Units that have waited longer than ten times what they would under a uniform draw."""

    empty_steps: int = 0
    """Steps in which no active parameter received a gradient (all their layers were skipped), since the beginning."""
    without_gradient: dict[str, int] = field(default_factory=dict)
    """Parameter -> steps of the round that ended in which it received no gradient; others are left out."""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def describe_switch(
    units: Sequence[Unit], tracker: ImportanceTracker, total: int, before: Sequence[str], **counted: Any
) -> SwitchEvent:
    """Describe the draw that has just been made.

    Args:
        units: all of them.
        tracker: after the draw.
        total: parameters of the model.
        before: names of the units that were active until now.
        counted: the fields that the optimizer itself counts.
    """
    names = [unit.name for unit in units]
    after = tuple(names[index] for index in tracker.active)
    numel = sum(units[index].numel for index in tracker.active)
    return SwitchEvent(
        round=tracker.round,
        left=tuple(name for name in before if name not in after),
        came=tuple(name for name in after if name not in before),
        kept=tuple(name for name in after if name in before),
        active=after,
        active_share=numel / total,
        budget_share=numel / tracker.budget,
        scores=dict(zip(names, tracker.scores, strict=True)),
        probabilities=dict(zip(names, tracker.probabilities, strict=True)),
        visits=dict(zip(names, map(int, tracker.visits), strict=True)),
        entropy=tracker.entropy,
        coverage=tracker.coverage,
        stale_rounds_max=max(tracker.stale_rounds),
        starved=tuple(names[index] for index in tracker.starved()),
        **counted,
    )


class CallbackHandle:
    """Returned by ``MISA.on_switch``; ``remove()`` takes the callback off again."""

    def __init__(self, callbacks: list[Callable[[SwitchEvent], None]], callback: Callable[[SwitchEvent], None]):
        self._callbacks = callbacks
        self._callback = callback

    def remove(self) -> None:
        """Stop calling the callback; harmless when repeated."""
        if self._callback in self._callbacks:
            self._callbacks.remove(self._callback)

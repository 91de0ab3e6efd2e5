"""Coverage: how often a run visits its weights, and what to change where that is too seldom.

    visits a weight = δ · steps / T      steps/T rounds, each of which trains a share δ

Plain arithmetic: nothing is loaded, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from misa_engine.method.config import MisaConfig
from misa_engine.method.rules import RULES

#: Visits below which a run is warned of: most of its distance to full AdamW is then what it hardly trained.
FEW = 2.0
#: Visits that are recommended.
ENOUGH = 3.0


def run_length(
    records: int, batch: int, *, accumulation: int = 1, epochs: float = 3.0, drop_last: bool = False, steps: int = -1
) -> int:
    """Optimizer steps of a run, as transformers' Trainer counts them.

    Args:
        records: samples of a pass over the data.
        batch: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        epochs: passes over the data.
        drop_last: leave out a last micro-batch that is not full.
        steps: where positive, the run's length, whatever the rest says.
    """
    if steps > 0:
        return steps
    batches = records // batch if drop_last else -(-records // batch)
    return math.ceil(epochs * max(1, -(-batches // accumulation)))


@dataclass(frozen=True)
class Coverage:
    """How often a run of known length visits its weights."""

    steps: int
    """Optimizer steps of the run."""
    delta: float
    inner_steps: int
    share: float
    """Of what can be drawn, what a round trains: δ·N over the parameters of all units."""
    cold_steps: int = 0
    """Steps that the cold start's one-step rounds take, about."""
    rest: str = "none"
    """How everything else moves meanwhile."""

    @classmethod
    def of(cls, misa: MisaConfig, steps: int, *, drawable: int, budget: int) -> Coverage:
        """Of a run with these options.

        Args:
            misa: δ, T, cold start and rest rule.
            steps: of the run.
            drawable: parameters of all units together.
            budget: parameters that train at a time, floor(δ·N).
        """
        cold = 0
        if misa.cold_start != "none" and RULES[misa.rule].needs_scores:
            limit = math.inf if misa.cold_start_share == 1 else max(1, int(misa.cold_start_share * steps))
            rounds = -(-drawable // budget)
            if misa.rest_scores and misa.rest_scope == "all":  # one step measures them all
                rounds = min(rounds, misa.rest_every)
            cold = int(min(limit, rounds, steps))
        return cls(steps, misa.delta, misa.inner_steps, min(1.0, budget / drawable), cold, misa.rest)

    @property
    def visits(self) -> float:
        """Visits a weight on average: δ · steps / T."""
        return self.delta * self.steps / self.inner_steps

    @property
    def untouched(self) -> float:
        """Of what can be drawn, the share that even draws would leave without a round: (1 − share)^rounds."""
        return float((1 - self.share) ** (self.steps / self.inner_steps))

    @property
    def enough(self) -> dict[str, float]:
        """Option -> value that alone gives ``ENOUGH`` visits, where there is one: inner_steps, delta, steps."""
        inner_steps = math.floor(self.delta * self.steps / ENOUGH * (1 + 1e-12))
        delta = _rounded_up(ENOUGH * self.inner_steps / self.steps)
        found: dict[str, float] = {"inner_steps": inner_steps} if inner_steps >= 1 else {}
        found |= {"delta": delta} if delta <= 1 else {}
        return found | {"steps": math.ceil(ENOUGH * self.inner_steps / self.delta * (1 - 1e-12))}

    @property
    def is_short(self) -> bool:
        """Whether to warn: fewer than ``FEW`` visits, and nothing moves what is not drawn."""
        return self.visits < FEW and self.rest == "none"

    def describe(self, fits: bool | None = None) -> str:
        """Lines of text: the length, the visits, what to change, and a warning where they are few.

        Args:
            fits: whether the recommended δ fits the card; None where there is no card.
        """
        cold = f"; cold start: about {self.cold_steps:,} steps, in rounds of one" if self.cold_steps else ""
        lines = [
            f"coverage: {self.steps:,} steps, delta {self.delta:g}, inner_steps {self.inner_steps}: {self.visits:.2f} "
            f"visits a weight (delta x steps / inner_steps){cold}"
        ]
        if self.rest != "none":
            lines.append(f"  between its visits every matrix that can rest moves by {self.rest}")
        if self.visits < ENOUGH:
            room = {None: "", True: " (fits)", False: " (does not fit)"}[fits]
            ways = [
                f"{value:,} steps" if name == "steps" else f"{name} {value:g}{room if name == 'delta' else ''}"
                for name, value in self.enough.items()
            ]
            lines.append(f"  {ENOUGH:g} visits a weight: {', or '.join(ways)}")
        if self.is_short:
            lines.append(
                f"warning: fewer than {FEW:g} visits a weight: drawn evenly, {self.untouched:.0%} of what can be drawn "
                "would train in no full round"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "steps": self.steps,
            "inner_steps": self.inner_steps,
            "visits": self.visits,
            "cold_start_steps": self.cold_steps,
            "warning": self.is_short,
            "for_three_visits": self.enough,
        }


def _rounded_up(value: float) -> float:
    """The next number of two digits, not below ``value``."""
    digits = 1 - math.floor(math.log10(value))
    return round(math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits, digits)

"""Who trains next: the units' scores, the draws, and the budget that every draw keeps.

The rules (``rules.py``) order the units. What does not depend on the rule happens here: the score's moving average,
forced choices, filling the budget, visit counts, the checkpoint. Everything is float64 or int on the host and runs once
a round, between two steps.

B units; G_u the score of a unit, n_u its number of parameters, η and β as in MisaConfig, T inner steps a round.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Unit, matches
from misa_engine.method.rules import RULES, DrawContext

logger = logging.getLogger(__name__)

#: Normalised entropy of the draw's probabilities below which they have collapsed: one of 100 units has 4 in 5.
COLLAPSED = 0.3
#: Named wherever a tensor is made: the generator lives on the host, whatever torch.set_default_device says.
CPU = torch.device("cpu")

#: Visits that a unit gets in the cold start while nothing could be measured (all its steps were skipped). Bounded, so
#: that a unit that never receives a gradient cannot keep the run in one-step rounds for ever.
PROBE_ATTEMPTS = 3

#: Scores stop here where a mean is taken, so that their sum is finite.
LARGEST_SCORE = 1e300
#: Exponents stop here, far beyond any that matters (exp overflows at 710), so that no difference of two is inf - inf.
LARGEST_EXPONENT = 1e300

#: Attributes of ImportanceTracker that a checkpoint holds.
SAVED = (
    *("round", "round_length", "active", "visits", "last_visit", "refused_sums"),
    *("_ema", "_updates", "_missed", "_carried", "_left"),
)
#: Of these, what has one entry a unit.
PER_UNIT = ("visits", "last_visit", "_ema", "_updates", "_missed")


def fill_budget(
    order: Sequence[int], sizes: Sequence[int], budget: int, fill: str, smallest: int = 0
) -> tuple[list[int], int | None]:
    """Take units in order while they fit.

    Args:
        order: units, each at most once.
        sizes: parameters of every unit.
        budget: parameters that the taken units may hold together.
        fill: "skip" passes over what does not fit; "stop" and "carry" end at the first unit that does not.
        smallest: size of the smallest unit. Below that nothing is drawn any more, hence nothing is refused: with equal
            sizes no unit is ever carried, and a round of one unit follows P exactly.

    Returns:
        The units taken, and the refused one that ended the draw, if one did.
    """
    taken: list[int] = []
    for unit in order:
        if budget < smallest:
            break
        if sizes[unit] <= budget:
            taken.append(unit)
            budget -= sizes[unit]
        elif fill != "skip":
            return taken, unit
    return taken, None


def static_weights(units: Sequence[Unit], weights: Mapping[str, float]) -> list[float] | None:
    """Relative weight of each unit for ``rule="static"``: the first matching pattern's, otherwise 1.

    Returns:
        One weight a unit, or None when no weights are given.

    Raises:
        ValueError: a pattern matches no unit.
    """
    if not weights:
        return None
    for pattern in weights:
        if not any(matches(pattern, unit.name) for unit in units):
            raise ValueError(
                f"static_weights pattern {pattern!r} matches no unit; unit names look like {units[0].name!r}"
            )
    return [next((weight for pattern, weight in weights.items() if matches(pattern, unit.name)), 1.0) for unit in units]


class ImportanceTracker:
    """Scores, visit counts and the draws of one run; knows units by index only.

    Args:
        sizes: parameters of every unit.
        budget: parameters that the active units may hold together.
        config: rule, score, EMA, cold start, fill and seed.
        static_weights: positive weight of every unit for ``rule="static"``; 1 each when None.

    Attributes:
        round: number of the current round, -1 before the first draw.
        round_length: steps of the current round: T, or 1 during the cold start.
        active: units of the current round, in the order in which they were drawn.
        visits: rounds in which each unit was active.
        last_visit: last such round of each unit, -1 for none.
        refused_sums: how many non-finite norm sums were offered to ``update`` and kept out of the scores.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        budget: int,
        config: MisaConfig,
        static_weights: Sequence[float] | None = None,
    ) -> None:
        self.sizes, self.budget, self.config = [int(size) for size in sizes], int(budget), config
        count = len(self.sizes)
        if not count or min(self.sizes) < 1:
            raise ValueError(f"sizes needs one positive number of parameters per unit; got {self.sizes}")
        if max(self.sizes) > self.budget:
            largest = self.sizes.index(max(self.sizes))
            raise ValueError(
                f"unit {largest} has {self.sizes[largest]:,} parameters, more than the budget of {self.budget:,}: "
                "it could never train. Raise delta, choose a finer granularity, or freeze it."
            )
        weights = [1.0] * count if static_weights is None else [float(weight) for weight in static_weights]
        if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"static_weights needs one positive, finite number for each of the {count} units; got {weights}. "
                "A unit that is never to train belongs into frozen, not at weight 0."
            )
        self.round, self.round_length = -1, 0
        self.active: tuple[int, ...] = ()
        self.visits, self.last_visit = [0] * count, [-1] * count
        self.refused_sums = 0
        self._rule = RULES[config.rule]
        self._log_weights = torch.tensor(weights, dtype=torch.float64, device=CPU).log()
        self._smallest = min(self.sizes)
        self._ema = [0.0] * count  # as stored: uncorrected, except for ema="official"
        self._updates = [0] * count  # rounds that entered the EMA
        self._missed = [0] * count  # rounds in which the unit was active and nothing could be measured
        self._carried: list[int] = []  # refused by the last draw and therefore first in the next
        self._left: list[int] = []  # of the present pass
        self._generator = torch.Generator(CPU).manual_seed(config.seed)
        self._warned = False

    def draw(self) -> tuple[int, ...]:
        """Begin the next round: choose its units and return them."""
        cold = self.round < 0 or self.round_length == 1
        self.round += 1
        unseen = self._unseen()
        if unseen and not (cold and self.round < self.most_cold_rounds):
            unseen = []  # the cold start has taken its share of the run
        self.round_length = 1 if unseen else self.config.inner_steps
        if unseen and self.config.cold_start == "probe":
            # Each unit gets its one visit in whatever order, so skipping cannot favour anyone, and saves rounds.
            taken, _ = fill_budget(unseen, self.sizes, self.budget, "skip", self._smallest)
        else:
            taken = self._draw_by_rule(forced=self._carried + unseen + self._least_recent(unseen))
        if not unseen:
            self._warn_of_collapse()
        self.active = tuple(taken)
        for unit in taken:
            self.visits[unit] += 1
            self.last_visit[unit] = self.round
        return self.active

    @property
    def most_cold_rounds(self) -> float:
        """One-step rounds that the cold start may take: its share of the run, at least one; inf for no limit."""
        if self.config.run_steps is None or self.config.cold_start_share == 1:
            return math.inf
        return max(1, int(self.config.cold_start_share * self.config.run_steps))

    def _draw_by_rule(self, forced: list[int]) -> list[int]:
        fill = self.config.fill
        drawn = self._rule.draw(self._context(), self._generator)
        order = list(dict.fromkeys([*forced, *drawn.order]))
        taken, refused = fill_budget(order, self.sizes, self.budget, fill, self._smallest)
        present = set(taken)
        self._left = [unit for unit in drawn.order if unit not in present] if drawn.then else []
        if drawn.then and not self._left and refused is None:
            room = self.budget - sum(self.sizes[unit] for unit in taken)
            upcoming = [unit for unit in drawn.then if unit not in present]
            more, refused = fill_budget(upcoming, self.sizes, room, fill, self._smallest)
            present = set(more)
            self._left = [unit for unit in drawn.then if unit not in present]
            taken += more
        self._carried = [refused] if fill == "carry" and self._rule.carries and refused is not None else []
        return taken

    def _unseen(self) -> list[int]:
        """Units that the cold start still has to visit, in random order; none for rules without scores."""
        if self.config.cold_start == "none" or not self._rule.needs_scores:
            return []
        unseen = [unit for unit, visits in enumerate(self.visits) if not visits and not self._updates[unit]]
        if self.config.cold_start == "probe":
            again = range(1, PROBE_ATTEMPTS)
            unseen += [u for u, missed in enumerate(self._missed) if missed in again and not self._updates[u]]
        if not unseen:
            return []
        permutation = torch.randperm(len(unseen), device=CPU, generator=self._generator)
        return [unseen[i] for i in permutation.tolist()]

    def _least_recent(self, unseen: list[int]) -> list[int]:
        wanted = self.config.sample_last
        if not wanted:
            return []
        others = set(range(len(self.sizes))) - set(unseen)
        return sorted(others, key=lambda unit: (self.last_visit[unit], unit))[:wanted]

    def update(self, norm_sums: Sequence[float], steps: Sequence[int]) -> None:
        """Close the round: let what was measured enter the scores of the active units.

        Args:
            norm_sums: for each active unit, in the order of ``active``, the sum over the measured steps of ‖g‖²
                (``score="mean_square"``) or of ‖g‖. A sum that is not finite is counted and otherwise not measured.
            steps: for each, how many steps were measured; a unit with none keeps its score.
        """
        if not len(norm_sums) == len(steps) == len(self.active):
            raise ValueError(
                f"update needs one norm sum and one step count for each of the {len(self.active)} active units; "
                f"got {len(norm_sums)} and {len(steps)}"
            )
        for unit, total, measured in zip(self.active, map(float, norm_sums), map(int, steps), strict=True):
            self.refused_sums += not math.isfinite(total)
            if measured < 1 or not math.isfinite(total):
                self._missed[unit] += 1
            else:
                self._absorb(unit, total / measured)

    def observe(self, unit: int, norm_sum: float, steps: int) -> None:
        """Let what was measured of a unit that was not active enter its score; arguments as in ``update``."""
        if steps >= 1 and math.isfinite(norm_sum):
            self._absorb(unit, norm_sum / steps)

    def _absorb(self, unit: int, mean: float) -> None:
        """One step of Eq. (4) for one unit."""
        if self.config.score == "mean_square":
            mean /= self.sizes[unit]
        elif self.config.cold_start == "official" and self.round_length == 1:
            mean /= self.config.inner_steps  # the published code divides by T however many steps were made
        # G ← β·G + (1−β)·x; the published code stores, and feeds back, G / (1−β^k)
        beta = self.config.score_beta
        self._updates[unit] += 1
        self._ema[unit] = beta * self._ema[unit] + (1 - beta) * mean
        if self.config.ema == "official":
            self._ema[unit] /= 1 - beta ** self._updates[unit]

    @property
    def scores(self) -> tuple[float, ...]:
        """G_u as the preset reads it, before normalisation and η; 0 for a unit that was never measured."""
        if self.config.ema != "corrected_on_read":
            return tuple(self._ema)
        beta = self.config.score_beta
        return tuple(g / (1 - beta**k) if k else 0.0 for g, k in zip(self._ema, self._updates, strict=True))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Distribution of the next draw's first unit, before any forced choice."""
        return tuple(self._rule.probabilities(self._context()).tolist())

    def _context(self) -> DrawContext:
        scores = torch.tensor(self.scores, dtype=torch.float64, device=CPU)
        if self.most_cold_rounds < math.inf and any(self._updates):  # what the cold start did not get to see is average
            measured = torch.tensor([updates > 0 for updates in self._updates], device=CPU)
            scores = torch.where(measured, scores, scores[measured].clamp(max=LARGEST_SCORE).mean())
        return DrawContext(
            scores=scores,
            exponents=self._exponents(scores),
            log_weights=self._log_weights,
            visits=tuple(self.visits),
            last_visit=tuple(self.last_visit),
            left=tuple(self._left),
            epsilon=self.config.epsilon,
        )

    def _exponents(self, scores: Tensor) -> Tensor:
        signal = scores if self.config.score == "mean_square" else scores.square()
        signal = signal.clamp(max=LARGEST_EXPONENT)
        if self.config.score_normalisation == "relative" and signal.any():
            signal = signal / signal.max()  # first, so that the mean neither overflows nor is subnormal
            signal = signal / signal.mean()
        cap = min(self.config.exponent_cap, LARGEST_EXPONENT)
        exponents = (self.config.eta * signal).clamp(max=cap)
        floor = self.config.probability_floor
        if not floor:
            return exponents
        # P ← (1 − floor)·P + floor/B, as exponents again
        return (exponents.softmax(dim=0) * (1 - floor) + floor / len(self.sizes)).log()

    @property
    def entropy(self) -> float:
        """Entropy of ``probabilities`` over that of the uniform distribution, in [0, 1]."""
        if len(self.sizes) == 1:
            return 1.0
        nats = -sum(p * math.log(p) for p in self.probabilities if p > 0)
        return min(1.0, max(0.0, nats / math.log(len(self.sizes))))

    def _warn_of_collapse(self) -> None:
        """Say once when a few units get nearly all draws; half of 100 units alike are 0.85."""
        if self._warned or self.config.rule != "importance" or (entropy := self.entropy) >= COLLAPSED:
            return
        self._warned = True
        logger.warning(
            "round %d is drawn from collapsed probabilities: their normalised entropy is %.2g (1 is uniform), so a few "
            "units get nearly all visits. Set probability_floor=0.5, which leaves every unit half of a uniform "
            "draw's chance, or lower eta (now %g).",
            self.round,
            entropy,
            self.config.eta,
        )

    @property
    def coverage(self) -> float:
        """Share of the units that were visited at least once."""
        return sum(visits > 0 for visits in self.visits) / len(self.visits)

    @property
    def stale_rounds(self) -> list[int]:
        """Rounds since each unit's last visit: 0 while it is active, all rounds so far if it never was."""
        return [self.round - last for last in self.last_visit]

    def starved(self) -> list[int]:
        """Units without a visit for more than 10·B / (mean units per round) rounds, hence at least 10.

        Drawn uniformly, a unit waits so long with probability e⁻¹⁰ = 4.5e-5.
        """
        drawn = sum(self.visits)
        if not drawn:
            return []
        limit = 10 * len(self.sizes) * (self.round + 1) / drawn
        return [unit for unit, stale in enumerate(self.stale_rounds) if stale > limit]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws depend on: numbers, lists and one tensor (the generator's state)."""
        state = {name.strip("_"): copy.copy(getattr(self, name)) for name in SAVED}
        return {**self._identity(), **state, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the tracker that made ``state`` would have.

        Raises:
            ValueError: ``state`` is incomplete or belongs to other units, another budget or another rule; nothing is
                changed then.
        """
        values, generator = self._checked(state)
        self._generator.set_state(generator)
        for name, value in values.items():
            setattr(self, name, value)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise the ValueError that ``load_state_dict`` would; change nothing."""
        self._checked(state)

    def _checked(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"the sampler's state lacks {', '.join(missing)}: it was not written by this version")
        for name, own in self._identity().items():
            if state[name] != own:
                raise ValueError(f"the sampler's state is for {name} = {state[name]}; this run has {own}")
        try:
            # int, list or tuple: converts, and copies the caller's lists
            values = {name: type(getattr(self, name))(state[name.strip("_")]) for name in SAVED}
            # A checkpoint read with map_location="cuda" brings the generator's state on the GPU.
            generator = state["generator"].to("cpu")
            torch.Generator(CPU).set_state(generator)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the sampler's state is damaged: {error}") from error
        count = len(self.sizes)
        short = [name for name in PER_UNIT if len(values[name]) != count]
        odd = [
            name
            for name in ("active", "_carried", "_left")
            if not all(type(unit) is int and 0 <= unit < count for unit in values[name])
        ]
        if short or odd or values["round_length"] not in (0, 1, self.config.inner_steps):
            found = ", ".join(name.strip("_") for name in (*short, *odd)) or "round_length"
            raise ValueError(f"the sampler's state is damaged: {found} cannot be of this run's {count} units")
        return values, generator

    def _identity(self) -> dict[str, Any]:
        """What a state must share with the tracker that loads it; what is short to print comes first."""
        own = {"rule": self.config.rule, "units": len(self.sizes), "parameters": sum(self.sizes), "budget": self.budget}
        return {**own, "sizes": list(self.sizes)}

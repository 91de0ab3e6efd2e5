"""What the tests of rules and tracker share: trackers with given scores, exact outcomes, a chi-square."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from misa_engine.method.config import MisaConfig
from misa_engine.method.sampling import ImportanceTracker

Outcome = tuple[tuple[int, ...], int | None]  # active units in order, refused unit
WEIGHTED = ("importance", "uniform", "static", "epsilon_greedy")
LAYER = (16, 4, 4, 16, 56, 56, 56)  # q k v o gate up down of Llama-3-8B, in 2**20 parameters
SMALL_SIZES = LAYER * 3


def tracker_with_scores(scores: Sequence[float], sizes: Sequence[int], budget: int, **options) -> ImportanceTracker:
    """A tracker past its cold start, whose plain EMA holds `scores`; P follows them alone unless a floor is given."""
    tracker = ImportanceTracker(sizes, budget, MisaConfig(**{"ema": "plain", "probability_floor": 0.0, **options}))
    count = len(sizes)
    past = {"ema": list(scores), "updates": [1] * count, "visits": [1] * count, "last_visit": [0] * count, "round": 0}
    tracker.load_state_dict({**tracker.state_dict(), **past})
    return tracker


def measure(tracker: ImportanceTracker, mean_square: Sequence[float] | None = None) -> None:
    """Close the round as if unit u's gradients had the given mean square (1 + u % 3 by default)."""
    steps = tracker.round_length
    values = [1.0 + unit % 3 if mean_square is None else mean_square[unit] for unit in tracker.active]
    sums = [steps * value * tracker.sizes[unit] for unit, value in zip(tracker.active, values, strict=True)]
    if tracker.config.score == "squared_mean_norm":
        sums = [steps * value for value in values]
    tracker.update(sums, [steps] * len(sums))


def exact_outcomes(
    weights: Sequence[float], sizes: Sequence[int], budget: int, fill: str, first: int | None = None
) -> dict[Outcome, float]:
    """Probability of each (active units in order, refused unit), by walking every sequence of draws."""
    outcomes: dict[Outcome, float] = defaultdict(float)

    def walk(taken: tuple[int, ...], passed: frozenset[int], room: int, probability: float) -> None:
        candidates = [unit for unit in range(len(sizes)) if unit not in taken and unit not in passed]
        if not candidates or room < min(sizes):
            outcomes[taken, None] += probability
            return
        total = sum(weights[unit] for unit in candidates)
        for unit in candidates:
            share = probability * weights[unit] / total
            if sizes[unit] <= room:
                walk((*taken, unit), passed, room - sizes[unit], share)
            elif fill == "skip":
                walk(taken, passed | {unit}, room, share)
            else:
                outcomes[taken, unit] += share

    start = () if first is None else (first,)
    walk(start, frozenset(), budget - sum(sizes[unit] for unit in start), 1.0)
    return outcomes


def chi_square_excess(observed: Counter, expected: dict) -> float:
    """Pearson's statistic of counts against probabilities, over its 99.9% quantile (Wilson and Hilferty)."""
    total = sum(observed.values())
    assert set(observed) <= {key for key, p in expected.items() if p > 0}
    kept = {key: p for key, p in expected.items() if p * total >= 5}
    statistic = sum((observed[key] - p * total) ** 2 / (p * total) for key, p in kept.items())
    degrees = max(1, len(kept) - 1)
    return statistic / (degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3)

"""Means with their standard errors, paired differences, and the exact test of discordant pairs. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean over the items of a task."""

    value: float
    stderr: float | None
    """Of the mean over items drawn like these; None for fewer than two."""
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """What one model has more than another on the same items."""

    difference: float
    stderr: float | None
    """Of the difference, from the differences of single items: what both models find easy or hard cancels."""
    n: int
    wins: int
    """Items on which the first has the larger value."""
    losses: int
    """Items on which it has the smaller."""
    p_value: float | None
    """Of McNemar's exact test; None where values are other than 0 and 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Mean and standard error.

    Args:
        values: one an item.
        weights: of the items (tokens of a text); None weighs all the same, and the error is sd / sqrt(n).

    Raises:
        ValueError: no values, or weights that sum to nothing.
    """
    weights = weights if weights is not None else [1.0] * len(values)
    total = math.fsum(weights)
    if not values or total <= 0:
        raise ValueError("a mean needs at least one value of weight above 0; got none")
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    n = len(values)
    if n < 2:
        return Estimate(mean, None, n)
    # Var(Σwv/Σw) of a ratio: Σw²(v − mean)² / (Σw)² · n/(n − 1), which is sd²/n where weights are equal
    spread = math.fsum((w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return Estimate(mean, math.sqrt(spread * n / (n - 1)) / total, n)


def paired(first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None) -> Paired:
    """The difference of two models on the same items.

    Args:
        first: a value an item.
        second: the other model's, in the same order.
        weights: of the items, the same for both.

    Raises:
        ValueError: no values, or numbers of values that differ.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values must be of the same items; got {len(first)} and {len(second)}")
    found = estimate([a - b for a, b in zip(first, second, strict=True)], weights)
    wins = sum(a > b for a, b in zip(first, second, strict=True))
    losses = sum(a < b for a, b in zip(first, second, strict=True))
    binary = {*first, *second} <= {0, 1}
    return Paired(found.value, found.stderr, found.n, wins, losses, mcnemar(wins, losses) if binary else None)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value that wins and losses are equally likely; items that tie say nothing.

    Args:
        wins: items that only the first model solved.
        losses: items that only the second solved.
    """
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)

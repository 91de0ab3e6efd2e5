"""How far a lossy delta is from the model: relative Frobenius norms, a tensor and in all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Numbers at a time: 32 MiB in float64.
_CHUNK = 1 << 22


@dataclass
class ErrorSum:
    """Sums of squares over one tensor or several, in float64."""

    missed: float = 0.0
    """‖restored − result‖²"""
    moved: float = 0.0
    """‖result − base‖²"""
    size: float = 0.0
    """‖result‖²"""

    @classmethod
    def of(cls, base: Tensor, result: Tensor, restored: Tensor, *, lossy: bool) -> ErrorSum:
        """The sums of one tensor.

        Args:
            base: (count,), where it starts.
            result: (count,), what it should be.
            restored: (count,), what the delta gives.
            lossy: whether ``restored`` may differ.
        """
        found = cls()
        for a, b, c in zip(base.split(_CHUNK), result.split(_CHUNK), restored.split(_CHUNK), strict=True):
            wide = b.double()
            found.size += float(wide.square().sum())
            found.moved += float((wide - a.double()).square_().sum())
            if lossy:
                found.missed += float((wide - c.double()).square_().sum())
        return found

    @property
    def of_change(self) -> float:
        """‖restored − result‖ / ‖result − base‖."""
        return _ratio(self.missed, self.moved)

    @property
    def of_weights(self) -> float:
        """‖restored − result‖ / ‖result‖."""
        return _ratio(self.missed, self.size)

    def add(self, other: ErrorSum) -> None:
        """Count more tensors."""
        self.missed += other.missed
        self.moved += other.moved
        self.size += other.size


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else 0.0

"""How far a lossy delta is from the model: relative Frobenius norms, a tensor and in all."""

from __future__ import annotations

from torch import Tensor

#: Numbers at a time: 32 MiB in float64.
_CHUNK = 1 << 22


class ErrorSum:
    """Sums of squares over the tensors of a model, in float64."""

    def __init__(self) -> None:
        self._missed = self._moved = self._size = 0.0

    @property
    def of_change(self) -> float:
        """‖restored − result‖ / ‖result − base‖ over all tensors."""
        return _ratio(self._missed, self._moved)

    @property
    def of_weights(self) -> float:
        """‖restored − result‖ / ‖result‖ over all tensors."""
        return _ratio(self._missed, self._size)

    def add(self, base: Tensor, result: Tensor, restored: Tensor, *, lossy: bool) -> tuple[float, float]:
        """Count one tensor.

        Args:
            base: (count,), where it starts.
            result: (count,), what it should be.
            restored: (count,), what the delta gives.
            lossy: whether ``restored`` may differ.

        Returns:
            Its own two errors, of the change and of the weights.
        """
        missed = moved = size = 0.0
        for a, b, c in zip(base.split(_CHUNK), result.split(_CHUNK), restored.split(_CHUNK), strict=True):
            wide = b.double()
            size += float(wide.square().sum())
            moved += float((wide - a.double()).square_().sum())
            if lossy:
                missed += float((wide - c.double()).square_().sum())
        self._missed += missed
        self._moved += moved
        self._size += size
        return _ratio(missed, moved), _ratio(missed, size)


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else 0.0

"""The rest rules in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..split_float.reference import random_bits
from ..tiles import CHUNK

#: Mean squares below count as no gradient: their float32 squares are subnormal or 0, and a factor would be noise.
TINY = 1e-36


def factor(mean_square: Tensor) -> Tensor:
    """1/√x, and 0 where there is nothing to divide by."""
    return torch.where(mean_square < TINY, 0.0, mean_square.rsqrt())


def measure_reference(grad: Tensor, sumsq: Tensor, rows: Tensor, cols: Tensor, sides: Sequence[str]) -> None:
    """``sumsq`` = Σ G², and the factors of ``sides`` in the front of ``rows`` and ``cols``."""
    n, m = grad.shape
    by_row = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32).square_()
    sumsq.copy_(by_row.sum(dtype=torch.float64))
    if sides == ("rows",):
        rows[:n] = factor(by_row / m)
    elif sides:
        square = grad.float().square()
        row, col = rows[:n].fill_(1), cols[:m].fill_(1)
        for side in sides:  # each replaces its own former factor: X = diag(row)·G·diag(col)
            if side == "rows":
                row.copy_(factor(square @ col.square() / m))
            else:
                col.copy_(factor(row.square() @ square / n))


def move_reference(
    weight: Tensor,
    grad: Tensor,
    sumsq: Tensor,
    rows: Tensor,
    cols: Tensor,
    sides: Sequence[str],
    rule: str,
    rate: float,
    keys: tuple[int, int],
) -> None:
    """Move the weight by the rule, some rows at a time so that the temporaries stay in the cache."""
    if not math.isfinite(sumsq.item()):
        return
    n, m = weight.shape
    some = max(1, CHUNK // m)
    for first in range(0, n, some):
        part = slice(first, min(n, first + some))
        step = grad[part].float()
        if rule == "sign":
            step = step.sign()
        if "rows" in sides:
            step = step * rows[part, None]
        if "cols" in sides:
            step = step * cols[:m]
        moved = weight[part].float().sub_(step * rate)
        if weight.dtype == torch.bfloat16:
            _round_into(moved, weight[part], random_bits(first * m, moved.numel(), *keys, device=weight.device))
        else:
            weight[part] = moved


def _round_into(exact: Tensor, weight: Tensor, random: Tensor) -> None:
    """Round to bfloat16, up or down at random; a value that would become infinite is cut off instead."""
    bits = exact.view(torch.int32)
    rounded = ((bits + random.view_as(bits)) >> 16).short()
    cut = (bits >> 16).short()
    weight.view(torch.int16).copy_(torch.where((rounded & 0x7F80) == 0x7F80, cut, rounded))

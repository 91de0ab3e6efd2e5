"""One step without state for a matrix outside the draw, from the gradient that the backward pass is about to free.

    W -= rate · u(G)        in bfloat16 rounded up or down at random, so that the expectation is exact

    sign        u = sign(G)
    row_norm    u = G with each output unit's row divided by its rms
    sinkhorn    u = G whose rows and columns are divided by their rms in turn, five passes (SinkGD, arXiv 2502.06742)
    sgd         u = G

An output unit is a row of torch's ``Linear.weight`` and a column of transformers' ``Conv1D.weight`` (``transposed``).
All but ``sgd`` move each element by about ``rate``, whatever the gradient's scale. A gradient that is not finite moves
nothing, and a row without gradient stays where it is.

Rounding: a step of 1e-6 is far below half an ulp of a bfloat16 weight of 0.02 (6e-5), so rounding to nearest would move
nothing, ever. The random bits depend on ``seed`` and the element's index alone, as in ``split_float``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import uses_triton
from ..split_float import random_keys
from .reference import measure_reference, move_reference

__all__ = ["RULES", "RestScratch", "rest_step"]

RULES = ("sign", "row_norm", "sinkhorn", "sgd")

#: Normalisations of rows and columns together, as in the paper's experiments.
SINKHORN_PASSES = 5


@dataclass
class RestScratch:
    """Factors of one matrix's rows and columns, allocated once for the largest matrix."""

    rows: Tensor  # (max rows,) float32
    cols: Tensor  # (max columns,) float32
    sums: Tensor  # (max of both,) float32, sums of squares before they become factors

    @classmethod
    def allocate(cls, rows: int, cols: int, device: torch.device | str) -> RestScratch:
        """For matrices of at most ``rows`` rows and ``cols`` columns."""
        sizes = (rows, cols, max(rows, cols))
        return cls(*(torch.zeros(size, dtype=torch.float32, device=device) for size in sizes))

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.rows.nbytes + self.cols.nbytes + self.sums.nbytes


def passes(rule: str, transposed: bool) -> tuple[str, ...]:
    """Which sides are normalised, in their order."""
    if rule == "row_norm":
        return ("cols",) if transposed else ("rows",)
    if rule == "sinkhorn":
        first, second = ("cols", "rows") if transposed else ("rows", "cols")
        return tuple(second if index % 2 else first for index in range(SINKHORN_PASSES))
    return ()


@torch.no_grad()
def rest_step(
    weight: Tensor,  # (rows, columns), float32 or bfloat16, contiguous, modified in place
    grad: Tensor,  # (rows, columns), float32 or bfloat16, contiguous
    sumsq: Tensor,  # (1,) float32, modified in place: Σ G², not finite where G is not
    scratch: RestScratch,  # overwritten
    *,
    rule: str,  # of RULES
    rate: float,  # learning rate of the matrix
    seed: int,  # 0 <= seed < 2^63, another one for each matrix and step; without effect on float32 weights
    transposed: bool = False,  # output units are columns
    backend: str,
) -> None:
    """Measure the gradient, then move the weight by the rule.

    Raises:
        ValueError: the rule is unknown, shapes differ, or something is not a contiguous matrix.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    if weight.ndim != 2 or weight.shape != grad.shape or not (weight.is_contiguous() and grad.is_contiguous()):
        raise ValueError(
            f"weight and gradient must be contiguous matrices of one shape; got {tuple(weight.shape)} with strides "
            f"{weight.stride()} and {tuple(grad.shape)} with strides {grad.stride()}"
        )
    sides, keys = passes(rule, transposed), random_keys(seed)
    if not uses_triton(backend, weight):
        measure_reference(grad, sumsq, scratch.rows, scratch.cols, sides)
        move_reference(weight, grad, sumsq, scratch.rows, scratch.cols, sides, rule, rate, keys)
        return
    from .kernel import launch_measure, launch_move

    launch_measure(grad, sumsq, scratch.rows, scratch.cols, scratch.sums, sides)
    launch_move(weight, grad, sumsq, scratch.rows, scratch.cols, sides, rule, rate, keys)

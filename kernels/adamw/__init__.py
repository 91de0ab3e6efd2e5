"""AdamW over the arena in one pass: moments, weight write-back, residual bits and the sum of squares.

The formula, in float32 with every operation rounded once and none fused, so that the CPU reference, Triton's
interpreter and the GPU agree bit for bit (the coefficients are those of ``finalise``):

    m ← β1·m + (1-β1)·g
    v ← β2·v + (1-β2)·g²
    w ← w + (-lr·wd·w + (-lr·c₀)·m / (√v + c₁·ε))

Decay and step are added to each other first: lr·wd is often below half an ulp of 1, and as a factor on the weight it
would round to nothing or to twice its size.

With 8-bit moments (blockwise8) m and v are decoded, updated in float32 and quantised again in the same pass; the
weight steps along the fresh float32 values. Arithmetic is what takes the time there, so that one division serves the
step and the code of m, and the factors of a group are multiplied before its codes:

    m ← f(c)·(a·β1) + (1-β1)·g             f(c) = c/(254-|c|), from a table
    v ← c²·((s/255)²·β2) + (1-β2)·g²
    x = m·(254/a),  q = 254/((254+|x|)·(√v + c₁·ε))
    w ← w + (-lr·wd·w + (m·(-lr·c₀/254))·((254+|x|)·q)),  code of m = round(x·((√v + c₁·ε)·q))

An element whose v is not finite is stored as zero and does not step.

There is no ``triton.autotune``: each trial would apply the update once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import uses_triton
from ..finalise import closing_coefficients
from ..tiles import TileTable, first_grad_tile
from .reference import adamw_reference, closing_reference


@torch.no_grad()
def adamw(
    grad: Tensor,  # flat, bfloat16 or float32, begins with the gradient of arena element ``grad_start``
    m: Tensor,  # (capacity,) float32 | int8, first moment, modified in place
    v: Tensor,  # (capacity,) float32 | uint8, second moment, modified in place
    lo: Tensor | None,  # (capacity,) int16, lower half of bf16 weights, modified in place; None = no master weight
    tile_sumsq: Tensor | None,  # (max_tiles,) float32, modified in place: += Σ g² of the tile; None = not measured
    table: TileTable,  # the weights of its slots are modified in place
    *,
    backend: str,
    measured: Tensor | None = None,  # (max_tiles,) float32, added to tile_sumsq in place of the sum over ``grad``
    tiles: range | None = None,  # None = all tiles in use; ``slot.tiles`` = one slot
    grad_start: int = 0,  # ``slot.start`` where grad is the gradient of that slot alone, without padding
    m_scale: Tensor | None = None,  # (capacity/64,) float32, modified in place; None = float32 moments
    v_scale: Tensor | None = None,  # (capacity/64,) float32, modified in place
) -> None:
    """One AdamW step of every slot that ``finalise`` let run; of the others not a bit changes.

    bf16 weights with ``lo`` are exact float32 masters; without it they are rounded to nearest even at each step.
    """
    _check_moments(m, v, m_scale, v_scale)
    grad_tile = first_grad_tile(grad_start)  # also the check of ``grad_start``
    if not uses_triton(backend, grad):
        adamw_reference(grad, m, v, m_scale, v_scale, lo, tile_sumsq, table, measured, tiles, grad_start)
        return
    from .kernel import launch

    span = table.tile_range(tiles)
    launch(grad, m, v, m_scale, v_scale, lo, tile_sumsq, measured, table, span, grad_tile, closing=False)


@torch.no_grad()
def closing_step(
    m: Tensor,  # (capacity,) float32 | int8
    v: Tensor,  # (capacity,) float32 | uint8
    lo: Tensor | None,  # (capacity,) int16, modified in place; None = no master weight
    hyper: Tensor,  # (n_groups, 8) float32
    bias: Tensor,  # (n_groups, rows, 2) float32
    table: TileTable,  # the weights of its slots and slot_coef are modified in place
    *,
    backend: str,
    m_scale: Tensor | None = None,  # (capacity/64,) float32; None = float32 moments
    v_scale: Tensor | None = None,  # (capacity/64,) float32
) -> None:
    """Line 16 of Algorithm 1, once at the end of a round, for every slot with at least one Adam step.

    w ← w - lr·β1/(1-β1) · m / (√v/√(1-β2^t) + ε),  with the bias correction's √(1-β2^t) = 1 where it is off
    """
    _check_moments(m, v, m_scale, v_scale)
    closing_coefficients(hyper, bias, table, backend=backend)
    if not uses_triton(backend, m):
        closing_reference(m, v, m_scale, v_scale, lo, table)
        return
    from .kernel import launch

    launch(None, m, v, m_scale, v_scale, lo, None, None, table, table.tile_range(None), 0, closing=True)


def _check_moments(m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None) -> None:
    wanted = [torch.float32] * 2 if m_scale is None else [torch.int8, torch.uint8]
    assert [m.dtype, v.dtype] == wanted and (m_scale is None) == (v_scale is None), (m.dtype, v.dtype)

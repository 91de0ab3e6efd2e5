"""AdamW over the arena in one pass: moments, weight write-back, residual bits and the sum of squares.

The formula, in float32 with every operation rounded once and none fused, so that the CPU reference, Triton's
interpreter and the GPU agree bit for bit (the coefficients are those of ``finalise``):

    m ← β1·m + (1-β1)·g
    v ← β2·v + (1-β2)·g²
    w ← w + (-lr·wd·w + (-lr·c₀)·m / (√v + c₁·ε))

Decay and step are added to each other first: lr·wd is often below half an ulp of 1, and as a factor on the weight it
would round to nothing or to twice its size.

With 8-bit moments (blockwise8.py) m and v are decoded, updated in float32 and quantised again in the same pass; the
weight steps along the fresh float32 values.

There is no ``triton.autotune``: each trial would apply the update once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import on_device, triton_kernels, uses_triton
from .blockwise8 import GROUP, compress, expand
from .norm import chunk_size, first_grad_tile, square_root, tile_sums_into
from .split_float import join_into, split_into
from .tiles import BLOCK, HYPER, Slot, TileTable

#: 8 programs of 128 threads then fit the 65,536 registers of a multiprocessor. The compiler would take 69-71 with 8-bit
#: moments on sm_80 and with unaligned weights; held to 64 it spills nothing. AMD has no such option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 64}


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
    grad_tile = first_grad_tile(grad_start)
    if not uses_triton(backend, grad):
        _adamw_reference(grad, m, v, m_scale, v_scale, lo, tile_sumsq, table, measured, tiles, grad_start)
        return
    span = table.tile_range(tiles)
    _launch(grad, m, v, m_scale, v_scale, lo, tile_sumsq, measured, table, span, grad_tile, closing=False)


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
    if not uses_triton(backend, m):
        _closing_reference(m, v, m_scale, v_scale, lo, hyper, bias, table)
        return
    with on_device(m):
        triton_kernels().closing_coefficients_kernel[(1,)](
            table.slot_group,
            table.slot_step,
            table.slot_coef,
            hyper,
            bias,
            len(table.slots),
            bias.shape[1],
            enable_fp_fusion=False,
        )
    _launch(None, m, v, m_scale, v_scale, lo, None, None, table, table.tile_range(None), 0, closing=True)


def _check_moments(m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None) -> None:
    wanted = [torch.float32] * 2 if m_scale is None else [torch.int8, torch.uint8]
    assert [m.dtype, v.dtype] == wanted and (m_scale is None) == (v_scale is None), (m.dtype, v.dtype)


def _adamw_reference(
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    lo: Tensor | None,
    tile_sumsq: Tensor | None,
    table: TileTable,
    measured: Tensor | None,
    tiles: range | None,
    grad_start: int,
) -> None:
    slots = table.slots_in(tiles)
    chunk = chunk_size(slots)
    x, y, z = torch.empty((3, chunk), device=grad.device)
    sums = torch.empty(max((slot.n_tiles for _, slot in slots), default=0), device=grad.device)
    for index, slot in slots:
        # As tensors without dimensions: a Python number in an operation costs 2 µs, a quarter of it.
        beta1, gain1, beta2, gain2, eps, minus_step, minus_decay, runs = table.slot_coef[index].unbind()
        if not runs:
            continue
        decays = bool(minus_decay)
        for first in range(0, slot.numel, chunk):
            n = min(chunk, slot.numel - first)
            here = slice(slot.start + first, slot.start + first + n)
            (m_, v_), a, b = _load_moments(m, v, m_scale, v_scale, here), x[:n], y[:n]
            g = grad[here.start - grad_start : here.stop - grad_start]
            g = g if grad.dtype == torch.float32 else b.copy_(g)

            # m ← β1·m + (1-β1)·g
            m_.mul_(beta1).add_(torch.mul(g, gain1, out=a))
            # v ← β2·v + (1-β2)·g²
            torch.mul(g, g, out=a)
            if tile_sumsq is not None and measured is None:
                tile_sums_into(a, sums[first // BLOCK :])
            v_.mul_(beta2).add_(a.mul_(gain2))
            # b = (-lr·c₀)·m / (√v + c₁·ε)
            square_root(v_, out=a).add_(eps)
            torch.mul(m_, minus_step, out=b).div_(a)

            w = _load_weight(slot, first, n, lo, z)
            if decays:
                b.add_(torch.mul(w, minus_decay, out=a))
            _store_weight(w.add_(b), slot, first, n, lo)
            if m_scale is not None and v_scale is not None:
                compress(m_, v_, m[here], v[here], *_scales(m_scale, v_scale, here), backend="reference")
        if tile_sumsq is not None:
            own = slice(slot.first_tile, slot.first_tile + slot.n_tiles)
            tile_sumsq[own] += sums[: slot.n_tiles] if measured is None else measured[own]


def _closing_reference(
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    lo: Tensor | None,
    hyper: Tensor,
    bias: Tensor,
    table: TileTable,
) -> None:
    n = len(table.slots)
    group, step = table.slot_group[:n].long(), table.slot_step[:n]
    factor = bias[group, step.long().clamp(max=bias.shape[1] - 1), 1]
    closing = -(hyper[group, HYPER.index("closing")] * factor)
    eps = hyper[group, HYPER.index("eps")] * factor
    chunk = chunk_size(table.slots_in(None))
    x, y, z = torch.empty((3, chunk), device=m.device)
    columns = zip(table.slots, step.tolist(), closing.tolist(), eps.tolist(), strict=True)
    for slot, slot_step, minus_step, slot_eps in columns:
        for first in range(0, slot.numel if slot_step else 0, chunk):
            n = min(chunk, slot.numel - first)
            here = slice(slot.start + first, slot.start + first + n)
            m_, v_ = _load_moments(m, v, m_scale, v_scale, here)
            denominator = square_root(v_, out=x[:n]).add_(slot_eps)
            w = _load_weight(slot, first, n, lo, z)
            w.add_(torch.mul(m_, minus_step, out=y[:n]).div_(denominator))
            _store_weight(w, slot, first, n, lo)


def _load_moments(
    m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None, here: slice
) -> tuple[Tensor, Tensor]:
    """Give the float32 moments: the arena's own memory, or decoded copies."""
    if m_scale is None or v_scale is None:
        return m[here], v[here]
    decoded = torch.empty_like(m[here], dtype=torch.float32), torch.empty_like(v[here], dtype=torch.float32)
    expand(m[here], v[here], *_scales(m_scale, v_scale, here), *decoded, backend="reference")
    return decoded


def _scales(m_scale: Tensor, v_scale: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    groups = slice(here.start // GROUP, -(-here.stop // GROUP))
    return m_scale[groups], v_scale[groups]


def _load_weight(slot: Slot, first: int, n: int, lo: Tensor | None, scratch: Tensor) -> Tensor:
    """Give the float32 weight: the model's own memory, or the master joined in ``scratch``."""
    weight = slot.weight[first : first + n]
    if weight.dtype == torch.float32:
        return weight
    if lo is None:
        return scratch[:n].copy_(weight)
    join_into(weight, lo[slot.start + first : slot.start + first + n], scratch[:n])
    return scratch[:n]


def _store_weight(w: Tensor, slot: Slot, first: int, n: int, lo: Tensor | None) -> None:
    """Write back what ``_load_weight`` gave; ``w`` is scratch afterwards."""
    weight = slot.weight[first : first + n]
    if weight.dtype == torch.float32:
        return
    if lo is None:
        weight.copy_(w)  # rounds to nearest even
    else:
        split_into(w, weight, lo[slot.start + first : slot.start + first + n])


def _launch(
    grad: Tensor | None,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    lo: Tensor | None,
    tile_sumsq: Tensor | None,
    measured: Tensor | None,
    table: TileTable,
    tiles: range,
    grad_tile: int,
    *,
    closing: bool,
) -> None:
    """One launch for each dtype among the weights: one for every ordinary model."""
    for dtype in sorted({slot.weight.dtype for slot in table.slots}, key=str):
        bf16 = dtype == torch.bfloat16
        with on_device(m):
            triton_kernels().adamw_kernel[(len(tiles),)](
                grad,
                m,
                v,
                m_scale,
                v_scale,
                lo if bf16 else None,
                tile_sumsq,
                measured,
                table.wptr,
                table.length,
                table.slot,
                table.slot_bf16,
                table.slot_coef,
                tiles.start,
                grad_tile,
                BF16=bf16,
                ALIGNED=table.aligned,
                CLOSING=closing,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
                **REGISTERS,
            )

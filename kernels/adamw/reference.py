"""AdamW and the closing step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import square_root, tile_sums_into
from ..blockwise8.reference import expand_decayed, expand_reference, step_and_quantise
from ..split_float.reference import join_into, split_into
from ..tiles import BLOCK, GROUP, Coefficients, Slot, TileTable, chunk_size, chunks


def adamw_reference(
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
    """One step, operation by operation; arguments as in ``adamw``."""
    slots = table.slots_in(tiles)
    chunk = chunk_size(slots)
    x, y, z = torch.empty((3, chunk), device=grad.device)
    sums = torch.empty(max((slot.n_tiles for _, slot in slots), default=0), device=grad.device)
    for index, slot in slots:
        # As tensors without dimensions: a Python number in an operation costs 2 µs, a quarter of it.
        coef = Coefficients(*table.slot_coef[index].unbind())
        if not coef.runs:
            continue
        decays = bool(coef.minus_decay)
        for first, n in chunks(slot.numel):
            here = slice(slot.start + first, slot.start + first + n)
            a, b = x[:n], y[:n]
            g = grad[here.start - grad_start : here.stop - grad_start]
            g = g if grad.dtype == torch.float32 else b.copy_(g)

            # β1·m, β2·v
            if m_scale is None or v_scale is None:
                m_, v_ = m[here].mul_(coef.beta1), v[here].mul_(coef.beta2)
            else:
                codes = m[here], v[here], *_scales(m_scale, v_scale, here)
                m_, v_ = expand_decayed(*codes, coef.beta1, coef.beta2)
            # m ← β1·m + (1-β1)·g
            m_.add_(torch.mul(g, coef.gain1, out=a))
            # v ← β2·v + (1-β2)·g²
            torch.mul(g, g, out=a)
            if tile_sumsq is not None and measured is None:
                tile_sums_into(a, sums[first // BLOCK :])
            v_.add_(a.mul_(coef.gain2))
            # b = (-lr·c₀)·m / (√v + c₁·ε)
            if m_scale is None:
                square_root(v_, out=a).add_(coef.eps)
                torch.mul(m_, coef.minus_step, out=b).div_(a)
            else:
                b = step_and_quantise(m_, v_, coef.minus_step, coef.eps, *codes)

            w = _load_weight(slot, first, n, lo, z)
            if decays:
                b.add_(torch.mul(w, coef.minus_decay, out=a))
            _store_weight(w.add_(b), slot, first, n, lo)
        if tile_sumsq is not None:
            own = slice(slot.first_tile, slot.first_tile + slot.n_tiles)
            tile_sumsq[own] += sums[: slot.n_tiles] if measured is None else measured[own]


def closing_reference(
    m: Tensor,
    v: Tensor,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    lo: Tensor | None,
    table: TileTable,
) -> None:
    """Line 16 with the coefficients of ``closing_coefficients``; arguments as in ``closing_step``."""
    slots = table.slots_in(None)
    x, y, z = torch.empty((3, chunk_size(slots)), device=m.device)
    for index, slot in slots:
        coef = Coefficients(*table.slot_coef[index].unbind())
        if not coef.runs:
            continue
        for first, n in chunks(slot.numel):
            here = slice(slot.start + first, slot.start + first + n)
            m_, v_ = _load_moments(m, v, m_scale, v_scale, here)
            # w ← w + (-lr·β1/(1-β1)·c₁)·m / (√v + c₁·ε)
            denominator = square_root(v_, out=x[:n]).add_(coef.eps)
            w = _load_weight(slot, first, n, lo, z)
            w.add_(torch.mul(m_, coef.minus_step, out=y[:n]).div_(denominator))
            _store_weight(w, slot, first, n, lo)


def _load_moments(
    m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None, here: slice
) -> tuple[Tensor, Tensor]:
    """Give the float32 moments: the arena's own memory, or decoded copies."""
    if m_scale is None or v_scale is None:
        return m[here], v[here]
    decoded = torch.empty_like(m[here], dtype=torch.float32), torch.empty_like(v[here], dtype=torch.float32)
    expand_reference(m[here], v[here], *_scales(m_scale, v_scale, here), *decoded)
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

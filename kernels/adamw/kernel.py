"""The fused update as one Triton kernel, a program a tile, and its launcher. Rules of all kernels: ``kernels``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..blockwise8.kernel import decode_first, decode_second, encode
from ..columns import (
    COEF_BETA1,
    COEF_BETA2,
    COEF_COLUMNS,
    COEF_EPS,
    COEF_GAIN1,
    COEF_GAIN2,
    COEF_MINUS_DECAY,
    COEF_MINUS_STEP,
    COEF_RUNS,
)
from ..tiles import BLOCK, TileTable
from ..tiles import GROUP as _GROUP

GROUP = tl.constexpr(_GROUP)

#: 8 programs of 128 threads then fit the 65,536 registers of a multiprocessor. The compiler would take 69-71 with 8-bit
#: moments on sm_80 and with unaligned weights; held to 64 it spills nothing. AMD has no such option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 64}


@triton.jit(do_not_specialize=["first_tile", "grad_tile"])
def adamw_kernel(
    grad,  # bf16 | f32, begins with the gradient of tile grad_tile, not read outside the slots; None if CLOSING
    m,  # (capacity,) f32 | i8, in place
    v,  # (capacity,) f32 | u8, in place
    m_scale,  # (capacity/64,) f32, in place; None = m and v are f32
    v_scale,  # (capacity/64,) f32, in place
    lo,  # (capacity,) i16, in place; None = no master weight
    tile_sumsq,  # (max_tiles,) f32, in place; None = not measured
    measured,  # (max_tiles,) f32; None = sum over grad
    wptr,  # (max_tiles,) i64
    length,  # (max_tiles,) i32
    slot,  # (max_tiles,) i32
    slot_bf16,  # (max_slots,) i32
    slot_coef,  # (max_slots, 8) f32
    first_tile,  # i32, the tile of program 0
    grad_tile,  # i32
    BF16: tl.constexpr,  # dtype of the weights that this launch handles
    ALIGNED: tl.constexpr,  # weights allow 16-byte accesses
    CLOSING: tl.constexpr,  # the step along the first moment alone, moments unchanged
    BLOCK: tl.constexpr,
):
    """One AdamW step of one tile."""
    tile = first_tile + tl.program_id(0)
    n = tl.load(length + tile)
    if n == 0:
        return
    index = tl.load(slot + tile)
    coef = slot_coef + index * COEF_COLUMNS
    if (tl.load(coef + COEF_RUNS) == 0.0) | (tl.load(slot_bf16 + index) != BF16):
        return

    if BF16:
        weight = tl.load(wptr + tile).to(tl.pointer_type(tl.int16))
    else:
        weight = tl.load(wptr + tile).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        # Without these two hints the loads and stores of the weight are scalar.
        weight = tl.multiple_of(weight, 16)
        n = tl.multiple_of(n, 16)
    lane = tl.arange(0, BLOCK)
    inside = lane < n
    at = tile.to(tl.int64) * BLOCK + lane

    # The padding of a slot's last tile belongs to the arena: m, v and lo need no mask.
    INT8: tl.constexpr = m_scale is not None
    if INT8:
        group = tile.to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        m_new = decode_first(tl.load(m + at), tl.load(m_scale + group), BLOCK)
        v_new = decode_second(tl.load(v + at), tl.load(v_scale + group), BLOCK)
    else:
        m_new = tl.load(m + at)
        v_new = tl.load(v + at)
    if not CLOSING:
        grad_at = (tile - grad_tile).to(tl.int64) * BLOCK + lane
        g = tl.load(grad + grad_at, mask=inside, other=0.0).to(tl.float32)
        square = g * g
        # m <- beta1 * m + gain1 * g;  v <- beta2 * v + gain2 * g^2
        m_new = tl.load(coef + COEF_BETA1) * m_new + tl.load(coef + COEF_GAIN1) * g
        v_new = tl.load(coef + COEF_BETA2) * v_new + tl.load(coef + COEF_GAIN2) * square
        if tile_sumsq is not None:
            if measured is None:
                total = tl.sum(square, axis=0)
            else:
                total = tl.load(measured + tile)
            tl.store(tile_sumsq + tile, tl.load(tile_sumsq + tile) + total)
    root = tl.sqrt_rn(v_new)
    if not CLOSING:
        if INT8:
            m8, v8, a, s = encode(m_new, v_new, root, inside, BLOCK)
            tl.store(m + at, m8)
            tl.store(v + at, v8)
            tl.store(m_scale + group, a)
            tl.store(v_scale + group, s)
        else:
            tl.store(m + at, m_new)
            tl.store(v + at, v_new)

    # step = minus_step * m / (sqrt(v) + eps), from the moments before they are quantised
    step = tl.div_rn(tl.load(coef + COEF_MINUS_STEP) * m_new, root + tl.load(coef + COEF_EPS))

    if not BF16:
        w = tl.load(weight + lane, mask=inside, other=0.0)
    else:
        bits = tl.load(weight + lane, mask=inside, other=0).to(tl.int32) << 16
        if lo is not None:
            bits += tl.load(lo + at).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)

    # w <- w + (minus_decay * w + step)
    w += tl.load(coef + COEF_MINUS_DECAY) * w + step

    if not BF16:
        tl.store(weight + lane, w, mask=inside)
    else:
        # The NaN of a GPU is 0x7FFFFFFF, whose upper half would round to -0; this one stays a NaN.
        bits = tl.where(w == w, w.to(tl.int32, bitcast=True), 0x7FC00000)
        if lo is not None:
            hi = (bits + 0x8000) >> 16
            tl.store(lo + at, bits.to(tl.int16))
        else:
            hi = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(weight + lane, hi.to(tl.int16), mask=inside)


def launch(
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
    """Launch ``adamw_kernel`` over ``tiles``, once for each dtype among the weights: once for every ordinary model."""
    for dtype in sorted({slot.weight.dtype for slot in table.slots}, key=str):
        bf16 = dtype == torch.bfloat16
        with on_device(m):
            adamw_kernel[(len(tiles),)](
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

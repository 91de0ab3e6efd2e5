"""The fused update as one Triton kernel, a program a tile, and its launcher. Rules of all kernels: ``kernels``."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..blockwise8.kernel import decode_decayed, decode_decayed_second, decode_first, decode_second, encode_and_step
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
from ..tiles import HUGE as _HUGE

GROUP = tl.constexpr(_GROUP)
HUGE = tl.constexpr(_HUGE)

#: Warps of a program and registers of a thread, by the dtype of the moments. Float32: 8 elements a thread, and 64
#: registers let 8 programs share the 65,536 of a multiprocessor. 8 bits: 16 elements a thread, since its addresses and
#: coefficients take 120 instructions however many there are; 7 programs of 64 threads. AMD has no such option.
WARPS = {torch.float32: 4, torch.int8: 2}
REGISTERS = {} if torch.version.hip else {torch.float32: {"maxnreg": 64}, torch.int8: {"maxnreg": 144}}


@functools.lru_cache
def decoded_codes(device: torch.device) -> Tensor:
    """First moments of scale 1 by the byte of their code, c/(254 - |c|): (256,) float32. One for each device.

    Made there: a copy from the host would be waited for.
    """
    code = torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).float()
    return code / (254.0 - code.abs())


@triton.jit(do_not_specialize=["first_tile", "grad_tile"])
def adamw_kernel(
    grad,  # bf16 | f32, begins with the gradient of tile grad_tile, not read outside the slots; None if CLOSING
    m,  # (capacity,) f32 | i8, in place
    v,  # (capacity,) f32 | u8, in place
    m_scale,  # (capacity/64,) f32, in place; None = m and v are f32
    v_scale,  # (capacity/64,) f32, in place
    decoded,  # (256,) f32, first moments of scale 1 by the byte of their code; None if CLOSING or m and v are f32
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
    """One AdamW step of one tile. In one piece, half of it its arguments: what is loaded early is used late."""
    # Whatever does not depend on each other is loaded together, before anything is computed or any thread waits for
    # another: three trips to memory in series (table, coefficients, elements), each of them some 600 cycles.
    tile = first_tile + tl.program_id(0)
    n = tl.load(length + tile)
    index = tl.load(slot + tile)  # 0 in an unused tile
    address = tl.load(wptr + tile)
    coef = slot_coef + index * COEF_COLUMNS
    runs = tl.load(coef + COEF_RUNS)
    dtype = tl.load(slot_bf16 + index)
    eps = tl.load(coef + COEF_EPS)
    minus_step = tl.load(coef + COEF_MINUS_STEP)
    minus_decay = tl.load(coef + COEF_MINUS_DECAY)
    if not CLOSING:
        beta1 = tl.load(coef + COEF_BETA1)
        gain1 = tl.load(coef + COEF_GAIN1)
        beta2 = tl.load(coef + COEF_BETA2)
        gain2 = tl.load(coef + COEF_GAIN2)
    if (n == 0) | (runs == 0.0) | (dtype != BF16):
        return

    if BF16:
        weight = address.to(tl.pointer_type(tl.int16))
    else:
        weight = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        # Without these two hints the loads and stores of the weight are scalar.
        weight = tl.multiple_of(weight, 16)
        n = tl.multiple_of(n, 16)
    lane = tl.arange(0, BLOCK)
    inside = lane < n
    at = tile.to(tl.int64) * BLOCK + lane

    # The padding of a slot's last tile belongs to the arena: m, v and lo need no mask.
    if not CLOSING:
        grad_at = (tile - grad_tile).to(tl.int64) * BLOCK + lane
        g = tl.load(grad + grad_at, mask=inside, other=0.0)
    m_held = tl.load(m + at)
    v_held = tl.load(v + at)
    w_held = tl.load(weight + lane, mask=inside, other=0)
    if BF16 and lo is not None:
        lo_held = tl.load(lo + at)
    INT8: tl.constexpr = m_scale is not None
    if INT8:
        group = tile.to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        a = tl.load(m_scale + group)
        s = tl.load(v_scale + group)
        if not CLOSING:
            first_by_code = tl.load(decoded + tl.arange(0, 256))
    if not CLOSING:
        if tile_sumsq is not None:
            total = tl.load(tile_sumsq + tile)
            if measured is not None:
                total += tl.load(measured + tile)

    if CLOSING:
        m_new = decode_first(m_held, a, BLOCK) if INT8 else m_held
        v_new = decode_second(v_held, s, BLOCK) if INT8 else v_held
    else:
        # m <- beta1 * m + gain1 * g;  v <- beta2 * v + gain2 * g^2
        g = g.to(tl.float32)
        square = g * g
        if INT8:
            m_new = decode_decayed(m_held, a, beta1, first_by_code, BLOCK) + gain1 * g
            v_new = decode_decayed_second(v_held, s, beta2, BLOCK) + gain2 * square
        else:
            m_new = beta1 * m_held + gain1 * g
            v_new = beta2 * v_held + gain2 * square
        if tile_sumsq is not None:
            if measured is None:
                total += tl.sum(square, axis=0)
            tl.store(tile_sumsq + tile, total)

    # step = minus_step * m / (sqrt(v) + eps), from the moments before they are quantised
    if INT8 and not CLOSING:
        kept = inside & (v_new < HUGE)
        m_new = tl.where(kept, m_new, 0.0)
        root = tl.sqrt_rn(tl.where(kept, v_new, 0.0))
        m8, v8, a, s, step = encode_and_step(m_new, root, minus_step, eps, BLOCK)
        tl.store(m + at, m8)
        tl.store(v + at, v8)
        tl.store(m_scale + group, a)
        tl.store(v_scale + group, s)
    else:
        if not CLOSING:
            tl.store(m + at, m_new)
            tl.store(v + at, v_new)
        step = tl.div_rn(minus_step * m_new, tl.sqrt_rn(v_new) + eps)

    if not BF16:
        w = w_held
    else:
        bits = w_held.to(tl.int32) << 16
        if lo is not None:
            bits += lo_held.to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)

    # w <- w + (minus_decay * w + step)
    w += minus_decay * w + step

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
                decoded_codes(m.device) if m_scale is not None and not closing else None,
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
                num_warps=WARPS[m.dtype],
                enable_fp_fusion=False,
                **REGISTERS.get(m.dtype, {}),
            )

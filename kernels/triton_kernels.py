"""The Triton kernels. Plain references, signatures and launchers are in adamw.py, norm.py and split_float.py.

Imported only when the Triton backend runs. Rules that hold throughout:

* Element offsets are int64: ``program_id * BLOCK`` in int32 wraps silently at 2^31 elements.
* Integers that change from call to call are not specialised, so that no step compiles anything.
* float32 -> bfloat16 is done in integers: Triton's interpreter truncates ``.to(tl.bfloat16)``.
* ``sqrt_rn``, ``div_rn`` and ``enable_fp_fusion=False`` round every operation once, as numpy and torch do on a CPU.
* Loops with a bound on the device are ``while`` loops: ``range`` over a tensor fails in the interpreter of Triton 3.6
  with NumPy 2.4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blockwise8 import GROUP, decode_first, decode_second, encode


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
    coef = slot_coef + index * 8
    if (tl.load(coef + 7) == 0.0) | (tl.load(slot_bf16 + index) != BF16):
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
        m_new = tl.load(coef) * m_new + tl.load(coef + 1) * g
        v_new = tl.load(coef + 2) * v_new + tl.load(coef + 3) * square
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
    step = tl.div_rn(tl.load(coef + 5) * m_new, root + tl.load(coef + 4))

    if not BF16:
        w = tl.load(weight + lane, mask=inside, other=0.0)
    else:
        bits = tl.load(weight + lane, mask=inside, other=0).to(tl.int32) << 16
        if lo is not None:
            bits += tl.load(lo + at).to(tl.int32)
        w = bits.to(tl.float32, bitcast=True)

    # w <- w + (minus_decay * w + step)
    w += tl.load(coef + 6) * w + step

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


@triton.jit(do_not_specialize=["first_tile", "end_tile", "grad_tile"])
def sum_of_squares_kernel(
    grad,  # bf16 | f32, begins with the gradient of tile grad_tile, not read outside the slots
    partial,  # (max_tiles,) f32, out
    length,  # (max_tiles,) i32
    first_tile,  # i32
    end_tile,  # i32
    grad_tile,  # i32
    ALIGNED: tl.constexpr,  # the slots are multiples of 16 long
    ROWS: tl.constexpr,  # tiles of one program
    BLOCK: tl.constexpr,
):
    """partial[tile] = sum of g^2, 0 for unused tiles."""
    tile = first_tile + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = tile < end_tile
    n = tl.load(length + tile, mask=exists, other=0)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    lane = tl.arange(0, BLOCK)
    at = (tile - grad_tile).to(tl.int64)[:, None] * BLOCK + lane[None, :]
    g = tl.load(grad + at, mask=lane[None, :] < n[:, None], other=0.0).to(tl.float32)
    tl.store(partial + tile, tl.sum(g * g, axis=1), mask=exists)


@triton.jit
def _norm(partial, length, slot, slot_present, n_tiles):
    """Square root of the sum over the tiles of present slots, in a fixed order and in float64."""
    CHUNK: tl.constexpr = 8192
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), dtype=tl.float64)
    first = 0
    while first < n_tiles:
        tile = first + lane
        used = tile < n_tiles
        used = used & (tl.load(length + tile, mask=used, other=0) > 0)
        index = tl.load(slot + tile, mask=used, other=0)
        used = used & (tl.load(slot_present + index, mask=used, other=0) != 0)
        total += tl.load(partial + tile, mask=used, other=0.0).to(tl.float64)
        first += CHUNK
    return tl.sqrt_rn(tl.sum(total, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["n_tiles"])
def global_norm_kernel(
    partial,  # (max_tiles,) f32
    length,  # (max_tiles,) i32
    slot,  # (max_tiles,) i32
    slot_present,  # (max_slots,) i32
    grad_norm,  # (1,) f32, out
    n_tiles,  # i32
):
    """One program: the global norm alone."""
    tl.store(grad_norm, _norm(partial, length, slot, slot_present, n_tiles))


@triton.jit(do_not_specialize=["n_tiles", "n_slots", "n_rows"])
def finalise_kernel(
    partial,  # (max_tiles,) f32; None = no norm pass
    length,  # (max_tiles,) i32
    slot,  # (max_tiles,) i32
    grad_norm,  # (1,) f32, out
    max_norm,  # (1,) f32
    clip_coef,  # (1,) f32, out
    skip,  # (1,) i32, out
    skipped_steps,  # (1,) i32, in place
    slot_group,  # (max_slots,) i32
    slot_present,  # (max_slots,) i32
    slot_step,  # (max_slots,) i32, in place
    slot_measured,  # (max_slots,) i32, in place
    slot_coef,  # (max_slots, 8) f32, out
    hyper,  # (n_groups, 8) f32
    bias,  # (n_groups, n_rows, 2) f32
    n_tiles,  # i32
    n_slots,  # i32
    n_rows,  # i32
    SKIP_NONFINITE: tl.constexpr,
):
    """One program: norm, clip factor, skip, counts and the coefficients of every slot."""
    SLOTS: tl.constexpr = 256
    clip = 1.0
    go = 1
    if partial is not None:
        norm = _norm(partial, length, slot, slot_present, n_tiles)
        tl.store(grad_norm, norm)
        bound = tl.load(max_norm)
        # min(1, bound / (norm + 1e-6)), but 1 without a bound, and NaN if the norm is NaN, as in torch
        factor = tl.div_rn(bound, norm + 1e-6)
        clip = tl.where((bound == float("inf")) | (factor > 1.0), 1.0, factor)
        if SKIP_NONFINITE:
            go = (norm < float("inf")).to(tl.int32)
    tl.store(clip_coef, clip)
    tl.store(skip, 1 - go)
    tl.store(skipped_steps, tl.load(skipped_steps) + 1 - go)

    first = 0
    while first < n_slots:
        index = first + tl.arange(0, SLOTS)
        exists = index < n_slots
        runs = tl.load(slot_present + index, mask=exists, other=0) * go
        step = tl.load(slot_step + index, mask=exists, other=0) + runs
        tl.store(slot_step + index, step, mask=exists)
        tl.store(slot_measured + index, tl.load(slot_measured + index, mask=exists) + runs, mask=exists)

        group = tl.load(slot_group + index, mask=exists, other=0)
        row = hyper + group * 8
        factors = bias + (group * n_rows + tl.minimum(step, n_rows - 1)) * 2
        coef = slot_coef + index * 8
        # beta1, (1-beta1) clip, beta2, (1-beta2) clip^2, c1 eps, -lr c0, -lr wd, runs
        tl.store(coef, tl.load(row + 2, mask=exists), mask=exists)
        tl.store(coef + 1, tl.load(row + 3, mask=exists) * clip, mask=exists)
        tl.store(coef + 2, tl.load(row + 4, mask=exists), mask=exists)
        tl.store(coef + 3, tl.load(row + 5, mask=exists) * clip * clip, mask=exists)
        tl.store(coef + 4, tl.load(row + 6, mask=exists) * tl.load(factors + 1, mask=exists), mask=exists)
        tl.store(coef + 5, -(tl.load(row, mask=exists) * tl.load(factors, mask=exists)), mask=exists)
        tl.store(coef + 6, -tl.load(row + 1, mask=exists), mask=exists)
        tl.store(coef + 7, runs.to(tl.float32), mask=exists)
        first += SLOTS


@triton.jit(do_not_specialize=["n_slots", "n_rows"])
def closing_coefficients_kernel(
    slot_group,  # (max_slots,) i32
    slot_step,  # (max_slots,) i32
    slot_coef,  # (max_slots, 8) f32, out
    hyper,  # (n_groups, 8) f32
    bias,  # (n_groups, n_rows, 2) f32
    n_slots,  # i32
    n_rows,  # i32
):
    """One program: the coefficients of line 16, for every slot that has made a step."""
    SLOTS: tl.constexpr = 256
    first = 0
    while first < n_slots:
        index = first + tl.arange(0, SLOTS)
        exists = index < n_slots
        step = tl.load(slot_step + index, mask=exists, other=0)
        group = tl.load(slot_group + index, mask=exists, other=0)
        row = hyper + group * 8
        factor = tl.load(bias + (group * n_rows + tl.minimum(step, n_rows - 1)) * 2 + 1, mask=exists)
        coef = slot_coef + index * 8
        # c1 eps, -closing c1, no decay, runs
        tl.store(coef + 4, tl.load(row + 6, mask=exists) * factor, mask=exists)
        tl.store(coef + 5, -(tl.load(row + 7, mask=exists) * factor), mask=exists)
        tl.store(coef + 6, tl.zeros((SLOTS,), dtype=tl.float32), mask=exists)
        tl.store(coef + 7, (step > 0).to(tl.float32), mask=exists)
        first += SLOTS


@triton.jit
def reduce_slots_kernel(
    tile_values,  # (max_tiles,) f32
    out,  # (max_slots,) f32, in place
    slot_first_tile,  # (max_slots,) i32
    slot_n_tiles,  # (max_slots,) i32
    slot_present,  # (max_slots,) i32
    skip,  # (1,) i32
    ROOT: tl.constexpr,
):
    """One program a slot: out += sum of its tiles, or the root of that sum."""
    CHUNK: tl.constexpr = 1024
    index = tl.program_id(0)
    if ROOT:
        if (tl.load(skip) != 0) | (tl.load(slot_present + index) == 0):
            return
    values = tile_values + tl.load(slot_first_tile + index)
    n = tl.load(slot_n_tiles + index)
    lane = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), dtype=tl.float64)
    first = 0
    while first < n:
        sums += tl.load(values + first + lane, mask=first + lane < n, other=0.0).to(tl.float64)
        first += CHUNK
    total = tl.sum(sums, axis=0).to(tl.float32)
    if ROOT:
        total = tl.sqrt_rn(total)
    tl.store(out + index, tl.load(out + index) + total)


@triton.jit
def _mix(x):
    """Mix 32 bits: ``_mix`` of split_float.py."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["numel", "first_index", "key1", "key2"])
def round_stochastic_kernel(
    weight,  # (numel,) i16 view of the bf16 weight, in place
    lo,  # (numel,) i16, in place
    numel,  # i32 | i64
    first_index,  # i32 | i64
    key1,  # i32
    key2,  # i32
    ALIGNED: tl.constexpr,  # numel is a multiple of 16
    BLOCK: tl.constexpr,
):
    """Round (weight, lo) up or down to the weight's 16 bits at random; lo <- 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:
        numel = numel // 16 * 16  # keeps it; ``multiple_of`` has no effect on an argument: accesses would be scalar
    inside = at < numel
    index = at + first_index
    bits = _mix((index & 0xFFFFFFFF).to(tl.uint32) ^ key1.to(tl.uint32))
    bits = _mix(bits ^ key2.to(tl.uint32) ^ (index >> 32).to(tl.uint32))

    hi = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
    master = (hi << 16) + tl.load(lo + at, mask=inside, other=0).to(tl.int32)
    rounded = (master + (bits >> 16).to(tl.int32)) >> 16
    # A master at the edge of the range keeps its nearest neighbour instead of becoming infinite.
    rounded = tl.where((rounded & 0x7F80) == 0x7F80, hi, rounded)
    tl.store(weight + at, rounded.to(tl.int16), mask=inside)
    tl.store(lo + at, tl.zeros((BLOCK,), dtype=tl.int16), mask=inside)

"""The rest rules as Triton kernels, and their launchers. Rules of all kernels: ``kernels``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..split_float.kernel import random_bits
from .reference import TINY

#: Columns of a program's row piece; 1024 with 4 warps is one 16-byte access a thread for bf16.
WIDTH = 1024
#: Rows and columns of the piece with which a program goes down its columns: 64 columns of bf16 are one 128-byte line.
PIECE_ROWS, PIECE_COLS = 32, 64


@triton.jit(do_not_specialize=["cols"])
def row_sums_kernel(
    grad,  # (rows, cols) bf16 | f32
    col_factor,  # (cols,) f32, read where SCALED
    sums,  # (rows,) f32, out
    cols,  # i32
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row: sums[i] = sum_j (g_ij col_factor_j)^2."""
    row = tl.program_id(0)
    if ALIGNED:
        cols = cols // 16 * 16
    start = grad + row.to(tl.int64) * cols
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    first = 0
    while first < cols:
        at = first + lane
        g = tl.load(start + at, mask=at < cols, other=0.0).to(tl.float32)
        if SCALED:
            g = g * tl.load(col_factor + at, mask=at < cols, other=0.0)
        total += g * g
        first += WIDTH
    tl.store(sums + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["rows", "cols"])
def col_sums_kernel(
    grad,  # (rows, cols) bf16 | f32
    row_factor,  # (rows,) f32, read where SCALED
    sums,  # (cols,) f32, out
    rows,  # i32
    cols,  # i32
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    SCALED: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    PIECE_COLS: tl.constexpr,
):
    """One program PIECE_COLS columns: sums[j] = sum_i (g_ij row_factor_i)^2."""
    if ALIGNED:
        cols = cols // 16 * 16
    col = tl.program_id(0) * PIECE_COLS + tl.arange(0, PIECE_COLS)
    lane = tl.arange(0, PIECE_ROWS)
    total = tl.zeros((PIECE_ROWS, PIECE_COLS), dtype=tl.float32)
    first = 0
    while first < rows:
        row = first + lane
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        g = tl.load(grad + at, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)
        if SCALED:
            g = g * tl.load(row_factor + row, mask=row < rows, other=0.0)[:, None]
        total += g * g
        first += PIECE_ROWS
    tl.store(sums + col, tl.sum(total, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=["n", "each"])
def factors_kernel(
    sums,  # (n,) f32
    factor,  # (n,) f32, out where FACTOR
    total,  # (1,) f32, out where TOTAL
    n,  # i32
    each,  # i32, elements behind each sum
    FACTOR: tl.constexpr,
    TOTAL: tl.constexpr,
    TINY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: factor = 1/rms of each row or column, 0 for one without gradient; total = sum of all."""
    lane = tl.arange(0, WIDTH)
    added = tl.zeros((WIDTH,), dtype=tl.float64)
    count = each.to(tl.float32)
    first = 0
    while first < n:
        at = first + lane
        value = tl.load(sums + at, mask=at < n, other=0.0)
        if TOTAL:
            added += value.to(tl.float64)
        if FACTOR:
            mean = tl.div_rn(value, count)
            one = tl.full((WIDTH,), 1.0, dtype=tl.float32)
            root = tl.div_rn(one, tl.sqrt_rn(tl.where(mean < TINY, 1.0, mean)))
            tl.store(factor + at, tl.where(mean < TINY, 0.0, root), mask=at < n)
        first += WIDTH
    if TOTAL:
        tl.store(total, tl.sum(added, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["cols", "rate", "key1", "key2"])
def move_kernel(
    weight,  # (rows, cols) i16 view of bf16 | f32, in place
    grad,  # (rows, cols) bf16 | f32
    total,  # (1,) f32
    row_factor,  # (rows,) f32, read where ROWS
    col_factor,  # (cols,) f32, read where COLS
    cols,  # i32
    rate,  # f32
    key1,  # i32
    key2,  # i32
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    WIDTH: tl.constexpr,
):
    """One program a piece of a row: weight -= rate u(g), unless the gradient is not finite."""
    sum_of_all = tl.load(total)
    if (sum_of_all - sum_of_all) != 0:  # inf or nan
        return
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        cols = cols // 16 * 16
    col = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = col < cols
    at = row * cols + col
    step = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SIGN:
        step = tl.where(step > 0, 1.0, tl.where(step < 0, -1.0, 0.0))
    if ROWS:
        step = step * tl.load(row_factor + row)
    if COLS:
        step = step * tl.load(col_factor + col, mask=inside, other=0.0)
    if BF16:
        hi = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
        bits = ((hi << 16).to(tl.float32, bitcast=True) - step * rate).to(tl.int32, bitcast=True)
        rounded = (bits + random_bits(at, key1, key2)) >> 16
        # A value at the edge of the range is cut off instead of becoming infinite.
        rounded = tl.where((rounded & 0x7F80) == 0x7F80, bits >> 16, rounded)
        tl.store(weight + at, rounded.to(tl.int16), mask=inside)
    else:
        tl.store(weight + at, tl.load(weight + at, mask=inside, other=0.0) - step * rate, mask=inside)


def launch_measure(grad: Tensor, sumsq: Tensor, rows: Tensor, cols: Tensor, sums: Tensor, sides: Sequence[str]) -> None:
    """Two launches a pass over the gradient: sums, then what becomes of them. The first pass also gives the total."""
    n, m = grad.shape
    aligned = m % 16 == 0
    done: set[str] = set()
    with on_device(grad):
        for index, side in enumerate(sides or ("rows",)):
            first = index == 0
            if side == "rows":
                row_sums_kernel[(n,)](
                    grad, cols, sums, m, ALIGNED=aligned, SCALED="cols" in done, WIDTH=_width(m), enable_fp_fusion=False
                )
            else:
                col_sums_kernel[(-(-m // PIECE_COLS),)](
                    grad, rows, sums, n, m, ALIGNED=aligned, SCALED="rows" in done,
                    PIECE_ROWS=PIECE_ROWS, PIECE_COLS=PIECE_COLS, enable_fp_fusion=False,
                )  # fmt: skip
            count, each, factor = (n, m, rows) if side == "rows" else (m, n, cols)
            factors_kernel[(1,)](
                sums, factor, sumsq, count, each, FACTOR=bool(sides), TOTAL=first, TINY=TINY, WIDTH=WIDTH,
            )  # fmt: skip
            done.add(side)


def launch_move(
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
    """Launch one program a piece of a row."""
    n, m = weight.shape
    bf16, width = weight.dtype == torch.bfloat16, _width(m)
    with on_device(weight):
        move_kernel[(n, -(-m // width))](
            weight.view(torch.int16) if bf16 else weight,
            grad,
            sumsq,
            rows,
            cols,
            m,
            rate,
            *keys,
            SIGN=rule == "sign",
            ROWS="rows" in sides,
            COLS="cols" in sides,
            BF16=bf16,
            ALIGNED=m % 16 == 0,
            WIDTH=width,
            enable_fp_fusion=False,
        )


def _width(columns: int) -> int:
    """Columns of a program's piece: the whole of a narrow row, so that few lanes idle."""
    return min(WIDTH, max(128, triton.next_power_of_2(columns)))

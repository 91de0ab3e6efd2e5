"""Matrices in 8 bits as Triton kernels, and their launchers. Rules of all kernels: ``kernels``.

e4m3 is read and written as its bits, in integers: neither the interpreter nor cards before sm_89 convert it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from .formats import Format

#: Columns of a block that do not span the row.
GROUP = tl.constexpr(128)
#: Columns of a program's row piece: 16 codes a thread with 4 warps, one 16-byte access.
WIDTH = 2048
#: Rows that a program looks at together, of a block of 128 × 128.
PIECE_ROWS = 16


@triton.jit
def _spread(of_group, WIDTH: tl.constexpr):
    """Repeat the value of each group for its elements: (WIDTH/128,) to (WIDTH,)."""
    return tl.reshape(tl.broadcast_to(of_group[:, None], (WIDTH // GROUP, GROUP)), (WIDTH,))


@triton.jit
def _load(weight, at, inside, BF16: tl.constexpr):
    """Weights as float32; bfloat16 as bits, since the interpreter flushes its subnormals."""
    if BF16:
        return (tl.load(weight + at, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(weight + at, mask=inside, other=0.0)


@triton.jit
def to_bfloat16(x):
    """Round a finite float32 to the nearest bfloat16, ties to even: its bits, as an i32 of 16 bits."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def to_e4m3(x):
    """Round a float32 of at most 448 to the nearest e4m3, ties to even: its bits, as an i32 of 8 bits."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the codes are multiples of 2^-9: adding 2^14 leaves exactly those bits, rounded to even
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def from_e4m3(bits):
    """Give the float32 of e4m3 bits: exponent and mantissa in their places, and 2^120 for the other bias."""
    size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((bits & 0x80) != 0, -size, size)


@triton.jit
def _nearest(x, step):
    """Give the int8 code of x, in float32."""
    return tl.floor(tl.div_rn(x, tl.where(step > 0.0, step, 1.0)) + 0.5)


@triton.jit(do_not_specialize=["cols", "n_groups"])
def quantise_groups_kernel(
    weight,  # (rows, cols) i16 view of bf16 | f32
    codes,  # (rows, cols) i8, out
    steps,  # (rows, n_groups) i16 view of bf16, out
    cols,  # i32
    n_groups,  # i32
    LARGEST: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    WIDTH: tl.constexpr,
):
    """One program a piece of a row: a step for each 128 columns."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        cols = cols // 16 * 16
    col = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    group = tl.program_id(1).to(tl.int64) * (WIDTH // GROUP) + tl.arange(0, WIDTH // GROUP)
    at, step_at = row * cols + col, row * n_groups + group
    x = _load(weight, at, col < cols, BF16)
    largest = tl.max(tl.reshape(tl.abs(x), (WIDTH // GROUP, GROUP)), axis=1)
    rounded = to_bfloat16(tl.div_rn(largest, tl.full((WIDTH // GROUP,), LARGEST, dtype=tl.float32)))
    step = (rounded << 16).to(tl.float32, bitcast=True)
    code = _nearest(x, _spread(step, WIDTH))
    tl.store(codes + at, code.to(tl.int8), mask=col < cols)
    tl.store(steps + step_at, rounded.to(tl.int16), mask=group < n_groups)


@triton.jit(do_not_specialize=["cols"])
def quantise_rows_kernel(
    weight,  # (rows, cols) i16 view of bf16 | f32
    codes,  # (rows, cols) i8, out
    steps,  # (rows, 1) f32, out
    cols,  # i32
    LARGEST: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    WIDTH: tl.constexpr,
):
    """One program a row, read twice."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        cols = cols // 16 * 16
    lane = tl.arange(0, WIDTH)
    most = tl.zeros((WIDTH,), dtype=tl.float32)
    first = 0
    while first < cols:
        col = first + lane
        at = row * cols + col
        x = _load(weight, at, col < cols, BF16)
        most = tl.maximum(most, tl.abs(x))
        first += WIDTH
    step = tl.div_rn(tl.max(most, axis=0), tl.full((), LARGEST, dtype=tl.float32))
    tl.store(steps + row, step)
    first = 0
    while first < cols:
        col = first + lane
        at = row * cols + col
        x = _load(weight, at, col < cols, BF16)
        code = _nearest(x, tl.broadcast_to(step, (WIDTH,)))
        tl.store(codes + at, code.to(tl.int8), mask=col < cols)
        first += WIDTH


@triton.jit(do_not_specialize=["rows", "cols", "n_groups"])
def quantise_blocks_kernel(
    weight,  # (rows, cols) i16 view of bf16 | f32
    codes,  # (rows, cols) u8 view of e4m3, out
    steps,  # (blocks down, n_groups) f32, out
    rows,  # i32
    cols,  # i32
    n_groups,  # i32
    LARGEST: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    PIECE_ROWS: tl.constexpr,
):
    """One program a block of 128 × 128, read twice."""
    if ALIGNED:
        cols = cols // 16 * 16
    block = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    lane = block * GROUP + tl.arange(0, PIECE_ROWS)
    most = tl.zeros((PIECE_ROWS, GROUP), dtype=tl.float32)
    first = 0
    while first < GROUP:
        row = first + lane
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        at = row[:, None] * cols + col[None, :]
        x = _load(weight, at, inside, BF16)
        most = tl.maximum(most, tl.abs(x))
        first += PIECE_ROWS
    step = tl.div_rn(tl.max(tl.max(most, axis=1), axis=0), tl.full((), LARGEST, dtype=tl.float32))
    tl.store(steps + block * n_groups + tl.program_id(1), step)
    divisor = tl.where(step > 0.0, step, 1.0)
    first = 0
    while first < GROUP:
        row = first + lane
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        at = row[:, None] * cols + col[None, :]
        x = _load(weight, at, inside, BF16)
        y = tl.div_rn(x, tl.broadcast_to(divisor, (PIECE_ROWS, GROUP)))
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
        tl.store(codes + at, to_e4m3(y).to(tl.uint8), mask=inside)
        first += PIECE_ROWS


@triton.jit(do_not_specialize=["cols", "n_groups"])
def dequantise_kernel(
    codes,  # (rows, cols) i8 | u8 view of e4m3
    steps,  # (rows / BLOCK_ROWS rounded up, n_groups) i16 view of bf16 | f32
    out,  # (rows, cols) i16 view of bf16 | f32, out
    cols,  # i32
    n_groups,  # i32
    FP8: tl.constexpr,
    GROUPED: tl.constexpr,  # a step for each 128 columns; otherwise one for the row
    BLOCK_ROWS: tl.constexpr,  # rows that share a step
    STEP_BF16: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,  # cols is a multiple of 16
    WIDTH: tl.constexpr,
):
    """One program a piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        cols = cols // 16 * 16
    col = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    at, first = row * cols + col, row // BLOCK_ROWS * n_groups
    if GROUPED:
        group = tl.program_id(1).to(tl.int64) * (WIDTH // GROUP) + tl.arange(0, WIDTH // GROUP)
        step_at = first + group
        if STEP_BF16:
            bits = tl.load(steps + step_at, mask=group < n_groups, other=0).to(tl.int32)
            step = _spread((bits << 16).to(tl.float32, bitcast=True), WIDTH)
        else:
            step = _spread(tl.load(steps + step_at, mask=group < n_groups, other=0.0), WIDTH)
    else:
        step = tl.broadcast_to(tl.load(steps + first), (WIDTH,))
    code = tl.load(codes + at, mask=col < cols, other=0)
    x = (from_e4m3(code.to(tl.int32)) if FP8 else code.to(tl.float32)) * step
    if BF16:
        tl.store(out + at, to_bfloat16(x).to(tl.int16), mask=col < cols)
    else:
        tl.store(out + at, x, mask=col < cols)


def launch_quantise(weight: Tensor, codes: Tensor, steps: Tensor, format: Format) -> None:
    """Launch the kernel of the format's blocks."""
    rows, cols = weight.shape
    down, across = format.blocks((rows, cols))
    width, bf16 = _width(cols), weight.dtype == torch.bfloat16
    options = {"LARGEST": format.largest, "BF16": bf16, "ALIGNED": cols % 16 == 0, "enable_fp_fusion": False}
    weight = weight.view(torch.int16) if bf16 else weight
    with on_device(weight):
        if format.rows > 1:
            quantise_blocks_kernel[(down, across)](
                weight, codes.view(torch.uint8), steps, rows, cols, across, PIECE_ROWS=PIECE_ROWS, **options
            )
        elif format.cols is None:
            quantise_rows_kernel[(rows,)](weight, codes, steps, cols, WIDTH=width, **options)
        else:
            quantise_groups_kernel[(rows, -(-cols // width))](
                weight, codes, steps.view(torch.int16), cols, across, WIDTH=width, **options
            )


def launch_dequantise(codes: Tensor, steps: Tensor, out: Tensor, format: Format) -> None:
    """Launch one program a piece of a row."""
    rows, cols = out.shape
    fp8, bf16, narrow = format.codes != torch.int8, out.dtype == torch.bfloat16, steps.dtype == torch.bfloat16
    width = _width(cols)
    with on_device(out):
        dequantise_kernel[(rows, -(-cols // width))](
            codes.view(torch.uint8) if fp8 else codes,
            steps.view(torch.int16) if narrow else steps,
            out.view(torch.int16) if bf16 else out,
            cols,
            steps.shape[1],
            FP8=fp8,
            GROUPED=format.cols is not None,
            BLOCK_ROWS=format.rows,
            STEP_BF16=narrow,
            BF16=bf16,
            ALIGNED=cols % 16 == 0,
            WIDTH=width,
            enable_fp_fusion=False,
        )


def _width(cols: int) -> int:
    """Columns of a program's piece: the whole of a narrow row, so that few lanes idle."""
    return min(WIDTH, max(128, triton.next_power_of_2(cols)))

"""Sums and norms as Triton kernels, and their launchers. Rules of all kernels: ``kernels``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..tiles import BLOCK, PART, Control, TileTable

#: Tiles of one program of the norm pass: 2 KB of bf16 gradient would be too little work for a launch.
TILES_PER_PROGRAM = 4


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


def launch_sum_of_squares(grad: Tensor, partial: Tensor, table: TileTable, span: range, grad_tile: int) -> None:
    """Launch over the tiles of ``span``; ``grad`` begins with tile ``grad_tile``."""
    with on_device(grad):
        sum_of_squares_kernel[(-(-len(span) // TILES_PER_PROGRAM),)](
            grad,
            partial,
            table.length,
            span.start,
            span.stop,
            grad_tile,
            ALIGNED=table.aligned,
            ROWS=TILES_PER_PROGRAM,
            BLOCK=BLOCK,
        )


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def norm_parts_kernel(
    partial,  # (max_tiles,) f32
    length,  # (max_tiles,) i32
    slot,  # (max_tiles,) i32
    slot_present,  # (max_slots,) i32
    parts,  # (programs,) f64, out
    first_tile,  # i32
    end_tile,  # i32
    PRESENT: tl.constexpr,  # tiles of slots that are not present do not count
    PART: tl.constexpr,
):
    """Add up PART tiles a program, in a fixed order and in float64."""
    tile = first_tile + tl.program_id(0) * PART + tl.arange(0, PART)
    used = tile < end_tile
    n = tl.load(length + tile, mask=used, other=0)
    value = tl.load(partial + tile, mask=used, other=0.0)
    if PRESENT:
        index = tl.load(slot + tile, mask=used, other=0)
        used = tl.load(slot_present + index, mask=used, other=0) != 0
    total = tl.sum(tl.where(used & (n > 0), value, 0.0).to(tl.float64), axis=0)
    tl.store(parts + tl.program_id(0), total)


def launch_norm_parts(partial: Tensor, table: TileTable, span: range, *, all_present: bool) -> int:
    """Add up the tiles of ``span`` into ``table.norm_parts``. Returns how many of its entries that fills."""
    n_parts = -(-len(span) // PART)
    if n_parts:
        with on_device(partial):
            norm_parts_kernel[(n_parts,)](
                partial,
                table.length,
                table.slot,
                table.slot_present,
                table.norm_parts,
                span.start,
                span.stop,
                PRESENT=not all_present,
                PART=PART,
                num_warps=8,
            )
    return n_parts


@triton.jit
def norm_of_parts(parts, n_parts):
    """Square root of the sum of the parts, in a fixed order and in float64."""
    CHUNK: tl.constexpr = 512
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), dtype=tl.float64)
    first = 0
    while first < n_parts:
        total += tl.load(parts + first + lane, mask=first + lane < n_parts, other=0.0)
        first += CHUNK
    return tl.sqrt_rn(tl.sum(total, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["n_parts"])
def global_norm_kernel(
    parts,  # (n_parts,) f64
    grad_norm,  # (1,) f32, out
    n_parts,  # i32
):
    """One program: the global norm alone."""
    tl.store(grad_norm, norm_of_parts(parts, n_parts))


def launch_global_norm(partial: Tensor, table: TileTable, control: Control) -> None:
    """Launch the parts and the one program that adds them up."""
    n_parts = launch_norm_parts(partial, table, table.tile_range(None), all_present=False)
    with on_device(partial):
        global_norm_kernel[(1,)](table.norm_parts, control.grad_norm, n_parts, num_warps=4)


@triton.jit(do_not_specialize=["first_slot"])
def reduce_slots_kernel(
    tile_values,  # (max_tiles,) f32
    out,  # (max_slots,) f32, in place
    slot_first_tile,  # (max_slots,) i32
    slot_n_tiles,  # (max_slots,) i32
    slot_present,  # (max_slots,) i32
    skip,  # (1,) i32
    first_slot,  # i32, the slot of program 0
    ROOT: tl.constexpr,
    PRESENT: tl.constexpr,  # slots that are not present are left alone
):
    """One program a slot: out += sum of its tiles, or the root of that sum."""
    CHUNK: tl.constexpr = 1024
    index = first_slot + tl.program_id(0)
    values = tile_values + tl.load(slot_first_tile + index)
    n = tl.load(slot_n_tiles + index)
    before = tl.load(out + index)
    skipped = tl.load(skip)
    present = tl.load(slot_present + index)
    if (ROOT and skipped != 0) or (PRESENT and present == 0):
        return
    lane = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), dtype=tl.float64)
    first = 0
    while first < n:
        sums += tl.load(values + first + lane, mask=first + lane < n, other=0.0).to(tl.float64)
        first += CHUNK
    total = tl.sum(sums, axis=0).to(tl.float32)
    if ROOT:
        total = tl.sqrt_rn(total)
    tl.store(out + index, before + total)


def launch_reduce_slots(
    tile_values: Tensor, out: Tensor, table: TileTable, control: Control, root: bool, only: int | None
) -> None:
    """Launch one program a slot, or one for the slot ``only``."""
    with on_device(tile_values):
        reduce_slots_kernel[(len(table.slots) if only is None else 1,)](
            tile_values,
            out,
            table.slot_first_tile,
            table.slot_n_tiles,
            table.slot_present,
            control.skip,
            only or 0,
            ROOT=root,
            PRESENT=root and only is None,
        )

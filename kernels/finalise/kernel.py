"""The coefficients of a step as Triton kernels of one program, and their launchers. Rules: ``kernels``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..columns import (
    BIAS_COLUMNS,
    BIAS_EPS,
    BIAS_STEP,
    COEF_BETA1,
    COEF_BETA2,
    COEF_COLUMNS,
    COEF_EPS,
    COEF_GAIN1,
    COEF_GAIN2,
    COEF_MINUS_DECAY,
    COEF_MINUS_STEP,
    COEF_RUNS,
    HYPER_BETA1,
    HYPER_BETA2,
    HYPER_CLOSING,
    HYPER_COLUMNS,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_GAIN1,
    HYPER_GAIN2,
    HYPER_LR,
)
from ..norm.kernel import launch_norm_parts, norm_of_parts
from ..tiles import Control, TileTable


@triton.jit(do_not_specialize=["n_parts", "first_tile", "end_tile", "n_slots", "n_rows"])
def finalise_kernel(
    parts,  # (n_parts,) f64; None = no norm pass
    grad_norm,  # (1,) f32, out
    max_norm,  # (1,) f32
    clip_coef,  # (1,) f32, out
    skip,  # (1,) i32, out
    skipped_steps,  # (1,) i32, in place
    slot_first_tile,  # (max_slots,) i32
    slot_group,  # (max_slots,) i32
    slot_present,  # (max_slots,) i32
    slot_step,  # (max_slots,) i32, in place
    slot_measured,  # (max_slots,) i32, in place
    slot_coef,  # (max_slots, 8) f32, out
    hyper,  # (n_groups, 8) f32
    bias,  # (n_groups, n_rows, 2) f32
    n_parts,  # i32
    first_tile,  # i32, slots that begin before it are left alone
    end_tile,  # i32, and those that begin here or later
    n_slots,  # i32
    n_rows,  # i32
    PRESENT: tl.constexpr,  # slots that are not present do not run
    SKIP_NONFINITE: tl.constexpr,
):
    """One program: norm, clip factor, skip, counts and coefficients of every slot. Half of it is arguments, loads."""
    SLOTS: tl.constexpr = 256
    # Loads come before stores, which they could not pass: four trips to memory instead of twelve, 600 cycles each.
    bound = tl.load(max_norm)
    skipped = tl.load(skipped_steps)
    clip = 1.0
    go = 1
    if parts is not None:
        norm = norm_of_parts(parts, n_parts)
        # min(1, bound / (norm + 1e-6)), but 1 without a bound, and NaN if the norm is NaN, as in torch
        factor = tl.div_rn(bound, norm + 1e-6)
        clip = tl.where((bound == float("inf")) | (factor > 1.0), 1.0, factor)
        if SKIP_NONFINITE:
            go = (norm < float("inf")).to(tl.int32)

    first = 0
    while first < n_slots:
        index = first + tl.arange(0, SLOTS)
        exists = index < n_slots
        begins = tl.load(slot_first_tile + index, mask=exists, other=0)
        step = tl.load(slot_step + index, mask=exists, other=0)
        measured = tl.load(slot_measured + index, mask=exists, other=0)
        group = tl.load(slot_group + index, mask=exists, other=0)
        runs = tl.full((SLOTS,), 1, dtype=tl.int32) * go
        if PRESENT:
            runs *= tl.load(slot_present + index, mask=exists, other=0)
        step += runs

        row = hyper + group * HYPER_COLUMNS
        factors = bias + (group * n_rows + tl.minimum(step, n_rows - 1)) * BIAS_COLUMNS
        lr = tl.load(row + HYPER_LR, mask=exists)
        decay = tl.load(row + HYPER_DECAY, mask=exists)
        beta1 = tl.load(row + HYPER_BETA1, mask=exists)
        gain1 = tl.load(row + HYPER_GAIN1, mask=exists)
        beta2 = tl.load(row + HYPER_BETA2, mask=exists)
        gain2 = tl.load(row + HYPER_GAIN2, mask=exists)
        eps = tl.load(row + HYPER_EPS, mask=exists)
        c0 = tl.load(factors + BIAS_STEP, mask=exists)
        c1 = tl.load(factors + BIAS_EPS, mask=exists)

        decided = exists & (begins >= first_tile) & (begins < end_tile)
        coef = slot_coef + index * COEF_COLUMNS
        tl.store(slot_step + index, step, mask=decided)
        tl.store(slot_measured + index, measured + runs, mask=decided)
        tl.store(coef + COEF_BETA1, beta1, mask=decided)
        tl.store(coef + COEF_GAIN1, gain1 * clip, mask=decided)
        tl.store(coef + COEF_BETA2, beta2, mask=decided)
        tl.store(coef + COEF_GAIN2, gain2 * clip * clip, mask=decided)
        tl.store(coef + COEF_EPS, eps * c1, mask=decided)
        tl.store(coef + COEF_MINUS_STEP, -(lr * c0), mask=decided)
        tl.store(coef + COEF_MINUS_DECAY, -decay, mask=decided)
        tl.store(coef + COEF_RUNS, runs.to(tl.float32), mask=decided)
        first += SLOTS

    if parts is not None:
        tl.store(grad_norm, norm)
    tl.store(clip_coef, clip)
    tl.store(skip, 1 - go)
    tl.store(skipped_steps, skipped + 1 - go)


def launch_finalise(
    partial: Tensor | None,
    hyper: Tensor,
    bias: Tensor,
    table: TileTable,
    control: Control,
    skip_nonfinite: bool,
    tiles: range | None,
    total: Tensor | None,
) -> None:
    """Launch the parts of the norm, if it is wanted, and the one program."""
    span, every = table.tile_range(tiles), tiles is None
    parts, n_parts = total, 1
    if total is None:
        parts = None if partial is None else table.norm_parts
        n_parts = 0 if partial is None else launch_norm_parts(partial, table, span, all_present=not every)
    with on_device(hyper):
        finalise_kernel[(1,)](
            parts,
            control.grad_norm,
            control.max_norm,
            control.clip_coef,
            control.skip,
            control.skipped_steps,
            table.slot_first_tile,
            table.slot_group,
            table.slot_present,
            table.slot_step,
            table.slot_measured,
            table.slot_coef,
            hyper,
            bias,
            n_parts,
            span.start,
            span.stop,
            len(table.slots),
            bias.shape[1],
            PRESENT=every,
            SKIP_NONFINITE=skip_nonfinite,
            num_warps=8,
            enable_fp_fusion=False,
        )


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
        row = hyper + group * HYPER_COLUMNS
        factor = tl.load(bias + (group * n_rows + tl.minimum(step, n_rows - 1)) * BIAS_COLUMNS + BIAS_EPS, mask=exists)
        coef = slot_coef + index * COEF_COLUMNS
        # c1 eps, -closing c1, no decay, runs
        tl.store(coef + COEF_EPS, tl.load(row + HYPER_EPS, mask=exists) * factor, mask=exists)
        tl.store(coef + COEF_MINUS_STEP, -(tl.load(row + HYPER_CLOSING, mask=exists) * factor), mask=exists)
        tl.store(coef + COEF_MINUS_DECAY, tl.zeros((SLOTS,), dtype=tl.float32), mask=exists)
        tl.store(coef + COEF_RUNS, (step > 0).to(tl.float32), mask=exists)
        first += SLOTS


def launch_closing_coefficients(hyper: Tensor, bias: Tensor, table: TileTable) -> None:
    """Launch the one program."""
    with on_device(hyper):
        closing_coefficients_kernel[(1,)](
            table.slot_group,
            table.slot_step,
            table.slot_coef,
            hyper,
            bias,
            len(table.slots),
            bias.shape[1],
            enable_fp_fusion=False,
        )

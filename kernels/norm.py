"""Gradient norms, clipping, skipping and step counts, all on the device.

Per-tile sums of squares are added up in a fixed order, so that two runs agree bit for bit; there are no atomics.
``finalise`` turns the step's norm, the hyperparameters and the bias correction into one row of coefficients a slot,
which is all that the update reads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .backend import on_device, triton_kernels, uses_triton
from .tiles import BLOCK, CHUNK, Control, Slot, TileTable

#: Tiles of one program of the norm pass: 2 KB of bf16 gradient would be too little work for a launch.
TILES_PER_PROGRAM = 4


@torch.no_grad()
def sum_of_squares(
    grad: Tensor,  # flat, bfloat16 or float32, begins with the gradient of arena element ``grad_start``
    partial: Tensor,  # (max_tiles,) float32, modified in place: Σ g² of each tile in ``tiles``, 0 for unused ones
    table: TileTable,
    *,
    backend: str,
    tiles: range | None = None,  # None = all tiles in use; ``slot.tiles`` = one slot, as its gradient arrives
    grad_start: int = 0,  # ``slot.start`` where grad is the gradient of that slot alone, without padding
) -> None:
    """Norm pass: partial[tile] = Σ g². A |g| above 1.8e19 overflows to inf and so counts as not finite."""
    span, grad_tile = table.tile_range(tiles), first_grad_tile(grad_start)
    if not uses_triton(backend, grad):
        partial[span.start : span.stop].zero_()
        slots = table.slots_in(tiles)
        scratch = torch.empty(chunk_size(slots), device=grad.device)
        for _, slot in slots:
            for first in range(0, slot.numel, CHUNK):
                n = min(CHUNK, slot.numel - first)
                here = slot.start + first
                square_(scratch[:n].copy_(grad[here - grad_start : here - grad_start + n]))
                tile_sums_into(scratch[:n], partial[here // BLOCK :])
        return
    if len(span) == 0:
        return
    with on_device(grad):
        triton_kernels().sum_of_squares_kernel[(-(-len(span) // TILES_PER_PROGRAM),)](
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


def first_grad_tile(grad_start: int) -> int:
    """Tile of a gradient's first element. Kernels count in tiles: int32 is enough, and addresses stay aligned."""
    if grad_start % BLOCK:
        raise ValueError(f"grad_start must be the start of a slot, a multiple of {BLOCK}; got {grad_start}")
    return grad_start // BLOCK


def chunk_size(slots: list[tuple[int, Slot]]) -> int:
    """Elements of scratch space for one pass over ``slots``, a multiple of BLOCK."""
    return min(CHUNK, max((slot.n_tiles for _, slot in slots), default=1) * BLOCK)


def square_(x: Tensor) -> Tensor:
    """Square in place."""
    return torch.mul(x, x, out=x)


def square_root(x: Tensor, out: Tensor) -> Tensor:
    """Correctly rounded √x. ``torch.sqrt`` on a CPU is off by an ulp in 17-20% of float32 values."""
    if x.device.type == "cpu":
        np.sqrt(x.numpy(), out=out.numpy())
        return out
    return out.copy_(x.double().sqrt_())


def tile_sums_into(values: Tensor, out: Tensor) -> None:
    """out[tile] = sum of the tile's values; the last tile may be partial."""
    full, rest = divmod(values.numel(), BLOCK)
    if full:
        torch.sum(values[: full * BLOCK].view(full, BLOCK), dim=1, out=out[:full])
    if rest:
        torch.sum(values[full * BLOCK :], dim=0, out=out[full])


@torch.no_grad()
def global_norm(
    partial: Tensor,  # (max_tiles,) float32, from sum_of_squares
    table: TileTable,
    control: Control,  # grad_norm is modified in place, nothing else
    *,
    backend: str,
) -> None:
    """control.grad_norm = √Σ g² over the slots that are present. May be called any number of times in a step."""
    if not uses_triton(backend, partial):
        control.grad_norm.copy_(_global_norm_reference(partial, table))
        return
    with on_device(partial):
        triton_kernels().global_norm_kernel[(1,)](
            partial, table.length, table.slot, table.slot_present, control.grad_norm, table.n_tiles, num_warps=16
        )


def _global_norm_reference(partial: Tensor, table: TileTable) -> Tensor:
    """Added in float64, so that the order does not matter to float32."""
    total = torch.zeros((), dtype=torch.float64, device=partial.device)
    for (_, slot), present in zip(table.slots_in(None), table.slot_present.tolist(), strict=False):
        if present:
            total += partial[slot.first_tile : slot.first_tile + slot.n_tiles].sum(dtype=torch.float64)
    return total.float().double().sqrt().float()


@torch.no_grad()
def finalise(
    partial: Tensor | None,  # (max_tiles,) float32, from sum_of_squares; None = no norm pass: no clipping, no skip
    hyper: Tensor,  # (n_groups, 8) float32, rows of ``hyper_row``
    bias: Tensor,  # (n_groups, rows, 2) float32, from ``bias_table``
    table: TileTable,  # slot_step, slot_measured, slot_coef are modified in place
    control: Control,  # grad_norm, skip, clip_coef, skipped_steps are modified in place
    *,
    skip_nonfinite: bool,
    backend: str,
) -> None:
    """Decide the step: norm, clip factor, skip, step counts, coefficients. Once a step, before ``adamw``.

    clip_coef = min(1, max_norm/(norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_.
    """
    if not uses_triton(backend, hyper):
        _finalise_reference(partial, hyper, bias, table, control, skip_nonfinite)
        return
    with on_device(hyper):
        triton_kernels().finalise_kernel[(1,)](
            partial,
            table.length,
            table.slot,
            control.grad_norm,
            control.max_norm,
            control.clip_coef,
            control.skip,
            control.skipped_steps,
            table.slot_group,
            table.slot_present,
            table.slot_step,
            table.slot_measured,
            table.slot_coef,
            hyper,
            bias,
            table.n_tiles,
            len(table.slots),
            bias.shape[1],
            SKIP_NONFINITE=skip_nonfinite,
            num_warps=16,
            enable_fp_fusion=False,
        )


def _finalise_reference(
    partial: Tensor | None, hyper: Tensor, bias: Tensor, table: TileTable, control: Control, skip_nonfinite: bool
) -> None:
    control.skip.zero_()
    control.clip_coef.fill_(1.0)
    if partial is not None:
        norm = _global_norm_reference(partial, table)
        control.grad_norm.copy_(norm)
        if skip_nonfinite:
            control.skip.copy_(~norm.isfinite())
        # clamp would turn inf/inf (no bound, norm inf) into NaN; no bound means a factor of exactly 1.
        coef = (control.max_norm / (norm + 1e-6)).clamp(max=1.0)
        control.clip_coef.copy_(torch.where(control.max_norm.isinf(), 1.0, coef))
    control.skipped_steps += control.skip

    n = len(table.slots)
    runs = table.slot_present[:n] * (1 - control.skip)
    table.slot_step[:n] += runs
    table.slot_measured[:n] += runs
    write_coefficients(hyper, bias, table, control.clip_coef, runs)


def write_coefficients(hyper: Tensor, bias: Tensor, table: TileTable, clip: Tensor, runs: Tensor) -> None:
    """slot_coef[s] = β1, (1-β1)·clip, β2, (1-β2)·clip², c₁·ε, -lr·c₀, -lr·wd, runs   (c₀, c₁: see ``bias_table``)."""
    n = len(table.slots)
    group = table.slot_group[:n].long()
    lr, decay, beta1, gain1, beta2, gain2, eps, _ = hyper[group].unbind(1)
    factors = bias[group, table.slot_step[:n].long().clamp(max=bias.shape[1] - 1)]
    columns = (beta1, gain1 * clip, beta2, gain2 * clip * clip, eps * factors[:, 1], -(lr * factors[:, 0]), -decay)
    table.slot_coef[:n] = torch.stack((*columns, runs.float()), dim=1)


@torch.no_grad()
def reduce_slots(
    tile_values: Tensor,  # (max_tiles,) float32, sums of squares
    out: Tensor,  # (max_slots,) float32, modified in place
    table: TileTable,
    control: Control,
    *,
    root: bool,
    backend: str,
) -> None:
    """Add up the tiles of each slot in a fixed order.

    With ``root`` False (once a round, over what ``adamw`` collected): out[slot] += Σ tiles, for every slot.
    With ``root`` True (each step, over that step's sums): out[slot] += √Σ tiles, for the slots that are present, and
    nothing in a skipped step.
    """
    if not uses_triton(backend, tile_values):
        if root and control.skip.item():
            return
        for (index, slot), present in zip(table.slots_in(None), table.slot_present.tolist(), strict=False):
            total = tile_values[slot.first_tile : slot.first_tile + slot.n_tiles].sum(dtype=torch.float64)
            if not root or present:
                out[index] += total.sqrt() if root else total
        return
    if not table.slots:
        return
    with on_device(tile_values):
        triton_kernels().reduce_slots_kernel[(len(table.slots),)](
            tile_values,
            out,
            table.slot_first_tile,
            table.slot_n_tiles,
            table.slot_present,
            control.skip,
            ROOT=root,
        )

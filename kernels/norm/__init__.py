"""Sums of squares by tile, the global norm and the sums of each slot, all on the device.

Per-tile sums of squares are added up in a fixed order, so that two runs agree bit for bit; there are no atomics. For
the global norm that takes two launches: PART tiles a program, then one program over these parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import uses_triton
from ..tiles import Control, TileTable, first_grad_tile
from .reference import global_norm_reference, norm_of_total, reduce_slots_reference, sum_of_squares_reference

__all__ = ["global_norm", "norm_of_total", "reduce_slots", "sum_of_squares"]


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
        sum_of_squares_reference(grad, partial, table, tiles, grad_start)
    elif len(span):
        from .kernel import launch_sum_of_squares

        launch_sum_of_squares(grad, partial, table, span, grad_tile)


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
        control.grad_norm.copy_(global_norm_reference(partial, table))
        return
    from .kernel import launch_global_norm

    launch_global_norm(partial, table, control)


@torch.no_grad()
def reduce_slots(
    tile_values: Tensor,  # (max_tiles,) float32, sums of squares
    out: Tensor,  # (max_slots,) float32, modified in place
    table: TileTable,
    control: Control,
    *,
    root: bool,
    backend: str,
    only: int | None = None,  # index of a slot, whether it is present or not; None = all
) -> None:
    """Add up the tiles of each slot in a fixed order.

    With ``root`` False (once a round, over what ``adamw`` collected): out[slot] += Σ tiles, for every slot.
    With ``root`` True (each step, over that step's sums): out[slot] += √Σ tiles, for the slots that are present, and
    nothing in a skipped step.
    """
    if not uses_triton(backend, tile_values):
        reduce_slots_reference(tile_values, out, table, control, root, only)
    elif table.slots:
        from .kernel import launch_reduce_slots

        launch_reduce_slots(tile_values, out, table, control, root, only)

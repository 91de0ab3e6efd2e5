"""Sums and norms in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import tile_sums_into
from ..tiles import BLOCK, Control, TileTable, chunk_size, chunks


def sum_of_squares_reference(
    grad: Tensor, partial: Tensor, table: TileTable, tiles: range | None, grad_start: int
) -> None:
    """partial[tile] = Σ g²; arguments as in ``sum_of_squares``."""
    span = table.tile_range(tiles)
    partial[span.start : span.stop].zero_()
    slots = table.slots_in(tiles)
    scratch = torch.empty(chunk_size(slots), device=grad.device)
    for _, slot in slots:
        for first, n in chunks(slot.numel):
            here = slot.start + first
            g = scratch[:n].copy_(grad[here - grad_start : here - grad_start + n])
            tile_sums_into(torch.mul(g, g, out=g), partial[here // BLOCK :])


def global_norm_reference(partial: Tensor, table: TileTable, tiles: range | None = None) -> Tensor:
    """√Σ over the tiles of present slots, a float32 scalar. In float64 the order does not matter to float32.

    Args:
        partial: sums of squares by tile.
        table: what the tiles belong to.
        tiles: of one slot, which counts whether it is present or not; None = all.
    """
    total = torch.zeros((), dtype=torch.float64, device=partial.device)
    present = table.slot_present.tolist()
    for index, slot in table.slots_in(tiles):
        if present[index] or tiles is not None:
            total += partial[slot.first_tile : slot.first_tile + slot.n_tiles].sum(dtype=torch.float64)
    return norm_of_total(total)


def norm_of_total(total: Tensor) -> Tensor:
    """The float32 root of a float64 sum, rounded as the kernels round."""
    return total.float().double().sqrt().float()


def reduce_slots_reference(
    tile_values: Tensor, out: Tensor, table: TileTable, control: Control, root: bool, only: int | None
) -> None:
    """out[slot] += Σ tiles or its root; arguments as in ``reduce_slots``."""
    if root and control.skip.item():
        return
    for (index, slot), present in zip(table.slots_in(None), table.slot_present.tolist(), strict=False):
        if only not in (None, index) or (root and only is None and not present):
            continue
        total = tile_values[slot.first_tile : slot.first_tile + slot.n_tiles].sum(dtype=torch.float64)
        out[index] += total.sqrt() if root else total

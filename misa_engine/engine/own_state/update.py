"""OwnUpdate: a step that is decided by whole gradients, and made on one process's parts."""

from __future__ import annotations

import torch
from torch import Tensor

from misa_engine.engine.own_state.arena import OwnArena
from misa_engine.engine.update import ArenaUpdate
from misa_engine.kernels.adamw import adamw
from misa_engine.kernels.tiles import Coefficients
from misa_engine.method.config import MisaConfig

_RUNS = Coefficients._fields.index("runs")


class OwnUpdate(ArenaUpdate):
    """Runs the kernels over an arena of parts: norms and accounts over whole matrices, the update over the parts.

    Args:
        arena: buffers and tables.
        n_groups: rows of hyperparameters.
        config: score, bias correction, skip rule.
        backend: "triton" or "reference".
    """

    _state: OwnArena

    def __init__(self, arena: OwnArena, n_groups: int, config: MisaConfig, backend: str):
        super().__init__(arena.whole, n_groups, config, backend)
        self._state = arena

    def _adamw(self, gradient: Tensor, measured: Tensor, *, tiles: range | None = None, grad_start: int = 0) -> None:
        """A launch for each slot, whose part lies somewhere in the whole gradient."""
        whole, own = self._arena, self._state
        self._add_scores(measured, whole.table.tile_range(tiles))
        for index, slot in whole.table.slots_in(tiles):
            part = own.slots[index]
            begin = slot.start - grad_start + own.first(slot.weight)
            if part.numel:
                adamw(
                    gradient[begin : begin + part.numel],
                    own.exp_avg,
                    own.exp_avg_sq,
                    own.residual,
                    None,
                    own.table,
                    m_scale=own.exp_avg_scale,
                    v_scale=own.exp_avg_sq_scale,
                    backend=self._backend,
                    tiles=part.tiles,
                    grad_start=part.start,
                )

    def _add_scores(self, measured: Tensor, tiles: range) -> None:
        """What ``adamw`` does where it sees all: the sums of squares of slots that run enter the round's."""
        table, here = self._arena.table, slice(tiles.start, tiles.stop)
        runs = table.slot_coef[:, _RUNS][table.slot[here].long()] > 0
        self._arena.tile_sumsq[here] += torch.where(runs, measured[here], 0.0)

"""ArenaUpdate: the kernels of one step in their order, and the numbers between them that stay on the device.

    held gradients        norms of all slots -> finalise (clip factor, skip, step counts) -> one fused launch
    update in backward    the same three for one slot, with the gradient that has just arrived
    round end             line 16 where it is asked for, norms by slot, one copy to the host

Nothing here but ``report`` waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from misa_engine.engine.arena import Arena, upload
from misa_engine.engine.marks import phase
from misa_engine.kernels.adamw import adamw, closing_step
from misa_engine.kernels.finalise import finalise
from misa_engine.kernels.norm import global_norm, reduce_slots, sum_of_squares
from misa_engine.kernels.tiles import Control, Hyper, Slot, bias_table, hyper_row
from misa_engine.method.config import MisaConfig


@dataclass(frozen=True)
class RoundReport:
    """What a round leaves behind, by slot."""

    sums: list[float]
    """Σ over the steps of ‖g‖² (score "mean_square") or of ‖g‖ after clipping ("squared_mean_norm")."""
    measured: list[int]
    """Steps that entered the sum."""
    steps: list[int]
    """Adam steps since fresh moments."""
    skipped: int
    """Steps skipped since the beginning."""


class ArenaUpdate:
    """Runs the kernels over an arena.

    Args:
        arena: buffers and table.
        n_groups: rows of hyperparameters.
        config: score, bias correction, skip rule.
        backend: "triton" or "reference".
    """

    def __init__(self, arena: Arena, n_groups: int, config: MisaConfig, backend: str):
        device = arena.exp_avg.device
        self._arena, self._config, self._backend = arena, config, backend
        self._state = arena  # where moments and residual bits lie
        self.control = Control.allocate(device)
        self._scores: Tensor | None = arena.tile_sumsq  # what adamw adds the sums of squares to
        self.norm_sums = torch.zeros(arena.table.slot_group.numel(), dtype=torch.float32, device=device)
        self._hyper = torch.zeros(n_groups, len(Hyper._fields), dtype=torch.float32, device=device)
        self._bias = torch.ones(n_groups, 2, 2, device=device)
        self._hyper_values: list[list[float]] = []
        self._betas: list[tuple[float, float]] = []
        self._max_norm = math.inf

    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]], max_norm: float | None) -> None:
        """Bring learning rates and the rest to the device, if anything changed since the last step."""
        rows = [hyper_row(float(g["lr"]), tuple(g["betas"]), float(g["eps"]), float(g["weight_decay"])) for g in groups]
        if rows != self._hyper_values:
            upload(rows, self._hyper)
            self._hyper_values = rows
        betas = [tuple(group["betas"]) for group in groups]
        if betas != self._betas:
            table = bias_table(betas, enabled=self._config.bias_correction, device="cpu")
            device = self._hyper.device
            self._bias = (table.pin_memory() if self._hyper.is_cuda else table).to(device, non_blocking=True)
            self._betas = betas
        bound = math.inf if max_norm is None else max_norm
        if bound != self._max_norm:
            self.control.max_norm.fill_(bound)
            self._max_norm = bound

    def measure(self) -> None:
        """The norm pass over all slots."""
        arena = self._arena
        assert arena.grad is not None
        with phase("clip/norm"):
            sum_of_squares(arena.grad, arena.step_sumsq, arena.table, backend=self._backend)

    def measure_slot(self, index: int) -> None:
        """The norm pass over one slot, as its gradient arrives."""
        arena = self._arena
        assert arena.grad is not None and arena.arrived_sumsq is not None
        tiles = arena.slots[index].tiles
        sum_of_squares(arena.grad, arena.arrived_sumsq, arena.table, backend=self._backend, tiles=tiles)

    def global_norm(self) -> Tensor:
        """Norm of all gradients that are present, from what was measured; a float32 scalar on the device."""
        with phase("clip/norm"):
            global_norm(self._arena.step_sumsq, self._arena.table, self.control, backend=self._backend)
        return self.control.grad_norm[0]

    def step(self, measured: Tensor | None = None, present: Sequence[bool] | None = None) -> None:
        """Update every slot whose gradient is present, by the norms of the last ``measure``.

        Args:
            measured: (tiles,) sums of squares for the scores, where the gradients were changed since they arrived;
                None = those of the last ``measure``, so that the update need not sum again.
            present: which slots have a gradient, as the device was told; None says all.
        """
        assert self._arena.grad is not None
        self._finalise()
        self._adamw(self._arena.grad, self._arena.step_sumsq if measured is None else measured)
        self._tell_autograd(self._arena.slots, present)
        self.spread(present)
        if self._config.score == "squared_mean_norm":
            self._add_norms_after_clipping()

    def spread(self, present: Sequence[bool] | None = None) -> None:
        """After an update: let other processes that keep parts of the state have the weights of slots ``present``."""
        self._state.spread(i for i in range(len(self._state.slots)) if present is None or present[i])

    def drop_residual(self, index: int) -> None:
        """As ``Arena.drop_residual``, of the arena that has the state."""
        self._state.drop_residual(index)

    def step_slot(self, index: int, gradient: Tensor) -> None:
        """Update one slot with a gradient from outside the arena.

        A gradient that is not finite skips this slot alone, since others may have been updated before it. To be
        followed by ``spread`` when all that are to be updated in this step have been.
        """
        arena, slot = self._arena, self._arena.slots[index]
        flat = gradient.detach().reshape(-1)
        with phase("update"):
            sum_of_squares(
                flat, arena.step_sumsq, arena.table, backend=self._backend, tiles=slot.tiles, grad_start=slot.start
            )
            self._finalise(tiles=slot.tiles)
            self._adamw(flat, arena.step_sumsq, tiles=slot.tiles, grad_start=slot.start)
            self._tell_autograd([slot])
            if self._config.score == "squared_mean_norm":
                self._add_norms_after_clipping(only=index)

    @staticmethod
    def _tell_autograd(slots: Sequence[Slot], present: Sequence[bool] | None = None) -> None:
        """Count the weights of ``slots``, of those ``present``, as changed: kernels do not say.

        A graph that holds one from before must be refused.
        """
        here = [True] * len(slots) if present is None else present
        increment_version([slot.weight for slot, updated in zip(slots, here, strict=True) if updated])

    def _finalise(self, tiles: range | None = None, total: Tensor | None = None) -> None:
        with phase("clip/norm"):
            finalise(
                self._arena.step_sumsq,
                self._hyper,
                self._bias,
                self._arena.table,
                self.control,
                skip_nonfinite=True,
                backend=self._backend,
                tiles=tiles,
                total=total,
            )

    def _adamw(self, gradient: Tensor, measured: Tensor, *, tiles: range | None = None, grad_start: int = 0) -> None:
        arena = self._arena
        adamw(
            gradient,
            arena.exp_avg,
            arena.exp_avg_sq,
            arena.residual,
            self._scores,
            arena.table,
            m_scale=arena.exp_avg_scale,
            v_scale=arena.exp_avg_sq_scale,
            backend=self._backend,
            measured=measured,
            tiles=tiles,
            grad_start=grad_start,
        )

    def _add_norms_after_clipping(self, only: int | None = None) -> None:
        # The published code adds norms, not squares, and reads them after clipping.
        arena = self._arena
        norms = torch.zeros_like(self.norm_sums)
        reduce_slots(arena.step_sumsq, norms, arena.table, self.control, root=True, backend=self._backend, only=only)
        # a skipped step: 0, not 0·nan
        self.norm_sums += torch.where(norms > 0, norms * self.control.clip_coef, norms)

    def closing_step(self, spared: int) -> None:
        """Line 16 of Algorithm 1, for all slots but the first ``spared``, which go on with their moments."""
        arena, table = self._state, self._state.table
        kept = table.slot_step[:spared].clone()
        table.slot_step[:spared].zero_()
        closing_step(
            arena.exp_avg,
            arena.exp_avg_sq,
            arena.residual,
            self._hyper,
            self._bias,
            table,
            m_scale=arena.exp_avg_scale,
            v_scale=arena.exp_avg_sq_scale,
            backend=self._backend,
        )
        table.slot_step[:spared].copy_(kept)
        self._tell_autograd(arena.slots[spared:])
        arena.spread(range(spared, len(arena.slots)))

    def report(self) -> RoundReport:
        """End the round's accounts. The one synchronisation of a round."""
        arena, table = self._arena, self._arena.table
        n = len(arena.slots)
        with phase("switch (host copy)"):
            if self._config.score == "mean_square":
                reduce_slots(arena.tile_sumsq, self.norm_sums, table, self.control, root=False, backend=self._backend)
            columns = (self.norm_sums[:n], table.slot_measured[:n], table.slot_step[:n], self.control.skipped_steps)
            values = torch.cat([column.double() for column in columns]).tolist()
            self.norm_sums.zero_()
        measured, steps = ([int(value) for value in values[k * n : (k + 1) * n]] for k in (1, 2))
        return RoundReport(values[:n], measured, steps, int(values[-1]))

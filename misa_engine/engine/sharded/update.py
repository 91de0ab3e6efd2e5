"""ShardedUpdate: the step of one process's rows, by norms of whole matrices.

A step adds up, over the processes, the sums of squares of each slot: one all-reduce of a few dozen numbers, on which
clipping, skipping and the scores of all processes depend alike, bit for bit. Everything else is done for each element
by itself, so that it does not depend on who holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from misa_engine.engine.arena import Arena
from misa_engine.engine.marks import phase
from misa_engine.engine.replicas import Replicas
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.update import ArenaUpdate
from misa_engine.kernels.norm import norm_of_total, reduce_slots
from misa_engine.method.config import MisaConfig


class ShardedUpdate(ArenaUpdate):
    """Runs the kernels over an arena that holds rows.

    The round's accounts lie in ``norm_sums`` alone, the same in all processes; ``Arena.tile_sumsq`` stays 0.

    Args:
        arena: buffers and table.
        n_groups: rows of hyperparameters.
        config: score, bias correction, skip rule.
        backend: "triton" or "reference".
        mesh: who holds the other rows.
        replicas: all processes; None where there is one.
    """

    def __init__(
        self,
        arena: Arena,
        n_groups: int,
        config: MisaConfig,
        backend: str,
        mesh: ShardMesh,
        replicas: Replicas | None,
    ):
        super().__init__(arena, n_groups, config, backend)
        self._mesh, self._replicas = mesh, replicas
        self._scores = None  # not by tile

    def global_norm(self) -> Tensor:
        """Norm of all gradients that are present, from what was measured; a float32 scalar on the device."""
        with phase("clip/norm"):
            sums = self._sums(self._arena.step_sumsq)
            self.control.grad_norm.copy_(norm_of_total(sums.sum()))
        return self.control.grad_norm[0]

    def step(self, measured: Tensor | None = None, present: Sequence[bool] | None = None) -> None:
        """Update every slot whose gradient is present; arguments as in ``ArenaUpdate.step``."""
        arena, n = self._arena, len(self._arena.slots)
        assert arena.grad is not None
        with phase("clip/norm"):
            kinds = [arena.step_sumsq] if measured is None else [arena.step_sumsq, measured]
            sums = self._sums(*kinds).view(len(kinds), n)
        self._finalise(total=sums[0].sum().view(1))
        self._adamw(arena.grad, arena.step_sumsq)
        self._tell_autograd(arena.slots, present)
        runs = arena.table.slot_coef[:n, -1] > 0
        if self._config.score == "mean_square":
            scores = sums[-1].float()
        else:  # the published code adds norms, not squares, and reads them after clipping
            scores = sums[0].float().sqrt() * self.control.clip_coef
        self.norm_sums[:n] += torch.where(runs, scores, 0.0)

    def _sums(self, *kinds: Tensor) -> Tensor:
        """Sums of squares of whole matrices, float64: one a slot for each of ``kinds``, by tile; 0 for absent slots."""
        arena, n = self._arena, len(self._arena.slots)
        present = arena.table.slot_present[:n] > 0
        columns = []
        for tiles in kinds:
            sums = torch.zeros_like(self.norm_sums)
            reduce_slots(tiles, sums, arena.table, self.control, root=False, backend=self._backend)
            columns.append(torch.where(present, sums[:n].double(), 0.0))
        return self._mesh.add_up(torch.cat(columns), self._replicas)

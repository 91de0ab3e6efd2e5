"""ShardedProcesses: the processes of a run with sharded weights, and what they compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from misa_engine.engine.replicas import REMEDY, ReplicaError, Replicas, checksums, digest
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.shards import is_sharded


class ShardedProcesses(Replicas):
    """Processes that hold rows of one model. FSDP2 averages the gradients; nothing here does.

    Attributes:
        mesh: how the rows are divided, from ``beside`` on.
    """

    mesh: ShardMesh
    state_in_parts = True

    @classmethod
    def beside(cls, replicas: Replicas, mesh: ShardMesh) -> ShardedProcesses:
        """The same processes, which turn out to hold rows of one model."""
        self = cls(replicas.world, replicas._control)
        self.mesh = mesh
        return self

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Buffers only: of the weights everybody has its own rows."""
        super()._broadcast([tensor for tensor in tensors if not is_sharded(tensor)])

    @torch.no_grad()
    def compare_weights(self, parameters: Mapping[str, Tensor], when: str) -> None:
        """Refuse rows that differ in any bit from those of others who hold the same (HSDP); nobody else can compare.

        Raises:
            ReplicaError: naming the ranks.
        """
        if len(self.mesh.peers) == 1:
            return
        rows = self.tell([digest(checksums(parameters.values()))])
        if others := [rank for rank in self.mesh.peers if rows[rank] != rows[self.rank]]:
            raise ReplicaError(
                f"the weights of the processes differ {when}: rank {self.rank} holds the same rows as ranks "
                f"{', '.join(map(str, others))}, with other values. Load the same weights everywhere before "
                f"fully_shard, and change none on one process only. {REMEDY}"
            )

    def after_load(self, *_: Any) -> None:
        """Nothing: ``state_loaded`` has compared."""

    def state_loaded(self, clocks: Sequence[Any]) -> None:
        """Right after a state was loaded, on all processes: compare clocks and active matrices.

        Raises:
            ReplicaError: naming the ranks that differ.
        """
        self.compare_clocks(clocks)

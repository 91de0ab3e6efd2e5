"""ShardedSlots: rows of gradients wait in the arena for the step, as ``p.grad``.

FSDP2 averages a layer's gradients as soon as its backward pass is over, those that there are: of active matrices. It
puts this process's rows into ``p.grad``, a DTensor, and calls the hook. The rows are copied to their slot, and
``p.grad`` becomes a DTensor over the slot, to which FSDP2 adds further micro-batches in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.attendance import ModelHook
from misa_engine.engine.gradient_slots import GradientSlots
from misa_engine.engine.replicas import ReplicaError, Replicas
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.shards import local


class ShardedSlots(GradientSlots):
    """Brings this process's rows of every active gradient into their slots.

    Args:
        *where: as for GradientSlots.
        max_norm: clip the global norm to this in every step; None does not clip.
        mesh: the processes that hold the rows.
        replicas: counts the bytes that are exchanged; None in one process.
        clock: gives the number of steps made.
    """

    def __init__(
        self,
        *where: Any,
        max_norm: float | None,
        mesh: ShardMesh,
        replicas: Replicas | None,
        clock: Callable[[], int],
    ) -> None:
        super().__init__(*where, max_norm=max_norm, gemm=False)
        model: nn.Module = where[0]
        self._mesh, self._replicas, self._clock = mesh, replicas, clock
        self._grads: list[Tensor] = []  # DTensors over the views
        self._binds = self._passes = 0  # since construction; differentiated forward passes of this step
        self._met = False
        self._forward_at: tuple[int, int] | None = None  # (steps, binds) at the latest forward pass
        self._handles.append(model.register_forward_pre_hook(ModelHook(self._forward_begins)))

    def settle(self, what: str) -> None:
        """Refuse ``what`` within a pass, and let go of gathered weights."""
        self._mesh.settle(what)

    def forget(self) -> None:
        """Begin a new step: what lies in the slots has been used."""
        super().forget()
        self._passes, self._met = 0, False

    def _collect(self) -> None:
        """As in GradientSlots, when all processes are there: what comes next waits for all of them."""
        if self._replicas is not None and not self._met:
            self._meet(self._replicas)
            self._met = True
        super()._collect()

    def _meet(self, replicas: Replicas) -> None:
        if not self._passes and all(self._held(name) is None for name in self._arena.names):
            raise ValueError(
                f"rank {replicas.rank} ends step {self._clock()} without a forward and backward pass: with sharded "
                "weights every pass needs the rows of all ranks, so all have to make as many. Give every rank the same "
                "number of batches (DataLoader(drop_last=True), DistributedSampler), or let it repeat one."
            )
        passes = [row[1] for row in replicas.tell([self._clock(), self._passes])]
        if len(set(passes)) > 1:
            raise ReplicaError(
                "the processes have made different numbers of forward passes in this step: "
                f"{', '.join(f'rank {rank} {count}' for rank, count in enumerate(passes))}. With sharded weights all "
                "have to make as many; what they have exchanged may be mixed up. Resume from the last checkpoint."
            )

    def bind(self) -> None:
        """Follow the arena after it has bound other parameters; no gradient has arrived then."""
        super().bind()
        self._binds += 1
        self._grads = []
        for index, (name, view) in enumerate(zip(self._arena.names, self._views, strict=True)):
            self._grads.append(_over(view, self._parameters[name]))
            self._views[index] = local(self._grads[index])

    def _held(self, name: str) -> Tensor | None:
        gradient = self._parameters[name].grad
        return None if gradient is None else local(gradient)

    def _show(self, index: int) -> None:
        self._parameters[self._arena.names[index]].grad = self._grads[index]

    def _forward_begins(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._forward_at = (self._clock(), self._binds)
            self._passes += 1

    @torch.no_grad()
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        if self._forward_at is not None and self._forward_at != (self._clock(), self._binds):
            raise RuntimeError(
                f"{name} received a gradient of a forward pass from before the last step or switch. Weights and the "
                "set of trained matrices may change between two steps only: backward() belongs before step()."
            )
        if self._replicas is not None:
            self._replicas.exchanged_bytes += parameter.numel() * parameter.dtype.itemsize
        super()._arrived(name, index, parameter)


def _over(view: Tensor, parameter: Tensor) -> Tensor:
    """A DTensor like ``parameter`` whose rows on this process are ``view``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        view,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

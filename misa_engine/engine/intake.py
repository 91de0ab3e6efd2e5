"""Which intake an optimizer has, and whether it averages gradients with other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from misa_engine.engine.arena import Arena
from misa_engine.engine.gradient_slots import GradientSlots
from misa_engine.engine.gradients import GradientIntake, Groups
from misa_engine.engine.own_state.arena import OwnArena
from misa_engine.engine.replicas import Replicas
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.sharded.slots import ShardedSlots
from misa_engine.engine.update import ArenaUpdate
from misa_engine.engine.update_on_arrival import UpdateOnArrival
from misa_engine.method.config import MisaConfig


def intake_for(
    config: MisaConfig,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    arena: Arena,
    kernels: ArenaUpdate,
    groups: Groups,
    replicas: Replicas | None,
    clock: Callable[[], int],
    mesh: ShardMesh | None,
) -> GradientIntake:
    """Put the hooks on all parameters.

    Args:
        config: where updates happen, clipping, GEMMs into slots.
        model: the model.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where gradients and state go.
        kernels: what the step runs.
        groups: gives torch's parameter groups.
        replicas: the processes to average gradients with; None is this one alone.
        clock: gives the number of steps made.
        mesh: over which the weights are sharded, so that FSDP2 averages; None where they are whole.
    """
    where = (model, parameters, arena.whole if isinstance(arena, OwnArena) else arena, kernels, groups)
    intake: GradientIntake
    if mesh is not None:
        return ShardedSlots(*where, max_norm=config.max_grad_norm, mesh=mesh, replicas=replicas, clock=clock)
    if config.update_in == "backward":
        intake = UpdateOnArrival(*where)
    else:
        intake = GradientSlots(*where, max_norm=config.max_grad_norm, gemm=config.gemm_gradients)
    if replicas is not None:
        intake.join(replicas, clock)
    return intake

"""All buffers of an optimizer, made once, large enough for every draw that the budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from misa_engine.engine.arena import Arena, arena_options, capacity_for, padded
from misa_engine.engine.host import HostStore
from misa_engine.engine.own_state.arena import OwnArena, own_arena
from misa_engine.engine.own_state.share import Share
from misa_engine.engine.own_state.update import OwnUpdate
from misa_engine.engine.replicas import Replicas
from misa_engine.engine.residents import Residents
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.sharded.update import ShardedUpdate
from misa_engine.engine.shards import local
from misa_engine.engine.update import ArenaUpdate
from misa_engine.method.config import MisaConfig


def buffers_for(
    config: MisaConfig,
    parameters: Mapping[str, nn.Parameter],
    sampled: Sequence[str],
    always: Sequence[str],
    budget: int,
    n_groups: int,
    backend: str,
    mesh: ShardMesh | None,
    replicas: Replicas | None,
    residents: Residents | None,
) -> tuple[Arena, HostStore, ArenaUpdate]:
    """Allocate the arena, what is kept on the host, and the accounts of a step.

    Args:
        config: dtypes, and what is kept of matrices that leave.
        parameters: name -> parameter, of the dtype of training and, unless it rests, on its device.
        sampled: names of those that can be drawn.
        always: names of those that are always trained.
        budget: most elements that sampled parameters hold together.
        n_groups: torch's parameter groups.
        backend: "triton" or "reference".
        mesh: over which the weights are sharded; None where they are whole.
        replicas: all processes; None where there is one.
        residents: of the model; what rests has no memory of its own on the device, and trains in the arena's.
    """
    some = parameters[sampled[0]]
    sizes = {name: local(parameter).numel() for name, parameter in parameters.items()}
    common = {**arena_options(config, some.dtype), "device": (residents or some).device}
    numels = ([sizes[name] for name in sampled], [sizes[name] for name in always])
    arena: Arena
    if config.shard_state and replicas is not None:  # arrangement.py has refused it with sharded weights
        share, replicas.state_in_parts = Share(replicas, parameters), True
        arena = own_arena(budget, *numels, share.size, share, **common)
        sizes = {name: share.held(name) for name in parameters}
    elif mesh is not None:
        mesh.check_groups(config, [*sampled, *always])
        arena = Arena(*mesh.capacity(budget, sampled, always), **common)
    else:
        weights_from = None if residents is None else sum(padded(sizes[name]) for name in always)
        arena = Arena(*capacity_for(budget, *numels), **common, weights_from=weights_from)
    host = HostStore(
        arena,
        moments=config.revisit in ("keep", "offload"),
        pack=config.revisit == "offload",
        residual=config.leave_rounding == "keep",
        backend=backend,
        numels=[sizes[name] for name in sampled],
    )
    if isinstance(arena, OwnArena):
        return arena, host, OwnUpdate(arena, n_groups, config, backend)
    if mesh is not None:
        return arena, host, ShardedUpdate(arena, n_groups, config, backend, mesh, replicas)
    return arena, host, ArenaUpdate(arena, n_groups, config, backend)

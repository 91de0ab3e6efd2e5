"""What the place of a model's weights asks of its optimizer: whole, resting in 8 bits, or sharded over processes."""

from __future__ import annotations

from torch import nn

from misa_engine.engine.replicas import Replicas
from misa_engine.engine.residents import Residents, for_residents
from misa_engine.engine.sharded.mesh import ShardMesh, for_shards, shard_mesh
from misa_engine.engine.sharded.processes import ShardedProcesses
from misa_engine.method.config import MisaConfig


def arrangement(
    model: nn.Module, config: MisaConfig, residents: Residents | None, replicas: Replicas | None
) -> tuple[MisaConfig, ShardMesh | None, Replicas | None]:
    """Decide how ``model`` is trained.

    Args:
        model: the model.
        config: as the caller gave it.
        residents: of the model; None for one without.
        replicas: all processes, as they were joined; None where there is one.

    Returns:
        The options that it can be trained with, the mesh of sharded weights (None where they are whole), and all
        processes as they exchange gradients.

    Raises:
        ValueError: sharded in a way, or with an option or a number of processes, that MISA does not train.
    """
    mesh = shard_mesh(model)
    if mesh is None:
        return for_residents(config, residents), None, replicas
    if residents is not None:
        raise ValueError(
            "the model has residents and its weights were sharded (fully_shard) afterwards: masters on the host are "
            "whole. Load it anew, without one of the two."
        )
    return for_shards(config), mesh, None if replicas is None else ShardedProcesses.beside(replicas, mesh)

"""ShardMesh: the processes that hold a model's rows, what of FSDP2 is used, and what is refused before training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from misa_engine.engine.arena import capacity_of_rows
from misa_engine.engine.replicas import Replicas
from misa_engine.engine.shards import (
    first_element,
    is_sharded,
    local,
    most_elements,
    put_together,
    shard_dimension,
)
from misa_engine.kernels.tiles import GROUP
from misa_engine.method.config import MisaConfig

logger = logging.getLogger(__name__)


class ShardMesh:
    """The processes over which a model's rows are divided.

    Args:
        model: sharded by ``fully_shard``.
        parameters: all its parameters by name, DTensors of one mesh.

    Attributes:
        parameters: all parameters by name.
        size: processes that hold one whole model together.
        peers: ranks, of torch's default group, that hold the same part (HSDP); this one alone otherwise.
    """

    #: The round's accounts lie in ``norm_sums`` alone, by slot.
    by_slot = True

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        some = next(iter(parameters.values()))
        dimension, self.size = shard_dimension(some)
        mesh = some.device_mesh  # type: ignore[attr-defined]
        self.peers: list[int] = mesh.mesh.select(dimension, mesh.get_local_rank(dimension)).reshape(-1).tolist()
        self._group: dist.ProcessGroup = mesh.get_group(dimension)
        self._modules = fsdp_modules(model)
        self.parameters = parameters

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        return self.parameters[name].numel()

    def held(self, name: str) -> int:
        """Elements of its rows here."""
        return local(self.parameters[name]).numel()

    def first(self, name: str) -> int:
        """Index, in the flat whole parameter, of the first of these."""
        return first_element(self.parameters[name])

    def most(self, name: str) -> int:
        """Elements of the rows of the process that has most."""
        return most_elements(self.parameters[name])

    def settle(self, what: str) -> None:
        """Before weights or ``requires_grad`` change: no pass is under way, and nobody holds gathered weights.

        Args:
            what: is about to be done, for the message.

        Raises:
            RuntimeError: a forward or backward pass is under way.
        """
        for module in self._modules:
            for group in _groups(module):
                if group._training_state.name != "IDLE":
                    raise RuntimeError(
                        f"{what} within a forward or backward pass of a sharded model ({group._module_fqn or 'root'} "
                        f"is in {group._training_state.name}): weights and the set of trained matrices may change "
                        "between two steps only. Call it after backward() has returned."
                    )
            module.reshard()  # what an evaluation left gathered would be stale from now on

    def add_up(self, numbers: Tensor, replicas: Replicas | None) -> Tensor:
        """Replace ``numbers`` by their sums over the processes that hold one model; the same bits in all of them."""
        if self.size > 1:
            assert replicas is not None
            with replicas.speaking("sums of squares are added up"):
                dist.all_reduce(numbers, group=self._group)
        return numbers

    def whole(self, part: Tensor, longest: int, numel: int) -> Tensor:
        """As ``shards.put_together``."""
        if self.size == 1:
            return part.detach().cpu().clone()
        return put_together(part, longest, numel, self._group)

    def capacity(self, budget: int, sampled: Sequence[str], always: Sequence[str]) -> tuple[int, int]:
        """``arena.capacity_of_rows`` for the rows that the first process holds: it never has fewer than another."""
        sizes = [[(self.numel(name), self.most(name)) for name in names] for names in (sampled, always)]
        return capacity_of_rows(budget, *sizes)

    def check_groups(self, config: MisaConfig, trained: Sequence[str]) -> None:
        """Refuse 8-bit moments where a shard begins inside a group that shares a scale.

        Raises:
            ValueError: with the parameter's name.
        """
        if config.state_dtype != "int8":
            return
        for name in trained:
            if self.size > 1 and self.most(name) % GROUP:
                raise ValueError(
                    f"state_dtype='int8' with sharded weights: {name} of shape {list(self.parameters[name].shape)} is "
                    f"cut over {self.size} processes inside a group of {GROUP} elements that share a scale. Use "
                    "state_dtype='float32', or name it in frozen=(...)."
                )


def shard_mesh(model: nn.Module) -> ShardMesh | None:
    """The mesh over which ``model`` is sharded; None when it is not.

    Raises:
        ValueError: sharded in a way that MISA does not train.
    """
    for module in fsdp_modules(model):
        module.reshard()  # after an evaluation the root's parameters are plain tensors
        if any(type(group.offload_policy).__name__ == "CPUOffloadPolicy" for group in _groups(module)):
            raise ValueError(
                "fully_shard was given a CPUOffloadPolicy, so that shards lie in host memory, where MISA's kernels do "
                "not update. Leave out offload_policy: a process holds only its rows of weights and gradients."
            )
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "ds_id"):
            kind = "DeepSpeed ZeRO-3" if hasattr(parameter, "ds_id") else "FullyShardedDataParallel (FSDP1)"
            raise ValueError(
                f"{name} is sharded by {kind}, which hides the matrices. Use torch.distributed.fsdp.fully_shard "
                "(FSDP2) on each layer and then on the model, before MISA(model, ...)."
            )
    if not any(map(is_sharded, parameters.values())):
        return None
    for name, parameter in parameters.items():
        _check_placement(name, parameter)
    meshes = {parameter.device_mesh for parameter in parameters.values()}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters lie on {len(meshes)} device meshes; MISA adds up the norms over one. Give the same mesh "
            "to every fully_shard."
        )
    (mesh,) = meshes
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the mesh of the sharded model has {mesh.size()} processes and the default process group "
            f"{dist.get_world_size()}; MISA needs all of them: shard over all, or hold several copies (a mesh of two "
            "dimensions, replicate and shard)."
        )
    return ShardMesh(model, parameters)


def _check_placement(name: str, parameter: Tensor) -> None:
    if not is_sharded(parameter):
        raise ValueError(
            f"{name} is a plain tensor while others are sharded. Call fully_shard on the model too, after its layers, "
            "and leave out ignored_params."
        )
    placements = parameter.placements  # type: ignore[attr-defined]
    shards = [placement for placement in placements if not placement.is_replicate()]
    if len(shards) != 1 or not shards[0].is_shard(0) or type(shards[0]).__name__ != "Shard":
        raise ValueError(
            f"{name} is distributed as {', '.join(map(repr, placements))}; MISA trains rows of one dimension of the "
            "mesh (fully_shard without shard_placement_fn, or with a mesh of two dimensions), not tensor parallelism."
        )
    part, rows = local(parameter), parameter.shape[0]
    expected = max(0, min(most_elements(parameter), parameter.numel() - first_element(parameter)))
    if part.numel() != expected:
        raise ValueError(
            f"this process holds {part.numel():,} elements of {name} with {rows} rows, where fully_shard gives it "
            f"{expected:,}. Shard the model by fully_shard."
        )


def for_shards(config: MisaConfig) -> MisaConfig:
    """The config that sharded weights are trained with: a preset's own rest rule is off, which rank 0 says.

    Raises:
        ValueError: an option that sharded weights do not have.
    """
    if config.update_in == "backward":
        raise ValueError(
            "update_in='backward' with sharded weights: whether a gradient is finite is known when all processes have "
            "their rows of all of them. Use update_in='step'; a process holds only its rows of the gradients."
        )
    if config.shard_state:
        raise ValueError(
            "shard_state=True with sharded weights: each process holds the state of its rows, so leave it out."
        )
    if config.revisit == "offload":
        raise ValueError(
            "revisit='offload' with sharded weights is not implemented. Use revisit='keep', which keeps each process's "
            "rows of the moments in its host memory as they are, or revisit='clear'."
        )
    found = config.without_own_rest()
    if found.rest != "none":
        raise ValueError(
            f"rest={config.rest!r} with sharded weights: gradients of all matrices would be reduced in every pass, and "
            "rows are normalised over what one process does not hold whole. Use rest='none', or replicas (leave out "
            "fully_shard) where the model fits one card."
        )
    if found is not config and dist.get_rank() == 0:
        logger.warning("rest is 'none' with sharded weights. Matrices outside the draw stand still.")
    return found


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch below 2.13


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Those that ``fully_shard`` was called on."""
    return [module for module in model.modules() if hasattr(type(module), "_get_fsdp_state")]

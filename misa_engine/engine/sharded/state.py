"""What a checkpoint of sharded weights holds: whole matrices, in the layout that one process writes.

So a run goes on with any number of processes, or with one and no sharding at all, and the other way round. All
processes put the matrices together and all of them have the result, in host memory; one of them writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from misa_engine.engine.arena import Arena, capacity_for, padded
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.shards import first_element, local, most_elements
from misa_engine.kernels.tiles import BLOCK
from misa_engine.method.partition import Partition


def whole_progress(
    progress: Mapping[str, Any], mesh: ShardMesh, arena: Arena, partition: Partition, budget: int
) -> dict[str, Any]:
    """The entries of ``progress`` (``state.py``) that have to do with rows, for whole matrices. All processes call it.

    Args:
        progress: of this process's rows.
        mesh: who holds the others.
        arena: of this process.
        partition: names and sizes of everything that can have a slot.
        budget: most elements that sampled matrices hold together.
    """
    names = [name for name, _ in progress["slots"]]
    starts = dict(zip(names, _starts(partition.numels[name] for name in names), strict=True))
    used = sum(padded(partition.numels[name]) for name in names)
    buffers = {}
    for category, held in progress["buffers"].items():
        ratio = _ratio(arena, category)
        whole = torch.zeros(used // ratio, dtype=held.dtype)
        for name, start in progress["slots"]:
            matrix = _put_together(held[start // ratio :], name, mesh, ratio)
            whole[starts[name] // ratio :][: matrix.numel()] = matrix
        buffers[category] = whole
    sampled = [partition.numels[name] for unit in partition.units for name in unit.params]
    capacity, _ = capacity_for(budget, sampled, [partition.numels[name] for name in partition.always])
    host = {}
    for name, (step, kept) in progress["host"].items():
        host[name] = [step, {}]
        for category, held in kept.items():
            ratio = _ratio(arena, category)
            whole = torch.zeros(padded(partition.numels[name]) // ratio, dtype=held.dtype)
            matrix = _put_together(held, name, mesh, ratio)
            whole[: matrix.numel()] = matrix
            host[name][1][category] = whole
    return {
        "slots": [[name, starts[name]] for name in names],
        "buffers": buffers,
        "round": {
            **{name: tensor.clone() for name, tensor in progress["round"].items()},
            "tile_sumsq": torch.zeros(capacity // BLOCK),
        },
        "host": host,
    }


def own_progress(saved: Mapping[str, Any], mesh: ShardMesh, arena: Arena) -> dict[str, Any]:
    """The inverse: this process's rows of a state of whole matrices, whoever wrote it.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError: the state is damaged or another
            model's; ``state.checked`` says how.
    """
    places = [(str(name), int(start)) for name, start in saved["slots"]]
    parts = {name: local(mesh.parameters[name]).numel() for name, _ in places}
    starts = dict(zip(parts, _starts(parts.values()), strict=True))
    used = sum(map(padded, parts.values()))
    buffers = {}
    for category, whole in saved["buffers"].items():
        ratio = _ratio(arena, category)
        buffers[category] = torch.zeros(used // ratio, dtype=whole.dtype, device=whole.device)
        for name, start in places:
            rows = _own(whole[start // ratio :], name, mesh, ratio)
            buffers[category][starts[name] // ratio :][: rows.numel()] = rows
    host: dict[str, Any] = {}
    for name, (step, kept) in saved["host"].items():
        host[name] = [step, {}]
        for category, whole in kept.items():
            ratio = _ratio(arena, category)
            rows = _own(whole, name, mesh, ratio)
            held = torch.zeros(padded(local(mesh.parameters[name]).numel()) // ratio, dtype=rows.dtype)
            held[: rows.numel()] = rows
            host[name][1][category] = held
    sums, tiles = saved["round"]["norm_sums"].clone(), saved["round"]["tile_sumsq"]
    for index, (name, start) in enumerate(places):  # one process adds up by tile, several by slot
        here = tiles[start // BLOCK : (start + padded(mesh.parameters[name].numel())) // BLOCK]
        sums[index] += here.sum(dtype=torch.float64).float()
    return {
        **saved,
        "slots": [[name, starts[name]] for name, _ in places],
        "buffers": buffers,
        "round": {**saved["round"], "norm_sums": sums, "tile_sumsq": torch.zeros_like(arena.tile_sumsq, device="cpu")},
        "host": host,
    }


def _put_together(held: Tensor, name: str, mesh: ShardMesh, ratio: int) -> Tensor:
    """A whole matrix's entries in a buffer, from those that ``held`` begins with."""
    parameter = mesh.parameters[name]
    own, most, numel = local(parameter).numel(), most_elements(parameter), parameter.numel()
    return mesh.whole(held[: -(-own // ratio)], -(-most // ratio), -(-numel // ratio))


def _own(whole: Tensor, name: str, mesh: ShardMesh, ratio: int) -> Tensor:
    """This process's entries of what a whole matrix has in a buffer."""
    parameter = mesh.parameters[name]
    first, numel = first_element(parameter), local(parameter).numel()
    return whole[first // ratio : first // ratio - (-numel // ratio)]


def _starts(numels: Any) -> list[int]:
    starts, position = [], 0
    for numel in numels:
        starts.append(position)
        position += padded(numel)
    return starts


def _ratio(arena: Arena, category: str) -> int:
    """Elements of a matrix that one entry of a buffer stands for."""
    if category == "residual_bits":
        return 1
    return arena.capacity // arena.moments()[category].numel()

"""What a checkpoint holds where processes hold parts of the state: whole matrices, in the layout of one process.

So a run goes on with any number of processes, or with one and no sharding at all, and the other way round. All
processes put the matrices together and all of them have the result, in host memory; one of them writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from misa_engine.engine.arena import Arena, capacity_for, packed_starts, padded
from misa_engine.kernels.tiles import BLOCK, GROUP
from misa_engine.method.partition import Partition


class Division(Protocol):
    """How every parameter is divided into consecutive parts, one for each process."""

    #: The round's accounts lie in ``norm_sums`` alone; otherwise by tile, in every process all of them.
    by_slot: bool

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""

    def held(self, name: str) -> int:
        """Elements of this process's part."""

    def first(self, name: str) -> int:
        """Index, in the flat whole parameter, of the first of these."""

    def most(self, name: str) -> int:
        """Elements of the largest part, the first process's."""

    def whole(self, part: Tensor, longest: int, numel: int) -> Tensor:
        """A flat tensor of ``numel`` entries put together from everybody's parts, in host memory."""


def whole_progress(
    progress: Mapping[str, Any], division: Division, partition: Partition, budget: int
) -> dict[str, Any]:
    """The entries of ``progress`` (``state.py``) that have to do with parts, for whole matrices. All processes call it.

    Args:
        progress: of this process's parts.
        division: who holds the others.
        partition: names and sizes of everything that can have a slot.
        budget: most elements that sampled matrices hold together.
    """
    names = [name for name, _ in progress["slots"]]
    starts = dict(zip(names, packed_starts(partition.numels[name] for name in names), strict=True))
    used = sum(padded(partition.numels[name]) for name in names)
    buffers = {}
    for category, held in progress["buffers"].items():
        ratio = _ratio(category)
        whole = torch.zeros(used // ratio, dtype=held.dtype)
        for name, start in progress["slots"]:
            matrix = _put_together(held[start // ratio :], name, division, ratio)
            whole[starts[name] // ratio :][: matrix.numel()] = matrix
        buffers[category] = whole
    sampled = [partition.numels[name] for unit in partition.units for name in unit.params]
    capacity, _ = capacity_for(budget, sampled, [partition.numels[name] for name in partition.always])
    host = {}
    for name, (step, kept) in progress["host"].items():
        host[name] = [step, {}]
        for category, held in kept.items():
            ratio = _ratio(category)
            whole = torch.zeros(padded(partition.numels[name]) // ratio, dtype=held.dtype)
            matrix = _put_together(held, name, division, ratio)
            whole[: matrix.numel()] = matrix
            host[name][1][category] = whole
    round_ = {name: tensor.clone() for name, tensor in progress["round"].items()}
    if division.by_slot:
        round_["tile_sumsq"] = torch.zeros(capacity // BLOCK)
    return {"slots": [[name, starts[name]] for name in names], "buffers": buffers, "round": round_, "host": host}


def own_progress(saved: Mapping[str, Any], division: Division, arena: Arena) -> dict[str, Any]:
    """The inverse: this process's parts of a state of whole matrices, whoever wrote it.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError: the state is damaged or another
            model's; ``state.checked`` says how.
    """
    places = [(str(name), int(start)) for name, start in saved["slots"]]
    parts = {name: division.held(name) for name, _ in places}
    starts = dict(zip(parts, packed_starts(parts.values()), strict=True))
    used = sum(map(padded, parts.values()))
    buffers = {}
    for category, whole in saved["buffers"].items():
        ratio = _ratio(category)
        buffers[category] = torch.zeros(used // ratio, dtype=whole.dtype, device=whole.device)
        for name, start in places:
            rows = _own(whole[start // ratio :], name, division, ratio)
            buffers[category][starts[name] // ratio :][: rows.numel()] = rows
    host: dict[str, Any] = {}
    for name, (step, kept) in saved["host"].items():
        host[name] = [step, {}]
        for category, whole in kept.items():
            ratio = _ratio(category)
            rows = _own(whole, name, division, ratio)
            held = torch.zeros(padded(division.held(name)) // ratio, dtype=rows.dtype)
            held[: rows.numel()] = rows
            host[name][1][category] = held
    sums, tiles = saved["round"]["norm_sums"].clone(), saved["round"]["tile_sumsq"]
    own_tiles = torch.zeros_like(arena.tile_sumsq, device="cpu")
    packed = packed_starts(division.numel(name) for name, _ in places)
    for index, ((name, start), now) in enumerate(zip(places, packed, strict=True)):
        here = tiles[start // BLOCK : (start + padded(division.numel(name))) // BLOCK]
        if division.by_slot:  # what others add up by tile
            sums[index] += here.sum(dtype=torch.float64).float()
        else:
            own_tiles[now // BLOCK :][: here.numel()] = here
    return {
        **saved,
        "slots": [[name, starts[name]] for name, _ in places],
        "buffers": buffers,
        "round": {**saved["round"], "norm_sums": sums, "tile_sumsq": own_tiles},
        "host": host,
    }


def _put_together(held: Tensor, name: str, division: Division, ratio: int) -> Tensor:
    """A whole matrix's entries in a buffer, from those that ``held`` begins with."""
    own, most, numel = division.held(name), division.most(name), division.numel(name)
    return division.whole(held[: -(-own // ratio)], -(-most // ratio), -(-numel // ratio))


def _own(whole: Tensor, name: str, division: Division, ratio: int) -> Tensor:
    """This process's entries of what a whole matrix has in a buffer."""
    first, numel = division.first(name), division.held(name)
    return whole[first // ratio : first // ratio - (-numel // ratio)]


def _ratio(category: str) -> int:
    """Elements of a matrix that one entry of a buffer stands for."""
    return GROUP if category.endswith("_scale") else 1

"""Share: the part of every matrix that one of several processes updates and keeps the state of.

Parts are consecutive whole tiles: ceil(tiles / K) of them to each process, fewer or none to the last. Sums of squares,
scales of 8-bit moments and random bits are all made by the tile or finer, so that they do not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from misa_engine.engine.replicas import Replicas
from misa_engine.engine.shards import all_gather, put_together
from misa_engine.kernels.tiles import BLOCK


def most_of(numel: int, size: int) -> int:
    """The most elements that one of ``size`` processes keeps of ``numel``: what the first one does."""
    return min(numel, _length(numel, size))


def _length(numel: int, size: int) -> int:
    return -(-max(1, -(-numel // BLOCK)) // size) * BLOCK


@dataclass
class Sending:
    """Parts of a weight under way; ``wait`` ends it."""

    weight: Tensor
    whole: Tensor
    """What is received into: the weight itself, or with padding."""
    work: dist.Work

    def wait(self, replicas: Replicas) -> None:
        """Let the device, or this process where there is none, wait for the result."""
        with replicas.speaking("updated weights are sent"):
            self.work.wait()
        if self.whole is not self.weight:
            self.weight.copy_(self.whole[: self.weight.numel()])


class Share:
    """One process's parts.

    Args:
        replicas: the processes.
        parameters: name -> parameter, everything that can be trained.
    """

    #: The round's accounts lie by tile, whole, in every process.
    by_slot = False

    def __init__(self, replicas: Replicas, parameters: Mapping[str, Tensor]):
        self._replicas, self._parameters, self.size = replicas, parameters, replicas.size

    def first_of(self, numel: int) -> int:
        """Index of the first element that this process keeps of a parameter of ``numel``."""
        return min(numel, self._replicas.rank * _length(numel, self.size))

    def of(self, parameter: Tensor) -> Tensor:
        """This process's part, a flat view; empty where there are fewer tiles than processes before it."""
        flat = parameter.detach().view(-1)
        first = self.first_of(flat.numel())
        return flat[first : first + _length(flat.numel(), self.size)]

    def numel(self, name: str) -> int:
        """Elements of a whole parameter."""
        return self._parameters[name].numel()

    def held(self, name: str) -> int:
        """Elements of its part here."""
        return self.of(self._parameters[name]).numel()

    def first(self, name: str) -> int:
        """Where that part begins."""
        return self.first_of(self.numel(name))

    def most(self, name: str) -> int:
        """Elements of the largest part."""
        return most_of(self.numel(name), self.size)

    def send(self, weight: Tensor) -> Sending:
        """Begin to replace the other processes' parts of ``weight``, flat and whole, by what they have."""
        length, numel = _length(weight.numel(), self.size), weight.numel()
        whole = weight if length * self.size == numel else weight.new_zeros(length * self.size)
        first = self._replicas.rank * length
        part = whole[first : first + length]
        if whole is not weight:
            own = self.of(weight)
            part[: own.numel()].copy_(own)
        self._replicas.sent_weight_bytes += weight.nbytes
        with self._replicas.speaking("updated weights are sent"):
            # as bytes, of any dtype; in place, where NCCL and gloo both allow it
            work = all_gather(
                whole.view(torch.uint8), part.view(torch.uint8), group=self._replicas.world, async_op=True
            )
        return Sending(weight, whole, work)

    def finish(self, sending: list[Sending]) -> None:
        """Wait for all of them."""
        for one in sending:
            one.wait(self._replicas)

    def whole(self, part: Tensor, longest: int, numel: int) -> Tensor:
        """As ``shards.put_together``."""
        with self._replicas.speaking("the state is put together"):
            return put_together(part, longest, numel, self._replicas.world)

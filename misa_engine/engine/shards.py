"""Shards: what one process holds of a tensor that several hold together. A plain tensor is its own, only shard.

FSDP2 (``fully_shard``) gives every process consecutive rows: ceil(rows / K) of them to each, fewer or none to the last.
So a shard is a stretch of the flat parameter, from ``first_element`` on. Sizes and shapes of a DTensor are those of the
whole tensor; ``local`` is what memory, kernels and version counters know.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch below 2.13


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, of which this process holds a part. Does not import torch.distributed.tensor (2 s)."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, a plain tensor over the same memory."""
    return getattr(tensor, "_local_tensor", tensor)


def first_element(tensor: Tensor) -> int:
    """Index, in the flat whole tensor, of the first element that this process holds."""
    if not is_sharded(tensor):
        return 0
    rows, (dimension, size) = tensor.shape[0], shard_dimension(tensor)
    coordinate = tensor.device_mesh.get_local_rank(dimension)  # type: ignore[attr-defined]
    first_row = min(rows, coordinate * -(-rows // size))
    return first_row * (tensor.numel() // rows)


def most_elements(tensor: Tensor) -> int:
    """The most elements that any process holds of it."""
    if not is_sharded(tensor):
        return tensor.numel()
    rows, (_, size) = tensor.shape[0], shard_dimension(tensor)
    return -(-rows // size) * (tensor.numel() // rows)


def shard_dimension(tensor: Tensor) -> tuple[int, int]:
    """The dimension of a DTensor's mesh along which its rows are divided, and the number of parts."""
    dimension = next(i for i, p in enumerate(tensor.placements) if p.is_shard())  # type: ignore[attr-defined]
    return dimension, tensor.device_mesh.size(dimension)  # type: ignore[attr-defined]


def put_together(part: Tensor, longest: int, numel: int, group: dist.ProcessGroup) -> Tensor:
    """Put a flat tensor together from everybody's consecutive parts, in host memory.

    Args:
        part: (n,) what this process holds.
        longest: elements that the first process holds; only the last of those that hold any has fewer.
        numel: elements of all together.
        group: the processes.
    """
    mine = torch.zeros(longest, dtype=part.dtype, device=part.device)
    mine[: part.numel()].copy_(part)
    together = mine.new_empty(longest * dist.get_world_size(group))
    all_gather(together.view(torch.uint8), mine.view(torch.uint8), group=group)  # as bytes: NCCL does not know int16
    return together.cpu()[:numel]

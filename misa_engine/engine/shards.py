"""Shards: what one process holds of a tensor that several hold together. A plain tensor is its own, only shard.

FSDP2 (``fully_shard``) gives every process consecutive rows: ceil(rows / K) of them to each, fewer or none to the last.
So a shard is a stretch of the flat parameter, from ``first_element`` on. Sizes and shapes of a DTensor are those of the
whole tensor; ``local`` is what memory, kernels and version counters know.
"""

from __future__ import annotations

from torch import Tensor


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

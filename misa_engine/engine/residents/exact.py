"""Multiply with the exact weights instead of their 8 bits, for a comparison: one matrix at a time, in the workspace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from misa_engine.engine.residents.matrix import Resting
    from misa_engine.engine.residents.store import Residents


@contextmanager
def exact_weights(residents: Residents) -> Iterator[None]:
    """Inside, what rests counts as its master, which is copied into the workspace for each product.

    So a model that the card has no room for computes there as it would in full; nothing is allocated. For forward
    passes without gradients.
    """
    matrices = [residents.matrix(name) for name in residents.resting]
    for matrix in matrices:
        vars(matrix)["expand"] = partial(_copy_of_master, matrix, residents)
    try:
        yield
    finally:
        for matrix in matrices:
            del vars(matrix)["expand"]


@torch.no_grad()
def _copy_of_master(matrix: Resting, residents: Residents, dtype: torch.dtype) -> Tensor:
    """The master (out, in) in the workspace, or in a tensor of its own where autocast wants another dtype."""
    assert matrix.master is not None
    out = residents.workspace[: matrix.numel].view(matrix.shape)
    out.copy_(matrix.master, non_blocking=True)
    return out.to(dtype)

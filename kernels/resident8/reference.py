"""Matrices in 8 bits in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .formats import Format

#: Elements that are handled at once, in whole rows of blocks: a few float32 copies of them exist meanwhile.
PART = 1 << 20


def quantise_reference(weight: Tensor, codes: Tensor, steps: Tensor, format: Format) -> None:
    """Store a matrix; arguments as in ``quantise``."""
    for rows, blocks in _parts(weight, format):
        x = _blocked(weight[rows].float(), format)
        largest = x.abs().amax(dim=(1, 3))
        # not largest / 127.0, which torch computes on a GPU as a product with the reciprocal
        step = largest.div_(torch.full_like(largest, format.largest)).to(format.steps)
        steps[blocks] = step
        divisor = torch.where(step > 0, step.float(), 1.0)
        y = x / divisor[:, None, :, None]  # not in place: x is the weight itself where nothing was converted
        if format.codes == torch.int8:
            y.add_(0.5).floor_()  # at most 127: a rounded step is off by 2⁻⁹, and 127·(1+2⁻⁹) rounds to 127
        else:
            y.clamp_(-format.largest, format.largest)
        codes[rows] = _flat(y, weight[rows].shape).to(format.codes)


def dequantise_reference(codes: Tensor, steps: Tensor, out: Tensor, format: Format) -> None:
    """Expand a matrix; arguments as in ``dequantise``."""
    for rows, blocks in _parts(out, format):
        x = _blocked(codes[rows].float(), format).mul_(steps[blocks].float()[:, None, :, None])
        out[rows] = _flat(x, out[rows].shape).to(out.dtype)


def _blocked(x: Tensor, format: Format) -> Tensor:
    """(blocks down, rows of a block, blocks across, columns of a block), filled up with zeros."""
    (down, across), cols = format.blocks(tuple(x.shape)), format.cols or x.shape[1]
    if x.shape != (down * format.rows, across * cols):
        whole = x.new_zeros(down * format.rows, across * cols)
        whole[: x.shape[0], : x.shape[1]] = x
        x = whole
    return x.view(down, format.rows, across, cols)


def _flat(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``_blocked``."""
    down, rows, across, cols = x.shape
    return x.reshape(down * rows, across * cols)[: shape[0], : shape[1]]


def _parts(matrix: Tensor, format: Format) -> Iterator[tuple[slice, slice]]:
    """Rows to handle at once, and their rows of blocks."""
    n = max(PART // max(matrix.shape[1] * format.rows, 1), 1)
    for first in range(0, format.blocks(tuple(matrix.shape))[0], n):
        yield slice(first * format.rows, (first + n) * format.rows), slice(first, first + n)

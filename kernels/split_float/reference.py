"""Splitting, joining and stochastic rounding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiles import chunks


def split_into(
    x: Tensor,  # float32, any shape, overwritten: it is the scratch space
    hi: Tensor,  # bfloat16, same shape, modified in place
    lo: Tensor,  # int16, same shape, modified in place
) -> None:
    """Split without allocating anything."""
    bits = x.view(torch.int32)
    lo.copy_(bits)  # keeps the low 16 bits, which as an int16 are bits - (hi << 16)
    hi.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def join_into(
    hi: Tensor,  # bfloat16, any shape
    lo: Tensor,  # int16, same shape
    out: Tensor,  # float32, same shape, modified in place
) -> None:
    """Join without allocating anything."""
    bits = out.view(torch.int32)
    bits.copy_(hi.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(lo)


def round_stochastic_reference(weight: Tensor, lo: Tensor, key1: int, key2: int, first_index: int) -> None:
    """Round to the 16 bits of ``weight`` at random; arguments as in ``round_stochastic_``, keys of 31 bits."""
    for start, n in chunks(weight.numel()):
        hi, rest = weight[start : start + n].view(torch.int16), lo[start : start + n]
        random = random_bits(first_index + start, hi.numel(), key1, key2, device=weight.device)
        bits = (hi.int() << 16) + rest
        rounded = ((bits + random) >> 16).short()
        # A master at the edge of the range keeps its nearest neighbour instead of becoming infinite.
        hi.copy_(torch.where((rounded & 0x7F80) == 0x7F80, hi, rounded))
        rest.zero_()


def random_bits(first: int, count: int, key1: int, key2: int, *, device: torch.device) -> Tensor:
    """Give 16 random bits for each element from ``first`` on: (count,) int32, 0 … 65,535."""
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return (_mix(_mix((index & 0xFFFFFFFF) ^ key1) ^ key2 ^ (index >> 32)) >> 16).int()


def _mix(x: Tensor) -> Tensor:
    """Bijective 32-bit mixing function ("lowbias32", C. Wellons), on the low 32 bits of an int64.

    A few integer operations, the same in every backend; Philox costs ten rounds and differs between libraries.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)

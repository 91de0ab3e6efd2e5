"""Stochastic rounding as a Triton kernel, and its launcher. Rules of all kernels: ``kernels``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device
from ..tiles import BLOCK


@triton.jit
def _mix(x):
    """Mix 32 bits: ``_mix`` of reference.py."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(index, key1, key2):
    """Give 16 random bits for each element: ``random_bits`` of reference.py. ``index`` is an i64."""
    bits = _mix((index & 0xFFFFFFFF).to(tl.uint32) ^ key1.to(tl.uint32))
    bits = _mix(bits ^ key2.to(tl.uint32) ^ (index >> 32).to(tl.uint32))
    return (bits >> 16).to(tl.int32)


@triton.jit(do_not_specialize=["numel", "first_index", "key1", "key2"])
def round_stochastic_kernel(
    weight,  # (numel,) i16 view of the bf16 weight, in place
    lo,  # (numel,) i16, in place
    numel,  # i32 | i64
    first_index,  # i32 | i64
    key1,  # i32
    key2,  # i32
    ALIGNED: tl.constexpr,  # numel is a multiple of 16
    BLOCK: tl.constexpr,
):
    """Round (weight, lo) up or down to the weight's 16 bits at random; lo <- 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:
        numel = numel // 16 * 16  # keeps it; ``multiple_of`` has no effect on an argument: accesses would be scalar
    inside = at < numel
    hi = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
    master = (hi << 16) + tl.load(lo + at, mask=inside, other=0).to(tl.int32)
    rounded = (master + random_bits(at + first_index, key1, key2)) >> 16
    # A master at the edge of the range keeps its nearest neighbour instead of becoming infinite.
    rounded = tl.where((rounded & 0x7F80) == 0x7F80, hi, rounded)
    tl.store(weight + at, rounded.to(tl.int16), mask=inside)
    tl.store(lo + at, tl.zeros((BLOCK,), dtype=tl.int16), mask=inside)


def launch_round_stochastic(weight: Tensor, lo: Tensor, key1: int, key2: int, first_index: int) -> None:
    """Launch one program a block of the unit."""
    with on_device(weight):
        round_stochastic_kernel[(-(-weight.numel() // BLOCK),)](
            weight.view(torch.int16),
            lo,
            weight.numel(),
            first_index,
            key1,
            key2,
            ALIGNED=weight.numel() % 16 == 0,
            BLOCK=BLOCK,
        )

"""Exact float32 = bfloat16 + 16 more bits, and the stochastic rounding that gives the 16 bits up.

The upper half is the model's own bf16 tensor, the lower half an int16 in the arena: together a float32 master weight
for 2 bytes a parameter instead of 4, and no copy back into the model.

Rounding is half away from zero: hi = (bits + 0x8000) >> 16, lo = bits - (hi << 16). That is a bijection of the 2^32
bit patterns. Round to nearest even cannot be: at a tie the difference would have to hold both -32768 and +32768. The
two rules differ on 7.6e-6 of the finite patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import on_device, triton_kernels, uses_triton
from .tiles import BLOCK, CHUNK


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 ``x`` into its bfloat16 upper half and the int16 remainder.

    131,070 of the NaN patterns have an upper half that is no NaN (the carry runs through the exponent); ``join`` still
    gives them back.
    """
    hi = torch.empty_like(x, dtype=torch.bfloat16)
    lo = torch.empty_like(x, dtype=torch.int16)
    split_into(x.clone(), hi, lo)
    return hi, lo


def join(hi: Tensor, lo: Tensor) -> Tensor:
    """Give back, bit for bit, the float32 that ``split`` took apart."""
    out = torch.empty_like(hi, dtype=torch.float32)
    join_into(hi, lo, out)
    return out


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


@torch.no_grad()
def round_stochastic_(
    weight: Tensor,  # (numel,) bfloat16, upper half of the master, modified in place
    lo: Tensor,  # (numel,) int16, lower half, modified in place: 0 afterwards
    seed: int,  # 0 <= seed < 2^63, another one for each unit and switch
    *,
    backend: str,
    first_index: int = 0,  # index of the first element in its unit, when the unit has several parameters
) -> None:
    """Round the exact master weight up or down to bfloat16 at random, so that the expectation is the master weight.

    A unit that leaves gives up its lower half. Dropped, updates below half a bf16 ulp would be lost at every switch:
    with T = 50 and lr = 1e-6 the whole drift (5e-5) is below half an ulp of a weight of 0.02 (6e-5), and training would
    stand still. The random bits depend on ``seed`` and the element's index in its unit, on nothing else.
    """
    if not 0 <= seed < 1 << 63 or first_index < 0:
        raise ValueError(f"seed must be in [0, 2^63) and first_index at least 0; got {seed} and {first_index}")
    key1, key2 = _keys(seed)
    if not uses_triton(backend, weight):
        _round_stochastic_reference(weight, lo, key1, key2, first_index)
        return
    with on_device(weight):
        triton_kernels().round_stochastic_kernel[(-(-weight.numel() // BLOCK),)](
            weight.view(torch.int16),
            lo,
            weight.numel(),
            first_index,
            key1,
            key2,
            ALIGNED=weight.numel() % 16 == 0,
            BLOCK=BLOCK,
        )


def _keys(seed: int) -> tuple[int, int]:
    """Two keys from one step of splitmix64; of 31 bits, so that Triton sees an int32 and compiles once.

    The seed is spread before it meets the index: ``index ^ seed`` would give every small seed the same random numbers
    in another order, and the errors of successive switches would add up.
    """
    mask = (1 << 64) - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x & 0x7FFFFFFF, x >> 33


def _round_stochastic_reference(weight: Tensor, lo: Tensor, key1: int, key2: int, first_index: int) -> None:
    for start in range(0, weight.numel(), CHUNK):
        hi, rest = weight[start : start + CHUNK].view(torch.int16), lo[start : start + CHUNK]
        first = first_index + start
        index = torch.arange(first, first + hi.numel(), dtype=torch.int64, device=weight.device)
        random = _mix(_mix((index & 0xFFFFFFFF) ^ key1) ^ key2 ^ (index >> 32))
        bits = (hi.int() << 16) + rest
        rounded = ((bits + (random >> 16).int()) >> 16).short()
        # A master at the edge of the range keeps its nearest neighbour instead of becoming infinite.
        hi.copy_(torch.where((rounded & 0x7F80) == 0x7F80, hi, rounded))
        rest.zero_()


def _mix(x: Tensor) -> Tensor:
    """Bijective 32-bit mixing function ("lowbias32", C. Wellons), on the low 32 bits of an int64.

    A few integer operations, the same in every backend; Philox costs ten rounds and differs between libraries.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)

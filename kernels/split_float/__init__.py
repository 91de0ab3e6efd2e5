"""Exact float32 = bfloat16 + 16 more bits, and the stochastic rounding that gives the 16 bits up.

The upper half is the model's own bf16 tensor, the lower half an int16 in the arena: together a float32 master weight
for 2 bytes a parameter instead of 4, and no copy back into the model.

Rounding is half away from zero: hi = (bits + 0x8000) >> 16, lo = bits - (hi << 16). That is a bijection of the 2^32
bit patterns. Round to nearest even cannot be: at a tie the difference would have to hold both -32768 and +32768. The
two rules differ on 7.6e-6 of the finite patterns.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..backend import uses_triton
from .reference import join_into, round_stochastic_reference, split_into

__all__ = ["join", "join_into", "random_keys", "round_stochastic_", "seed_of", "split", "split_into"]


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
    key1, key2 = random_keys(seed)
    if not uses_triton(backend, weight):
        round_stochastic_reference(weight, lo, key1, key2, first_index)
        return
    from .kernel import launch_round_stochastic

    launch_round_stochastic(weight, lo, key1, key2, first_index)


def seed_of(*parts: object) -> int:
    """A seed, 0 <= seed < 2^56, from anything that names one use of random bits, such as run, round and parameter.

    The same in every process: Python's own hash() is salted.
    """
    return int.from_bytes(hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=7).digest(), "little")


def random_keys(seed: int) -> tuple[int, int]:
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

"""Bytes that a pass over the parameters must move, from the dtypes alone.

Every kernel benchmark divides these bytes by its time, so the rows of different schemes can be compared with each other
and with a copy. A pass reads each of its inputs and writes each of its outputs once; an unfused optimizer makes many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from misa_engine.kernels.blockwise8 import GROUP

#: Something of which there is one for each parameter, or, with a number, one for so many parameters.
Stored: TypeAlias = torch.dtype | tuple[torch.dtype, int]

F32, BF16, I16, I8, U8 = torch.float32, torch.bfloat16, torch.int16, torch.int8, torch.uint8
#: Both moments as the arena holds them.
MOMENTS: dict[str, list[Stored]] = {"float32": [F32, F32], "int8": [I8, U8, (F32, GROUP), (F32, GROUP)]}


def held(values: Sequence[Stored]) -> float:
    """Bytes per parameter of ``values``."""
    return sum(value[0].itemsize / value[1] if isinstance(value, tuple) else float(value.itemsize) for value in values)


def moved(reads: Sequence[Stored], writes: Sequence[Stored]) -> float:
    """Bytes per parameter of one pass."""
    return held(reads) + held(writes)


def fused(weight: torch.dtype, moments: Sequence[Stored], extra: Sequence[Stored] = ()) -> float:
    """One pass that reads a gradient like the weight and updates weight, moments and ``extra`` (residual) in place."""
    in_place = [weight, *moments, *extra]
    return moved([weight, *in_place], in_place)


#: By the dtype of the gradients: each is read for the norm.
NORM = {dtype: held([dtype]) for dtype in (F32, BF16)}
#: ``clip_grad_norm_`` then multiplies each in place, even by a factor of 1.
CLIP = {dtype: moved([dtype], [dtype]) for dtype in (F32, BF16)}
#: Gradient to float32, torch's fused AdamW on the master, master to the weight: three passes.
TORCH_WITH_MASTER = moved([BF16], [F32]) + fused(F32, [F32, F32]) + moved([F32], [BF16])
#: Inputs of each operation of torch's AdamW without fusion, each of which writes one output.
EAGER = {
    "w *= 1 - lr·wd": 1, "m = lerp(m, g)": 2, "v *= β2": 1, "v += (1-β2)·g·g": 2, "d = √v": 1, "d /= c": 1,
    "d += ε": 1, "w += m / d": 3,
}  # fmt: skip
EAGER_ADAMW = sum(moved([F32] * inputs, [F32]) for inputs in EAGER.values())
#: float32 -> bfloat16 and the 16 bits below, or back.
SPLIT = moved([F32], [BF16, I16])
#: Both halves read, both written.
ROUND_STOCHASTIC = moved([BF16, I16], [BF16, I16])
#: A matrix outside the draw by the rule's passes over its gradient (bfloat16), then gradient and weight.
REST = {rule: passes * held([BF16]) + moved([BF16, BF16], [BF16]) for rule, passes in
        {"sign": 1, "row_norm": 1, "sinkhorn": 5, "sgd": 1}.items()}  # fmt: skip
#: float32 moments -> 8-bit ones, or back.
COMPRESS = moved(MOMENTS["float32"], MOMENTS["int8"])
#: What the published code does at a switch: a float32 copy of the weight that comes, and new float32 moments.
ENTER_AS_CLONE = moved([BF16], [F32, *MOMENTS["float32"]])


def enter(residual: bool, state: str) -> float:
    """What our switch writes for a parameter that comes: zeroed moments and residual bits."""
    return held([*MOMENTS[state], *([I16] if residual else [])])


def accumulate(way: str, weight: torch.dtype, slot: torch.dtype, micro_batches: int) -> float:
    """Bytes per weight that the gradients of ``micro_batches`` take from the GEMM to their sum, inputs not counted.

    Args:
        way: "gemm" writes into the slot and adds there; "hook" copies the first temporary into the slot and adds the
            others; "plain" keeps the first temporary as ``.grad``.
        weight: dtype of the weight and of temporaries.
        slot: dtype of the sum.
        micro_batches: at least 1.
    """
    later = micro_batches - 1
    if way == "gemm":
        return held([slot]) + later * moved([slot], [slot])
    first = moved([weight], [slot]) if way == "hook" else 0.0
    return micro_batches * held([weight]) + first + later * moved([weight, slot], [slot])

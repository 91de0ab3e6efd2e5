"""Moments in 8 bits: one byte an element and one float32 scale for each group of 64, 2.125 bytes instead of 8.

In a group with a = max |m|, r = √v and s = max r:

    first moment   int8    c = round(127·2x/(1+|x|)), x = m/a        →  m = a · c/(254-|c|)
    second moment  uint8   c = round(255·r/s), at least 1 if v > 0   →  v = (s · c/255)²

Softsign spends the codes on the small first moments (steps of a/254 at zero, of a/64 at the largest), and the root of v
is what the update divides by.

* Scales are float32. Moments start at zero in each round, so v is (1-β2)·g² at first; a float16 scale underflows
  there: with gradients of 1e-6 the sum of 50 updates is off by 57%, with float32 scales by 1% at every size.
* v > 0 is never stored as 0. Beside an m that is not zero it would make m/(√v + ε) the size of m/ε: with gradients of
  1e-3 and ε = 1e-8 a step of 1e4 learning rates. Raised to s/255, a small √v only makes its step smaller.
* A group of zeros has scale 0 and decodes to exactly 0. Scales divide, they are not inverted: 1/a overflows for
  a < 2.9e-39. (255/s does not: the root of the smallest float32 is 3.7e-23.)
* ``adamw`` encodes by the same formulas in another order (``step_and_quantise``): the codes are the same except in ties
  and a few cases next to one.
* An element whose moments are not finite is stored as zero: it starts again, and its 63 neighbours keep their scale.
  Steps that are skipped never come this far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import uses_triton
from ..tiles import GROUP
from .reference import compress_reference, expand_reference

__all__ = ["GROUP", "compress", "expand"]


@torch.no_grad()
def compress(
    m: Tensor,  # (n,) float32, first moment
    v: Tensor,  # (n,) float32, second moment, not negative
    m8: Tensor,  # (n,) int8, out
    v8: Tensor,  # (n,) uint8, out
    m_scale: Tensor,  # (⌈n/64⌉,) float32, out
    v_scale: Tensor,  # (⌈n/64⌉,) float32, out
    *,
    backend: str,
) -> None:
    """Quantise both moments. The last group may be partial; n is any number of elements."""
    _check_lengths(m.numel(), v, m8, v8, m_scale, v_scale)
    if not uses_triton(backend, m):
        compress_reference(m, v, m8, v8, m_scale, v_scale)
    elif m.numel():
        from .kernel import launch_compress

        launch_compress(m, v, m8, v8, m_scale, v_scale)


@torch.no_grad()
def expand(
    m8: Tensor,  # (n,) int8
    v8: Tensor,  # (n,) uint8
    m_scale: Tensor,  # (⌈n/64⌉,) float32
    v_scale: Tensor,  # (⌈n/64⌉,) float32
    m: Tensor,  # (n,) float32, out
    v: Tensor,  # (n,) float32, out
    *,
    backend: str,
) -> None:
    """Give back what ``compress`` stored."""
    _check_lengths(m.numel(), v, m8, v8, m_scale, v_scale)
    if not uses_triton(backend, m):
        expand_reference(m8, v8, m_scale, v_scale, m, v)
    elif m.numel():
        from .kernel import launch_expand

        launch_expand(m8, v8, m_scale, v_scale, m, v)


def _check_lengths(numel: int, v: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor) -> None:
    lengths = [tensor.numel() for tensor in (v, m8, v8, m_scale, v_scale)]
    groups = -(-numel // GROUP)
    if lengths != [numel, numel, numel, groups, groups]:
        raise ValueError(
            f"m of {numel} elements needs v, m8 and v8 of the same length and scales of {groups}; got "
            f"{', '.join(map(str, lengths))}"
        )

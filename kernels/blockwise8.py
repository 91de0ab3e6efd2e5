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
* An element whose moments are not finite is stored as zero: it starts again, and its 63 neighbours keep their scale.
  Steps that are skipped never come this far.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import on_device, uses_triton
from .norm import square_root
from .tiles import BLOCK, CHUNK

#: Elements that share a scale; a divisor of BLOCK, so that no group lies in two slots.
GROUP = 64

#: Moments from here on count as not finite: 254·m must not overflow. A finite v implies |g| < 1.9e19, so |m| < 1.9e19.
HUGE = 1e36


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
        for here, groups in _chunks(m.numel()):
            m_, v_ = m[here], v[here]
            if not (m_.abs().amax() < HUGE and v_.amax() < HUGE):  # a NaN, too; rare, and a comparison costs 20 µs
                kept = (m_.abs() < HUGE) & (v_ < HUGE)
                m_, v_ = torch.where(kept, m_, 0.0), torch.where(kept, v_, 0.0)
            quantise_first(m_, m8[here], m_scale[groups])
            quantise_second(v_, v8[here], v_scale[groups])
        return
    _launch("compress_kernel", m, v, m8, v8, m_scale, v_scale)


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
        for here, groups in _chunks(m.numel()):
            dequantise_first(m8[here], m_scale[groups], m[here])
            dequantise_second(v8[here], v_scale[groups], v[here])
        return
    _launch("expand_kernel", m, v, m8, v8, m_scale, v_scale)


def quantise_first(
    m: Tensor,  # (n,) float32, finite
    codes: Tensor,  # (n,) int8, out
    scale: Tensor,  # (⌈n/64⌉,) float32, out: the largest |m| of each group
) -> None:
    """Softsign code of m/a with one division: c = round(254·m / (a + |m|))."""
    x = _grouped(m)
    size = x.abs()
    a = torch.amax(size, dim=1, keepdim=True)
    y = x.mul_(254.0).div_(size.add_(torch.where(a > 0, a, 1.0)))
    codes.copy_(y.add_(0.5).floor_().view(-1)[: m.numel()])
    scale.copy_(a.view(-1))


def dequantise_first(
    codes: Tensor,  # (n,) int8
    scale: Tensor,  # (⌈n/64⌉,) float32
    out: Tensor,  # (n,) float32, modified in place
) -> None:
    """Decode m = a · c/(254 - |c|), so that the largest m of a group comes back as it was."""
    c = _grouped(codes)
    c.div_(254.0 - c.abs()).mul_(scale.unsqueeze(1))
    out.copy_(c.view(-1)[: out.numel()])


def quantise_second(
    v: Tensor,  # (n,) float32, finite, not negative
    codes: Tensor,  # (n,) uint8, out
    scale: Tensor,  # (⌈n/64⌉,) float32, out: the largest √v of each group
) -> None:
    """Code of √v: c = round(√v · (255/s)), but at least 1 where v > 0."""
    x = _grouped(v)
    r = square_root(x, out=x)
    s = torch.amax(r, dim=1, keepdim=True)
    # Not 255.0 / s, which torch computes as 255 times the reciprocal, with two roundings.
    gain = torch.full_like(s, 255.0).div_(torch.where(s > 0, s, 1.0))
    y = (r * gain).add_(0.5).floor_()
    codes.copy_(torch.maximum(y, torch.sign(r)).int().view(-1)[: v.numel()])  # float to uint8 is not vectorised
    scale.copy_(s.view(-1))


def dequantise_second(
    codes: Tensor,  # (n,) uint8
    scale: Tensor,  # (⌈n/64⌉,) float32
    out: Tensor,  # (n,) float32, modified in place
) -> None:
    """Decode v = (s · c/255)². In float32 255 · (1/255) is 1, so that s is the root of the largest v again."""
    r = _grouped(codes)
    r.mul_(1 / 255).mul_(scale.unsqueeze(1))
    out.copy_(r.mul_(r).view(-1)[: out.numel()])


def _grouped(x: Tensor) -> Tensor:
    """A float32 copy of shape (⌈n/64⌉, 64), filled up with zeros."""
    groups = -(-x.numel() // GROUP)
    out = torch.zeros(groups * GROUP, device=x.device)
    out[: x.numel()] = x
    return out.view(groups, GROUP)


def _chunks(numel: int) -> Iterator[tuple[slice, slice]]:
    """Elements and groups to handle at once."""
    for first in range(0, numel, CHUNK):
        end = min(first + CHUNK, numel)
        yield slice(first, end), slice(first // GROUP, -(-end // GROUP))


def _check_lengths(numel: int, v: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor) -> None:
    lengths = [tensor.numel() for tensor in (v, m8, v8, m_scale, v_scale)]
    groups = -(-numel // GROUP)
    if lengths != [numel, numel, numel, groups, groups]:
        raise ValueError(
            f"m of {numel} elements needs v, m8 and v8 of the same length and scales of {groups}; got "
            f"{', '.join(map(str, lengths))}"
        )


def _launch(kernel: str, m: Tensor, v: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor) -> None:
    from . import triton_blockwise8

    if m.numel() == 0:
        return
    with on_device(m):
        getattr(triton_blockwise8, kernel)[(-(-m.numel() // BLOCK),)](
            m,
            v,
            m8,
            v8,
            m_scale,
            v_scale,
            m.numel(),
            ALIGNED=m.numel() % 16 == 0,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )

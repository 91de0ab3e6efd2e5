"""The codec as Triton functions, which ``adamw_kernel`` uses too, its kernels and launchers. Rules: ``kernels``.

A tile is BLOCK elements of one dimension, its scales are BLOCK/64. A thread holds 8 elements in a row, so that a group
of 64 lies in 8 neighbouring threads and ``reshape`` moves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backend import on_device
from ..tiles import BLOCK

GROUP = tl.constexpr(tiles.GROUP)
HUGE = tl.constexpr(tiles.HUGE)
TINY = tl.constexpr(tiles.TINY)
#: Added to |x| < 2^22, it rounds x to the nearest even integer, which the lowest byte then holds: one instruction for
#: what rounding and conversion take three for, one of them on a unit of a quarter of the speed.
ROUNDING = tl.constexpr(tiles.ROUNDING)


@triton.jit
def _spread(of_group, BLOCK: tl.constexpr):
    """Repeat the value of each group for its elements: (BLOCK/64,) to (BLOCK,)."""
    return tl.reshape(tl.broadcast_to(of_group[:, None], (BLOCK // GROUP, GROUP)), (BLOCK,))


@triton.jit
def _largest(x, BLOCK: tl.constexpr):
    """Largest value of each group: (BLOCK,) to (BLOCK/64,)."""
    return tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), axis=1)


@triton.jit
def decode_first(codes, scale, BLOCK: tl.constexpr):
    """Decode m = a * c / (254 - |c|)."""
    c = codes.to(tl.float32)
    return tl.div_rn(c, 254.0 - tl.abs(c)) * _spread(scale, BLOCK)


@triton.jit
def decode_second(codes, scale, BLOCK: tl.constexpr):
    """Decode v = (s * c/255)^2."""
    root = codes.to(tl.float32) * (1 / 255) * _spread(scale, BLOCK)
    return root * root


@triton.jit
def decode_decayed(codes, scale, decay, decoded, BLOCK: tl.constexpr):
    """Decode and decay m = f(c) * (a * decay), where ``decoded`` holds f(c) = c / (254 - |c|) by the code's byte.

    From shared memory: a division takes ten instructions more.
    """
    return tl.gather(decoded, codes.to(tl.uint8, bitcast=True).to(tl.int32), axis=0) * _spread(scale * decay, BLOCK)


@triton.jit
def decode_decayed_second(codes, scale, decay, BLOCK: tl.constexpr):
    """Decode and decay v = c^2 * ((s/255)^2 * decay); c^2 is exact."""
    c = codes.to(tl.int32).to(tl.float32)
    step = scale * (1 / 255)
    return c * c * _spread(step * step * decay, BLOCK)


@triton.jit
def encode_and_step(m, root, minus_step, eps, BLOCK: tl.constexpr):
    """Codes and scales of both moments, and the step minus_step * m / (root + eps), with one division an element.

    1 / ((254 + |x|) * (root + eps)) serves the code of x = 254 m/a, 254 x / (254 + |x|), and the step.
    """
    a = _largest(tl.abs(m), BLOCK)
    x = m * _spread(tl.div_rn(254.0, tl.maximum(a, TINY)), BLOCK)
    damped = 254.0 + tl.abs(x)
    root_eps = root + eps
    both = tl.div_rn(254.0, damped * root_eps)
    m8 = _rounded(x * (root_eps * both)).to(tl.int8)
    step = m * (minus_step * (1 / 254)) * (damped * both)

    s = _largest(root, BLOCK)
    y = root * _spread(tl.div_rn(255.0, tl.maximum(s, TINY)), BLOCK)
    v8 = _rounded(tl.where(root > 0.0, tl.maximum(y, 1.0), y)).to(tl.uint8)
    return m8, v8, a, s, step


@triton.jit
def _rounded(x):
    """Integer in the lowest byte."""
    return (x + ROUNDING).to(tl.int32, bitcast=True)


@triton.jit
def encode(m, v, root, inside, BLOCK: tl.constexpr):
    """Codes and scales of both moments; zero outside, and where a moment is not finite.

    c = round(254 * m / (a + |m|));  c = round(root * (255/s)), at least 1 where root > 0
    """
    kept = inside & (tl.abs(m) < HUGE) & (v < HUGE)
    m = tl.where(kept, m, 0.0)
    size = tl.abs(m)
    a = _largest(size, BLOCK)
    y = tl.div_rn(254.0 * m, _spread(tl.where(a > 0.0, a, 1.0), BLOCK) + size)
    m8 = tl.floor(y + 0.5).to(tl.int8)

    root = tl.where(kept, root, 0.0)
    s = _largest(root, BLOCK)
    y = tl.floor(root * _spread(tl.div_rn(255.0, tl.where(s > 0.0, s, 1.0)), BLOCK) + 0.5)
    v8 = tl.where((root > 0.0) & (y < 1.0), 1.0, y).to(tl.uint8)
    return m8, v8, a, s


@triton.jit(do_not_specialize=["n"])
def compress_kernel(
    m,  # (n,) f32
    v,  # (n,) f32
    m8,  # (n,) i8, out
    v8,  # (n,) u8, out
    m_scale,  # (n/64 rounded up,) f32, out
    v_scale,  # (n/64 rounded up,) f32, out
    n,  # i32 | i64
    ALIGNED: tl.constexpr,  # n is a multiple of 16
    BLOCK: tl.constexpr,
):
    """Quantise one tile."""
    if ALIGNED:
        n = n // 16 * 16  # keeps n; ``multiple_of`` has no effect on an argument, and the accesses would be scalar
    tile = tl.program_id(0).to(tl.int64)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    group = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    inside = at < n
    v_ = tl.load(v + at, mask=inside, other=0.0)
    codes1, codes2, a, s = encode(tl.load(m + at, mask=inside, other=0.0), v_, tl.sqrt_rn(v_), inside, BLOCK)
    tl.store(m8 + at, codes1, mask=inside)
    tl.store(v8 + at, codes2, mask=inside)
    tl.store(m_scale + group, a, mask=group * GROUP < n)
    tl.store(v_scale + group, s, mask=group * GROUP < n)


def launch_compress(m: Tensor, v: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor) -> None:
    """Launch one program a tile."""
    with on_device(m):
        compress_kernel[(-(-m.numel() // BLOCK),)](
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


@triton.jit(do_not_specialize=["n"])
def expand_kernel(
    m,  # (n,) f32, out
    v,  # (n,) f32, out
    m8,  # (n,) i8
    v8,  # (n,) u8
    m_scale,  # (n/64 rounded up,) f32
    v_scale,  # (n/64 rounded up,) f32
    n,  # i32 | i64
    ALIGNED: tl.constexpr,  # n is a multiple of 16
    BLOCK: tl.constexpr,
):
    """Decode one tile."""
    if ALIGNED:
        n = n // 16 * 16  # keeps n; ``multiple_of`` has no effect on an argument, and the accesses would be scalar
    tile = tl.program_id(0).to(tl.int64)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    group = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    inside, exists = at < n, group * GROUP < n
    a = tl.load(m_scale + group, mask=exists, other=0.0)
    s = tl.load(v_scale + group, mask=exists, other=0.0)
    codes1 = tl.load(m8 + at, mask=inside, other=0)
    codes2 = tl.load(v8 + at, mask=inside, other=0)
    tl.store(m + at, decode_first(codes1, a, BLOCK), mask=inside)
    tl.store(v + at, decode_second(codes2, s, BLOCK), mask=inside)


def launch_expand(m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor, m: Tensor, v: Tensor) -> None:
    """Launch one program a tile."""
    with on_device(m):
        expand_kernel[(-(-m.numel() // BLOCK),)](
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

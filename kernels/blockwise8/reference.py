"""The codec of 8-bit moments in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..arithmetic import square_root
from ..tiles import GROUP, HUGE, TINY, chunks


def compress_reference(m: Tensor, v: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor) -> None:
    """Quantise both moments; arguments as in ``compress``."""
    for here, groups in _parts(m.numel()):
        m_, v_ = m[here], v[here]
        if not (m_.abs().amax() < HUGE and v_.amax() < HUGE):  # a NaN, too; rare, and a comparison costs 20 µs
            kept = (m_.abs() < HUGE) & (v_ < HUGE)
            m_, v_ = torch.where(kept, m_, 0.0), torch.where(kept, v_, 0.0)
        quantise_first(m_, m8[here], m_scale[groups])
        quantise_second(v_, v8[here], v_scale[groups])


def expand_reference(m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor, m: Tensor, v: Tensor) -> None:
    """Give back what was stored; arguments as in ``expand``."""
    for here, groups in _parts(m.numel()):
        dequantise_first(m8[here], m_scale[groups], m[here])
        dequantise_second(v8[here], v_scale[groups], v[here])


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


def expand_decayed(
    m8: Tensor,  # (n,) int8
    v8: Tensor,  # (n,) uint8
    m_scale: Tensor,  # (⌈n/64⌉,) float32
    v_scale: Tensor,  # (⌈n/64⌉,) float32
    beta1: Tensor,  # () float32
    beta2: Tensor,  # () float32
) -> tuple[Tensor, Tensor]:
    """β1·m and β2·v as the fused update decodes them: the factors of a group and the decay are multiplied first."""
    c = _grouped(m8)
    m = c.div_(254.0 - c.abs()).mul_((m_scale * beta1).unsqueeze(1))
    c = _grouped(v8)
    step = v_scale * (1 / 255)
    v = c.mul_(c).mul_((step * step * beta2).unsqueeze(1))
    return m.view(-1)[: m8.numel()], v.view(-1)[: v8.numel()]


def step_and_quantise(
    m: Tensor,  # (n,) float32, modified in place
    v: Tensor,  # (n,) float32, modified in place
    minus_step: Tensor,  # () float32
    eps: Tensor,  # () float32
    m8: Tensor,  # (n,) int8, out
    v8: Tensor,  # (n,) uint8, out
    m_scale: Tensor,  # (⌈n/64⌉,) float32, out
    v_scale: Tensor,  # (⌈n/64⌉,) float32, out
) -> Tensor:
    """Quantise both moments and give the step -lr·c₀·m/(√v + c₁·ε), (n,) float32, with one division an element.

    q = 254/((254 + |x|)·(√v + c₁·ε)) with x = 254·m/a serves the code 254·x/(254 + |x|) and the step.
    An element whose v is not finite or larger than ``HUGE`` starts again at zero, and does not move.
    """
    n = m.numel()
    if not v.amax() < HUGE:  # a NaN, too
        kept = v < HUGE
        m, v = torch.where(kept, m, 0.0), torch.where(kept, v, 0.0)
    m, v = _filled(m), _filled(v)
    root = square_root(v, out=v)
    s = torch.amax(root, dim=1, keepdim=True)
    y = (root * torch.full_like(s, 255.0).div_(s.clamp(min=TINY))).round_()
    codes = torch.maximum(y, torch.sign(root), out=y)
    v8.copy_(codes.int().view(-1)[:n])  # float to uint8 is not vectorised
    v_scale.copy_(s.view(-1))

    size = m.abs()
    a = torch.amax(size, dim=1, keepdim=True)
    x = torch.mul(m, torch.full_like(a, 254.0).div_(a.clamp(min=TINY)), out=y)
    damped = torch.abs(x, out=size).add_(254.0)
    root.add_(eps)
    both = torch.full_like(root, 254.0).div_(damped * root)
    m8.copy_(x.mul_(root.mul_(both)).round_().view(-1)[:n])
    m_scale.copy_(a.view(-1))
    return m.mul_(minus_step * (1 / 254)).mul_(damped.mul_(both)).view(-1)[:n]


def _filled(x: Tensor) -> Tensor:
    """``x`` of shape (⌈n/64⌉, 64): a view where n is a multiple of 64, else a copy filled up with zeros."""
    return x.view(-1, GROUP) if x.numel() % GROUP == 0 else _grouped(x)


def _grouped(x: Tensor) -> Tensor:
    """A float32 copy of shape (⌈n/64⌉, 64), filled up with zeros."""
    groups = -(-x.numel() // GROUP)
    out = torch.zeros(groups * GROUP, device=x.device)
    out[: x.numel()] = x
    return out.view(groups, GROUP)


def _parts(numel: int) -> Iterator[tuple[slice, slice]]:
    """Elements and groups to handle at once."""
    for first, n in chunks(numel):
        yield slice(first, first + n), slice(first // GROUP, -(-(first + n) // GROUP))

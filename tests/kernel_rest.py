"""The rest rules' kernels beside their references: what the interpreter's and the GPU's tests share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from misa_engine.kernels.rest import RULES, RestScratch, rest_step

RATE = 3e-3
#: Few columns, a multiple of 16, and more columns than one piece of a program that goes down them.
SHAPES = [(7, 40), (48, 32), (33, 130)]


def case(shape: tuple[int, int], dtype: torch.dtype, scale: float = 1e-3) -> tuple[Tensor, Tensor]:
    """A weight and a gradient whose rows and columns are of very different size, as real ones are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    spread = torch.randn(shape[0], 1, generator=generator).exp() * torch.randn(shape[1], generator=generator).exp()
    return weight.to(dtype), (torch.randn(shape, generator=generator) * spread * scale).to(dtype)


def run(
    weight: Tensor,
    grad: Tensor,
    rule: str,
    *,
    rate: float = RATE,
    seed: int = 1,
    transposed: bool = False,
    backend: str = "reference",
    device: str = "cpu",
) -> tuple[Tensor, float]:
    """The moved weight, back on the CPU, and the sum of squares."""
    moved, grad, sumsq = weight.clone().to(device), grad.to(device), torch.zeros(1, device=device)
    scratch = RestScratch.allocate(*weight.shape, device)
    rest_step(moved, grad, sumsq, scratch, rule=rule, rate=rate, seed=seed, transposed=transposed, backend=backend)
    return moved.cpu(), sumsq.item()


def rest_rules(device: str = "cpu") -> str:
    """Sign and sgd bit for bit; a factor that was summed in another order may turn one rounding in a hundred."""
    for rule in RULES:
        for transposed in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                for shape in SHAPES:
                    weight, grad = case(shape, dtype)
                    got, sumsq = run(weight, grad, rule, transposed=transposed, backend="triton", device=device)
                    expected, exact = run(weight, grad, rule, transposed=transposed)
                    torch.testing.assert_close(sumsq, exact, rtol=1e-6, atol=0.0)
                    off = (got != expected).sum().item()
                    if off > (
                        0 if rule in ("sign", "sgd") else weight.numel() / 100 if dtype != torch.float32 else 1e9
                    ):
                        return f"{rule}, {dtype}, {shape}, transposed {transposed}: {off} weights differ"
                    step = 2**-7 if dtype == torch.bfloat16 else 1e-6
                    torch.testing.assert_close(got, expected, rtol=step, atol=1e-6 * RATE)
    return ""


def rest_moves_nothing(device: str = "cpu") -> str:
    """Without a finite gradient, or without any, not a bit changes."""
    for rule in RULES:
        for dtype in (torch.float32, torch.bfloat16):
            weight, grad = case((5, 40), dtype)
            for bad in (math.nan, math.inf, -math.inf, 0.0):
                broken = torch.zeros_like(grad) if bad == 0 else grad.clone()
                broken[1, 3] = bad
                if not torch.equal(run(weight, broken, rule, backend="triton", device=device)[0], weight):
                    return f"{rule}, {dtype}: moved by {bad}"
    return ""

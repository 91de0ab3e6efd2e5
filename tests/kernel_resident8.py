"""Matrices in 8 bits: what the interpreter's, the GPU's and the plain tests share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from misa_engine.kernels.resident8 import FORMATS, Packed, dequantise, quantise

#: One row, ragged in both directions, more columns than a program's piece, exact blocks, one column.
SHAPES = [(1, 40), (131, 257), (3, 2304), (128, 256), (5, 1)]


def heavy(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights with blocks of very different size, one of them zero, and single large ones, as real layers have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp() * 0.02
    weight[:, ::97] *= 30
    weight[shape[0] // 2, :128] = 0
    return weight.to(dtype)


def edges() -> Tensor:
    """Rows of what rounding can get wrong: ties between codes, subnormals, the ends of the range, tiny steps."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values.unique()
    ties = (grid[1:] + grid[:-1]) / 2  # halfway between two codes of e4m3
    ulp = torch.nextafter(ties, torch.full_like(ties, math.inf))
    rows = [ties[:128], ties[126:254], ulp[:128], ulp[126:254]]
    rows += [torch.linspace(-127, 127, 128), torch.arange(-64, 64) + 0.5, torch.full((128,), 1e-40)]
    rows += [torch.full((128,), 3.3e38), torch.zeros(128), -torch.zeros(128)]
    table = torch.stack([torch.cat([row, row.new_zeros(128 - row.numel())]) for row in rows])
    table[:4, -1], table[5, -1] = 448.0, 127.0
    return table


def packed(weight: Tensor, format: str, backend: str = "reference", device: str = "cpu") -> Packed:
    result = Packed.allocate(FORMATS[format], tuple(weight.shape), device)
    result.codes.view(torch.uint8).fill_(0xA5)  # what is not written shows
    quantise(weight.to(device), result, backend=backend)
    return result


def expanded(of: Packed, dtype: torch.dtype = torch.float32, backend: str = "reference") -> Tensor:
    out = torch.full(of.codes.shape, math.nan, dtype=dtype, device=of.codes.device)
    dequantise(of, out, backend=backend)
    return out


def resident_formats(device: str = "cpu") -> str:
    """Codes, steps and expanded weights bit for bit, in few programs: one takes the interpreter 10 ms and more.

    A row of more columns than a program's piece, ragged ones, blocks of 128 rows with a partial one, edges of rounding.
    """
    for name, shapes in {"int8": [(2, 2200), (3, 40)], "int8_row": [(2, 2200), (3, 40)], "fp8": [(131, 130)]}.items():
        weights = [(heavy(shape, dtype), dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
        weights += [(edges(), torch.bfloat16), (edges().bfloat16(), torch.float32)]
        for weight, out in weights[1:] if name == "fp8" else weights:
            expected, got = packed(weight, name), packed(weight, name, "triton", device)
            where = f"{name}, {weight.dtype}, {tuple(weight.shape)}"
            if not torch.equal(got.codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8)):
                return f"{where}: codes differ"
            if not torch.equal(got.steps.cpu(), expected.steps):
                return f"{where}: steps differ"
            if not torch.equal(expanded(got, out, "triton").cpu(), expanded(expected, out)):
                return f"{where}: expanded to {out} differs"
    return ""

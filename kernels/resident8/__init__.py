"""Weight matrices in 8 bits, for those that do not train: quantised once, expanded whenever they are multiplied with.

    step s of a block:   the largest |w| of the block / the largest code
    stored               code = round(w / s)
    expanded             w = s · code, one rounding to the dtype of the weights

    format     block            code      step       bytes a weight   relative rms error, Gaussian and Student t₅
    int8       1 × 128          int8      bfloat16   1.016            0.65%   0.95%
    int8_row   1 × columns      int8      float32    1.001            0.87%   2.00%    (rows of 4096)
    fp8        128 × 128        e4m3      float32    1.0002           2.65%   2.64%

Rows are output units, as in ``nn.Linear.weight``, so that a block of ``int8`` lies along the input dimension. The last
block of a row or column may be partial; any shape will do. ``fp8`` is the layout of transformers' fine-grained FP8
(``weight`` and ``weight_scale_inv``), in which official FP8 checkpoints come.

The steps of ``int8`` are bfloat16, half of the bytes: codes are made with the rounded step, so that its rounding costs
next to nothing (0.648% instead of 0.647% with float32 steps, 0.953% instead of 0.951%; steps rounded up, so that no
code is cut off, 0.652% and 0.958%). Errors do not accumulate: whoever quantises has the exact weight
(``misa_engine.engine.residents``), and codes are a function of its bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import uses_triton
from .formats import FORMATS, Format, format_named
from .reference import dequantise_reference, quantise_reference

__all__ = ["FORMATS", "Format", "Packed", "dequantise", "format_named", "quantise"]


@dataclass(frozen=True)
class Packed:
    """A matrix in 8 bits."""

    format: Format
    codes: Tensor  # (rows, columns) int8 or float8_e4m3fn
    steps: Tensor  # Format.blocks(shape) bfloat16 or float32

    @classmethod
    def allocate(cls, format: Format, shape: tuple[int, ...], device: torch.device | str) -> Packed:
        """Room for a matrix of this shape, with undefined content."""
        codes = torch.empty(tuple(shape), dtype=format.codes, device=device)
        return cls(format, codes, torch.empty(format.blocks(shape), dtype=format.steps, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and steps."""
        return self.codes.nbytes + self.steps.nbytes


@torch.no_grad()
def quantise(
    weight: Tensor,  # (rows, columns) float32 or bfloat16, contiguous, finite
    packed: Packed,  # of the same shape and device, overwritten
    *,
    backend: str,
) -> None:
    """Store ``weight`` in 8 bits. A block of zeros has step 0. The result depends on the weight's bits alone.

    Raises:
        ValueError: shapes or dtypes do not fit, or the weight is not contiguous.
    """
    _check(weight, packed)
    if not uses_triton(backend, weight):
        quantise_reference(weight, packed.codes, packed.steps, packed.format)
    elif weight.numel():
        from .kernel import launch_quantise

        launch_quantise(weight, packed.codes, packed.steps, packed.format)


@torch.no_grad()
def dequantise(
    packed: Packed,
    out: Tensor,  # (rows, columns) float32 or bfloat16, contiguous, overwritten
    *,
    backend: str,
) -> None:
    """Expand to the weights that the codes stand for. Allocates nothing on a GPU.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``out`` is not contiguous.
    """
    _check(out, packed)
    if not uses_triton(backend, out):
        dequantise_reference(packed.codes, packed.steps, out, packed.format)
    elif out.numel():
        from .kernel import launch_dequantise

        launch_dequantise(packed.codes, packed.steps, out, packed.format)


def _check(weight: Tensor, packed: Packed) -> None:
    shape, format = tuple(weight.shape), packed.format
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        raise ValueError(
            f"a matrix in 8 bits is a contiguous float32 or bfloat16 matrix otherwise; got {weight.dtype} of shape "
            f"{shape}, strides {weight.stride()}"
        )
    found = (tuple(packed.codes.shape), packed.codes.dtype, tuple(packed.steps.shape), packed.steps.dtype)
    wanted = (shape, format.codes, format.blocks(shape), format.steps)
    if found != wanted:
        raise ValueError(
            f"{format.name} of shape {shape} has codes and steps {wanted[:2]}, {wanted[2:]}; got {found[:2]}, "
            f"{found[2:]}. Packed.allocate makes them."
        )

"""The formats of matrices in 8 bits: blocks, codes, steps and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """How a matrix lies in 8 bits."""

    name: str
    codes: torch.dtype
    rows: int
    """Rows of a block that share a step."""
    cols: int | None
    """Columns of a block; None is the whole row."""
    steps: torch.dtype
    """Of the steps, bfloat16 or float32."""
    largest: float
    """Largest code."""

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the table of steps of a matrix of this shape (rows, columns)."""
        rows, cols = shape
        return -(-rows // self.rows), 1 if self.cols is None else -(-cols // self.cols)

    def bytes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of the codes and of the steps of a matrix of this shape."""
        down, across = self.blocks(shape)
        return shape[0] * shape[1] * self.codes.itemsize, down * across * self.steps.itemsize


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("int8", torch.int8, 1, 128, torch.bfloat16, 127.0),
        Format("int8_row", torch.int8, 1, None, torch.float32, 127.0),
        Format("fp8", torch.float8_e4m3fn, 128, 128, torch.float32, 448.0),
    )
}


def format_named(name: str) -> Format:
    """The format of that name; ValueError with the known ones otherwise."""
    if name not in FORMATS:
        raise ValueError(f"unknown 8-bit format {name!r}: choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]

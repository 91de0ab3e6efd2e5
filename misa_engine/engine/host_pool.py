"""HostPool: host memory in few large pieces, since torch rounds every pinned allocation up to a power of two.

Taken one by one, the buffers of Qwen2.5-7B's moments would occupy 1.9 times their size. Here they lie side by side in
pieces whose sizes are powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from misa_engine.kernels.tiles import host_buffer

#: Largest piece in bytes, unless a single buffer is larger. Eight buffers of 256 MiB, so that what is left over at the
#: end of a piece, which is less than one buffer, counts little.
LARGEST = 2 << 30

#: Buffers begin at multiples of this many bytes.
ALIGNMENT = 64


class HostPool:
    """Gives out buffers that are never given back.

    Args:
        device: what is copied from and to; memory is pinned where that is a GPU.
        total: bytes of all buffers that can ever be asked for; 0 if unknown.
        pieces: cut buffers out of large pieces; None = where memory is pinned.
    """

    def __init__(self, device: torch.device, total: int, *, pieces: bool | None = None):
        self._device, self._remaining = device, total
        self._in_pieces = device.type == "cuda" if pieces is None else pieces
        self._pieces: list[Tensor] = []
        self._used: list[int] = []  # bytes of each piece

    @property
    def nbytes(self) -> int:
        """Bytes held, given out or not."""
        return sum(piece.nbytes for piece in self._pieces)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer of shape (numel,)."""
        size = numel * dtype.itemsize
        room = rounded(size)
        self._remaining -= room
        if not self._in_pieces:
            self._pieces.append(host_buffer(numel, dtype, self._device))
            return self._pieces[-1]
        fitting = [i for i, piece in enumerate(self._pieces) if self._used[i] + room <= piece.nbytes]
        if fitting:  # where the least is left over
            index = min(fitting, key=lambda i: self._pieces[i].nbytes - self._used[i])
        else:
            index = len(self._pieces)
            self._pieces.append(host_buffer(self._new_piece(room), torch.uint8, self._device))
            self._used.append(0)
        start = self._used[index]
        self._used[index] += room
        return self._pieces[index][start : start + size].view(dtype)

    def _new_piece(self, room: int) -> int:
        """Bytes of a piece for a buffer of ``room`` bytes: a power of two that what is still to come will fill."""
        wanted = min(LARGEST, self._remaining + room)
        at_most = 1 << max(wanted.bit_length() - 1, 0)
        at_least = 1 << (room - 1).bit_length()
        return max(at_most, at_least)


def rounded(size: int) -> int:
    """Bytes that a buffer of ``size`` bytes occupies in a piece."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


def own_storage(buffer: Tensor) -> Tensor:
    """The same memory as a tensor of its own: torch.save writes the whole piece behind an ordinary view."""
    return torch.from_numpy(buffer.numpy())

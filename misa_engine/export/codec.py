"""How one changed tensor is stored: the difference of its bits, itself, or a product of two matrices.

Exact. The numbers' bits are read as integers and subtracted; a small step of training changes them by a few units, up
or down. Zigzag makes small differences small positive numbers, whose bytes are then put plane by plane (all lowest
bytes, then all next ones), so that zlib sees long runs of zeros. What has no base is the difference from zeros. Where
that saves less than 3% the tensor is stored as it is. Measured in docs/guide/export.md.

Sparse. The difference again, of the share ``density`` of the numbers that changed most; the others stay the base's.

Low rank. The change as the product of two matrices, by randomised singular value decomposition with a fixed seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np
import torch
from torch import Tensor

#: Numbers that are subtracted and compressed at a time, each chunk alone, so that chunks go through several cores.
CHUNK = 1 << 22
#: zlib looks for runs only: on these planes smaller than its other strategies (12.4% against 16.8% where 24% of the
#: numbers changed) and faster than its fastest level; XOR in place of the difference takes 12% more there.
LEVEL, STRATEGY = 6, zlib.Z_RLE
#: What the difference must save for a tensor to be stored as one.
WORTH = 0.97
#: Directions beyond the rank that the randomised decomposition follows, and its rounds.
MORE, ROUNDS = 8, 3
#: Up to this many rows or columns the decomposition is the full one.
SMALL = 256

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def fitted(base: np.ndarray, base_dtype: str, dtype: str, size: int) -> np.ndarray:
    """The base's bytes as a starting point for a result of another dtype or size.

    Args:
        base: (bytes,) uint8, as stored.
        base_dtype: of the base, as safetensors calls it.
        dtype: of the result; where it differs, both must be in ``TORCH``, and the base is rounded to nearest.
        size: bytes of the result. Rows that the base does not have are zeros, rows too many are cut off.

    Returns:
        (size,) uint8.
    """
    if base_dtype != dtype:
        base = as_bytes(as_tensor(base, base_dtype).to(TORCH[dtype]))
    if base.nbytes == size:
        return base
    longer = np.zeros(size, np.uint8)
    common = min(size, base.nbytes)
    longer[:common] = base[:common]
    return longer


def as_tensor(data: np.ndarray, dtype: str) -> Tensor:
    """Bytes as a flat tensor on the same memory."""
    return torch.from_numpy(data).view(TORCH[dtype])


def as_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, (bytes,) uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


# ---- exact ----


def encode_difference(base: np.ndarray, result: np.ndarray, width: int) -> tuple[np.ndarray, list[int]] | None:
    """What has to be added to the base's bits, compressed; None where that saves too little.

    Args:
        base: (bytes,) uint8.
        result: (bytes,) uint8.
        width: bytes of a number: 1, 2, 4 or 8.

    Returns:
        All chunks, (bytes,) uint8, and the length of each.
    """
    before, after = base.view(_UNSIGNED[width]), result.view(_UNSIGNED[width])
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        chunks = list(pool.map(lambda part: _pack(before[part], after[part]), _parts(after.size)))
    if sum(map(len, chunks)) > WORTH * result.nbytes:
        return None
    return np.frombuffer(bytearray().join(chunks), np.uint8), [len(chunk) for chunk in chunks]


def decode_difference(base: np.ndarray, stored: np.ndarray, lengths: list[int], width: int) -> np.ndarray:
    """The result's bytes, (bytes,) uint8.

    Raises:
        ValueError: the stored chunks are not what was written.
    """
    before = base.view(_UNSIGNED[width])
    parts = list(_parts(before.size))
    if len(parts) != len(lengths) or sum(lengths) != stored.nbytes:
        raise ValueError("another number of chunks than the tensor has")
    ends = np.cumsum(lengths)
    places = [slice(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)]
    after = np.empty_like(before)

    def unpack(part: slice, place: slice) -> None:
        after[part] = _unpack(before[part], stored[place])

    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        list(pool.map(unpack, parts, places))
    return after.view(np.uint8)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _pack(before: np.ndarray, after: np.ndarray) -> bytes:
    width = after.itemsize
    bits = np.dtype(f"i{width}")
    step = (after - before).view(bits)  # modulo 2^bits, so nothing is lost
    zigzag = ((step << 1) ^ (step >> (8 * width - 1))).view(np.uint8)
    writer = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, STRATEGY)
    return writer.compress(zigzag.reshape(-1, width).T.tobytes()) + writer.flush()


def _unpack(before: np.ndarray, packed: np.ndarray) -> np.ndarray:
    width, size = before.itemsize, before.nbytes
    reader = zlib.decompressobj()
    try:
        planes = reader.decompress(packed.data, size)
    except zlib.error as error:
        raise ValueError(f"a chunk cannot be unpacked: {error}") from error
    if len(planes) != size:
        raise ValueError("a chunk holds less than it should")
    zigzag = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(width, -1).T).view(before.dtype).reshape(-1)
    step = (zigzag >> np.array(1, before.dtype)) ^ (0 - (zigzag & np.array(1, before.dtype)))
    return before + step


# ---- sparse ----


def thinned(base: np.ndarray, result: np.ndarray, dtype: str, density: float) -> np.ndarray:
    """The base with only those numbers replaced that changed most, to be stored as a difference.

    Args:
        base: (bytes,) uint8, of ``dtype``.
        result: (bytes,) uint8, of ``dtype``.
        dtype: one of ``TORCH``.
        density: share of the numbers that are replaced, at most; bit for bit.

    Returns:
        (bytes,) uint8.
    """
    width = _UNSIGNED[TORCH[dtype].itemsize]
    before, after = base.view(width), result.view(width)
    change = (as_tensor(result, dtype).float() - as_tensor(base, dtype).float()).abs_().numpy()
    kept = max(1, round(density * change.size))
    differs = before != after
    if int(differs.sum()) > kept:
        least = np.partition(change, change.size - kept)[change.size - kept]
        differs &= ~(change < least)  # a change that is not a number is kept
    places = np.flatnonzero(differs)[:kept]
    replaced = before.copy()
    replaced[places] = after[places]
    return replaced.view(np.uint8)


# ---- low rank ----


def encode_low_rank(
    base: np.ndarray, result: np.ndarray, dtype: str, shape: tuple[int, ...], rank: int
) -> tuple[dict[str, Tensor], np.ndarray] | None:
    """Two matrices whose product is nearly the change; None where they would be no smaller than the tensor.

    Args:
        base: (bytes,) uint8, of ``dtype``.
        result: (bytes,) uint8, of ``dtype``.
        dtype: one of ``TORCH``; the two matrices are float32 where it has at least 32 bits, else bfloat16, whose
            rounding (0.3% of the change) is far below what a rank leaves out.
        shape: of the tensor; all but the first dimension are taken together.
        rank: of the product.

    Returns:
        ``left`` (rows, rank) and ``right`` (rank, columns), and what they decode to, (bytes,) uint8.
    """
    rows, columns = shape[0], int(np.prod(shape[1:]))
    if rank * (rows + columns) >= rows * columns:
        return None
    change = (as_tensor(result, dtype).float() - as_tensor(base, dtype).float()).view(rows, columns)
    if not bool(change.isfinite().all()):
        return None
    kept = torch.float32 if TORCH[dtype].itemsize >= 4 else torch.bfloat16
    left, scale, right = _leading(change, rank)
    root = scale.sqrt()
    stored = {"left": (left * root).to(kept).contiguous(), "right": (root[:, None] * right).to(kept).contiguous()}
    return stored, decode_low_rank(base, stored, dtype)


def decode_low_rank(base: np.ndarray, stored: dict[str, Tensor], dtype: str) -> np.ndarray:
    """Base plus product, rounded to nearest, (bytes,) uint8. The last bit may depend on the machine's matrix product.

    Raises:
        ValueError: the matrices have other shapes than the base.
    """
    left, right = stored["left"].float(), stored["right"].float()
    start = as_tensor(base, dtype)
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ValueError("the two matrices cannot be multiplied")
    if left.shape[0] * right.shape[1] != start.numel():
        raise ValueError("the product has another size than the tensor")
    total = torch.addmm(start.float().view(left.shape[0], -1), left, right)
    return as_bytes(total.to(TORCH[dtype]))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: (rows, rank), (rank,), (rank, columns)."""
    if min(matrix.shape) <= max(SMALL, 2 * (rank + MORE)):
        left, scale, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        basis = matrix @ torch.randn(matrix.shape[1], rank + MORE, generator=generator)
        for _ in range(ROUNDS):  # each sharpens the basis by the square of the singular values
            basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
        basis = torch.linalg.qr(basis).Q
        small, scale, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ small
    return left[:, :rank], scale[:rank], right[:rank]

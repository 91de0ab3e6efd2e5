"""Where the exact weights of resting matrices lie on the host.

"pinned"   page-locked memory that the card copies from and to without the host (ordinary memory where the card is
the CPU, whose tensors are left where they are)
"mapped"   the tensors as they came, for hosts with little RAM: those of ``open_mapped`` are pages of the model's
own safetensors file, which the kernel drops and reads again as it likes. Training changes the pages of
matrices that were drawn, privately: each page written becomes the process's own, the file keeps its bits
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misa_engine.engine.host_pool import HostPool, rounded

PLACES = ("pinned", "mapped")

#: safetensors' names of the dtypes that weights have -> what numpy calls a number of that size, and torch's dtype.
DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "F32": (np.float32, torch.float32),
    "BF16": (np.int16, torch.bfloat16),
    "F16": (np.float16, torch.float16),
    "F8_E4M3": (np.uint8, torch.float8_e4m3fn),
    "F64": (np.float64, torch.float64),
    "I64": (np.int64, torch.int64),
    "I32": (np.int32, torch.int32),
    "U8": (np.uint8, torch.uint8),
    "I8": (np.int8, torch.int8),
    "BOOL": (np.bool_, torch.bool),
}


class Masters:
    """Takes exact weights in.

    Args:
        place: "pinned" or "mapped".
        device: the card.
        sizes: bytes of every matrix that will come.
    """

    def __init__(self, place: str, device: torch.device, sizes: list[int]):
        if place not in PLACES:
            raise ValueError(f"unknown place of the masters {place!r}: choose one of {', '.join(PLACES)}.")
        self.place = place
        self._device = device
        self._pool = HostPool(device, sum(map(rounded, sizes))) if place == "pinned" and device.type == "cuda" else None

    def take(self, weight: Tensor) -> Tensor:
        """The master of ``weight`` (contiguous), with a storage of its own: a host copy, or the tensor itself."""
        weight = weight.detach()
        if self._pool is None:
            return weight.contiguous() if weight.device.type == "cpu" else weight.cpu()
        return alone(self._pool.take(weight.numel(), weight.dtype)).view(weight.shape).copy_(weight)


def alone(flat: Tensor) -> Tensor:
    """The same memory (1-D, contiguous) as a tensor with a storage of its own.

    torch.save writes the whole storage behind a view, and transformers takes tensors that share one for tied weights
    and copies them.
    """
    if flat.device.type == "cpu":
        return torch.from_numpy(flat.view(torch.uint8).numpy()).view(flat.dtype)
    if flat.is_meta:  # nothing is shared where nothing is
        return flat
    return torch.from_dlpack(flat)


def open_mapped(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file as private mappings of their bytes: read when touched, never written back.

    Args:
        path: the file, which must not be overwritten in place as long as the tensors live.

    Returns:
        Name -> CPU tensor with a storage of its own; writing to it copies the pages written.

    Raises:
        ValueError: the file is no safetensors file, is cut off, or holds a dtype that is none of ``DTYPES``.
    """
    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is no safetensors file: its header would be {length:,} of {size:,} bytes long.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error}).") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {entry['dtype']}; weights are one of {', '.join(DTYPES)}.")
        first, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{path} is cut off: {name} ends at byte {end:,} of {size:,}. Fetch the file again.")
        number, dtype = DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        if end == first:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        # mode "c": copy on write
        pages = np.memmap(path, mode="c", dtype=number, offset=first, shape=((end - first) // dtype.itemsize,))
        tensors[name] = torch.from_numpy(pages).view(dtype).view(shape)
    return tensors

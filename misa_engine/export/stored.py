"""A model on disk as named ranges of bytes: every tensor can be read alone, and is read as it is stored.

Bytes and not tensors, because a delta must hold for any dtype, also for those that torch cannot compute with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from misa_engine.errors import UserError
from misa_engine.trainer.completeness import SAFE_INDEX, SAFE_WEIGHTS, read_header, weight_files


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    file: Path
    dtype: str
    """As safetensors calls it: BF16, F32, ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    bytes: int

    @property
    def width(self) -> int:
        """Bytes of one number; 1 where a number takes less than a byte."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return self.bytes // count if count and self.bytes % count == 0 else 1

    def read(self) -> np.ndarray:
        """Its bytes, (bytes,) uint8, in memory of their own.

        Raises:
            OSError: the file cannot be read, or ends early.
        """
        data = np.fromfile(self.file, dtype=np.uint8, count=self.bytes, offset=self.begin)
        if data.nbytes != self.bytes:
            raise OSError(f"{self.file} ends within {self.name}: it changed while it was read")
        return data

    def describe(self) -> str:
        """Dtype and shape, for a message."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class ModelFile:
    """A safetensors file: its header as it stands there, and its tensors in the order of their bytes."""

    name: str
    header: str
    tensors: tuple[StoredTensor, ...]

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return 8 + len(self.header.encode()) + sum(tensor.bytes for tensor in self.tensors)


class StoredModel:
    """The safetensors files of a model directory; reads headers only.

    Args:
        directory: that holds ``model.safetensors``, or an index and its shards.

    Raises:
        UserError: there are none, or they are damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = [read_model_file(file) for file in _files(directory)]
        self.tensors: dict[str, StoredTensor] = {}
        for tensor in (tensor for file in self.files for tensor in file.tensors):
            if tensor.name in self.tensors:
                other = self.tensors[tensor.name].file
                raise UserError(f"{directory} holds {tensor.name} twice, in {other.name} and in {tensor.file.name}.")
            self.tensors[tensor.name] = tensor
        if not self.tensors:
            raise UserError(f"{directory} holds safetensors files without a tensor in them: restore them.")

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def __iter__(self) -> Iterator[StoredTensor]:
        return iter(self.tensors.values())


def read_model_file(file: Path) -> ModelFile:
    """Header and tensors of a safetensors file.

    Raises:
        UserError: it is missing, cut short or damaged.
    """
    try:
        read_header(file)  # safetensors' own reader compares dtypes, shapes, offsets and the file's length
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(size).decode("utf-8")
        return ModelFile(file.name, header, parse_header(header, file))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing, which the model's index names: restore the model.") from error
    except ValueError as error:
        raise UserError(f"{file} is cut short or damaged ({error}): restore the model.") from error


def parse_header(header: str, file: Path) -> tuple[StoredTensor, ...]:
    """The tensors that a header names, in the order of their bytes.

    Args:
        header: JSON, as in the file.
        file: that it stands in.

    Raises:
        ValueError: the header is no header, or its tensors do not lie end to end.
    """
    start = 8 + len(header.encode())
    found = []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                shape = tuple(int(size) for size in entry["shape"])
                found.append(StoredTensor(name, file, str(entry["dtype"]), shape, start + first, last - first))
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header is damaged ({type(error).__name__})") from error
    found.sort(key=lambda tensor: (tensor.begin, tensor.bytes))
    place = start
    for tensor in found:
        if tensor.begin != place or tensor.bytes < 0:
            raise ValueError(f"the tensors do not lie end to end: {tensor.name} begins at {tensor.begin}, not {place}")
        place += tensor.bytes
    return tuple(found)


def sha256(data: Any) -> str:
    """Of bytes, or of an array's."""
    return hashlib.sha256(memoryview(data)).hexdigest()


def _files(directory: Path) -> list[Path]:
    """The files that transformers would load: one, the shards that the index names, or the only one there is."""
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist; looked in {Path.cwd()}.")
    single = directory / SAFE_WEIGHTS
    if single.is_file():
        return [single]
    try:
        files = weight_files(directory)
    except ValueError as error:
        raise UserError(f"{directory}: {error}. Restore the model.") from error
    if not files:
        other = next((path.name for path in sorted(directory.glob("pytorch_model*.bin"))), None)
        found = f"{other}, but no *.safetensors" if other else "no *.safetensors"
        remedy = " Save it once with transformers' save_pretrained, which writes safetensors." if other else ""
        raise UserError(f"{directory} holds {found}: only safetensors can be read tensor by tensor.{remedy}")
    if len(files) > 1 and not (directory / SAFE_INDEX).is_file():
        names = ", ".join(path.name for path in files[:4])
        raise UserError(f"{directory} holds {names} and no {SAFE_INDEX} that says which belong to the model.")
    return files

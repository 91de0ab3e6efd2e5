"""``apply_delta``: base and delta to the model's files again, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from misa_engine.errors import UserError
from misa_engine.export import codec
from misa_engine.export.document import CARRIED, Document, TensorEntry, part_name, read_document
from misa_engine.export.place import appearing, check_free, check_space
from misa_engine.export.stored import StoredModel, StoredTensor, read_model_file, sha256
from misa_engine.trainer.manifest import MANIFEST, has_manifest, why_damaged


def apply_delta(
    delta: Path, base: Path, output: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Document:
    """Write the model that ``delta`` was exported from.

    Args:
        delta: directory that ``export_delta`` wrote.
        base: directory of the model that the delta was made against; how it is cut into files does not matter.
        output: gets the model; empty or not there yet.
        progress: is told bytes done and bytes in all.

    Returns:
        What the delta says of itself.

    Raises:
        UserError: ``base`` is another model (the first tensor that differs is named), the delta is damaged or
            incomplete, ``output`` is in use, or the disk has too little room.
    """
    check_free(output)
    document = read_document(delta)
    if not has_manifest(delta):
        raise UserError(f"{delta} is incomplete: {MANIFEST} is missing, which is written last. Export it again.")
    problem = why_damaged(delta)
    if problem is not None:
        raise UserError(f"delta {delta}: {problem}. Restore it, or export it again.")
    start = StoredModel(base)
    for name, wanted in document.base.items():
        _check_shape(name, wanted, start, document)
    files = list(document.model_files())
    total = sum(file.bytes for file in files)
    check_space(output, total)
    done = 0
    with appearing(output) as staged:
        reader = _Reader(delta, start, document)
        for file in files:
            with open(staged / file.name, "wb") as stream:
                header = file.header.encode()
                stream.write(len(header).to_bytes(8, "little") + header)
                for tensor in file.tensors:
                    stream.write(reader.restore(tensor).data)
                    done += tensor.bytes
                    progress(done, total)
            read_model_file(staged / file.name)
        for name in document.carried:  # after the weights: what is cut short before has no config.json
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(delta / CARRIED / name, staged / name)
    return document


def _check_shape(name: str, wanted: dict, start: StoredModel, document: Document) -> None:
    found = start.tensors.get(name)
    if found is None:
        raise UserError(_other(start, document, f"it has no {name}"))
    if found.dtype != wanted["dtype"] or list(found.shape) != list(wanted["shape"]):
        there = f"{name} is {found.describe()} there and was {wanted['dtype']} {list(wanted['shape'])}"
        raise UserError(_other(start, document, there))


def _other(start: StoredModel, document: Document, reason: str) -> str:
    return (
        f"--base {start.directory} is not the model that this delta was made against ({document.base_name}): {reason}. "
        "Name that model; nothing was written."
    )


class _Reader:
    """Restores tensors, each checked against the checksums of its base and of the result."""

    def __init__(self, delta: Path, start: StoredModel, document: Document):
        self._delta, self._start, self._document = delta, start, document

    def restore(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor's bytes.

        Raises:
            UserError: the base's are others, or the delta's parts do not give what was exported.
        """
        entry = self._document.tensors[tensor.name]
        base = None
        if tensor.name in self._document.base:
            found = self._start.tensors[tensor.name]
            stored = found.read()
            if sha256(stored) != self._document.base[tensor.name]["sha256"]:
                raise UserError(_other(self._start, self._document, f"{tensor.name} holds other numbers there"))
            base = codec.fitted(stored, found.dtype, tensor.dtype, tensor.bytes)
        try:
            result = self._decode(tensor, entry, base)
            if result.nbytes != tensor.bytes:
                raise ValueError(f"{result.nbytes:,} bytes instead of {tensor.bytes:,}")
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise UserError(
                f"delta {self._delta}: {tensor.name} cannot be restored ({error}). Export the delta again."
            ) from error
        if entry.sha256 is not None and sha256(result) != entry.sha256:
            raise UserError(
                f"delta {self._delta}: {tensor.name} does not come out as it was exported, though base and delta are "
                "unchanged. Apply it with the versions that it names in misa_delta.json."
            )
        return result

    def _decode(self, tensor: StoredTensor, entry: TensorEntry, base: np.ndarray | None) -> np.ndarray:
        if entry.form == "whole":
            return self._part(entry, tensor.name).numpy()
        if not entry.from_base or base is None:
            base = np.zeros(tensor.bytes, np.uint8)
        if entry.form == "same":
            return base
        if entry.form == "difference":
            stored = self._part(entry, tensor.name).numpy()
            return codec.decode_difference(base, stored, entry.chunks, tensor.width)
        product: dict[str, Tensor] = {
            name: self._part(entry, part_name(tensor.name, name)) for name in ("left", "right")
        }
        return codec.decode_low_rank(base, product, tensor.dtype)

    def _part(self, entry: TensorEntry, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._delta / str(entry.file), framework="pt") as file:
            return file.get_tensor(name).to(torch.device("cpu"))

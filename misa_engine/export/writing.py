"""``export_delta``: what a model changed against its base, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misa_engine.errors import UserError
from misa_engine.export import codec
from misa_engine.export.document import CARRIED, Document, TensorEntry, check_form, part_name
from misa_engine.export.errors import ErrorSum
from misa_engine.export.place import appearing, check_free
from misa_engine.export.stored import StoredModel, StoredTensor, sha256
from misa_engine.trainer.manifest import write_manifest

#: Bytes of a delta's file: held in memory until it is written.
SHARD_BYTES = 1 << 29
#: The model's small files that travel with the delta. Weights, checkpoints, logs and pictures of the run do not.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "ORIGIN",
)


def export_delta(
    model: Path,
    base: Path,
    output: Path,
    *,
    form: str = "exact",
    rank: int | None = None,
    density: float | None = None,
    base_name: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Document:
    """Write what ``model`` changed against ``base``.

    Args:
        model: directory of the trained model, in safetensors.
        base: directory of the model that it was trained from, in safetensors.
        output: gets the delta; empty or not there yet.
        form: exact, sparse or low_rank.
        rank: of low_rank (default 64).
        density: of sparse: the share of a tensor's numbers that is kept (default 0.1).
        base_name: how the base is called in the delta; the directory's name unless given.
        progress: is told bytes done and bytes in all.

    Returns:
        What was stored how, with the errors of a lossy form.

    Raises:
        UserError: a directory holds no safetensors model, the two have no tensor in common, ``output`` is in use, or an
            option is out of range.
    """
    options = check_form(form, rank, density)
    check_free(output)
    if model.resolve() == base.resolve():
        raise UserError(f"{model} is named as the model and as its base: there is nothing to export.")
    trained, start = StoredModel(model), StoredModel(base)
    common = [name for name in trained.tensors if name in start.tensors]
    if not common:
        theirs, ours = next(iter(start.tensors)), next(iter(trained.tensors))
        raise UserError(f"{base} has no tensor in common with {model} ({theirs}, {ours}, ...): it is another model.")
    with appearing(output) as staged:
        writer = _Writer(staged, start, form, options)
        for tensor in trained:
            writer.add(tensor)
            progress(writer.done, trained.bytes)
        writer.flush()
        carried = _carry(model, staged / CARRIED)
        document = Document(
            form=form,
            options=options,
            base_name=base_name or base.name,
            base=writer.base,
            files=[(file.name, file.header) for file in trained.files],
            carried=carried,
            tensors=writer.tensors,
            total=writer.total(trained),
            versions={name: metadata.version(name) for name in ("misa_engine", "torch", "safetensors")},
        )
        document.write(staged)
        write_manifest(staged, 0)
    return document


class _Writer:
    """Stores one tensor after the other and fills files of ``SHARD_BYTES``."""

    def __init__(self, folder: Path, start: StoredModel, form: str, options: dict[str, float]):
        self.tensors: dict[str, TensorEntry] = {}
        self.base: dict[str, dict[str, Any]] = {}
        self.done = 0
        self._folder, self._start, self._form, self._options = folder, start, form, options
        self._errors = ErrorSum()
        self._waiting: dict[str, Tensor] = {}
        self._files = 1

    def add(self, tensor: StoredTensor) -> None:
        result = tensor.read()
        entry = TensorEntry("whole", False, sha256(result))
        base = self._base_of(tensor)
        entry.from_base = base is not None
        parts = self._encode(tensor, base, result, entry)
        if entry.form != "same":
            entry.file = f"delta-{self._files:05}.safetensors"
            for part, data in parts.items():
                name = part_name(tensor.name, part)
                self._waiting[name] = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
                entry.bytes += data.nbytes
        self.tensors[tensor.name] = entry
        self.done += tensor.bytes
        if sum(data.nbytes for data in self._waiting.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        from safetensors.torch import save_file

        if self._waiting:
            save_file(self._waiting, self._folder / f"delta-{self._files:05}.safetensors")
            self._waiting = {}
            self._files += 1

    def total(self, trained: StoredModel) -> dict[str, Any]:
        """Over all tensors."""
        entries = self.tensors.values()
        count = {
            "tensors": len(entries),
            "changed": sum(entry.form != "same" or entry.error is not None for entry in entries),
        }
        count |= {"model_bytes": trained.bytes, "stored_bytes": sum(entry.bytes for entry in entries)}
        if self._form == "exact":
            return count
        return {**count, "error": self._errors.of_change, "error_of_weights": self._errors.of_weights}

    def _base_of(self, tensor: StoredTensor) -> np.ndarray | None:
        """The base's bytes as a start for ``tensor``; None where they are none."""
        found = self._start.tensors.get(tensor.name)
        if found is None or found.shape[1:] != tensor.shape[1:] or len(found.shape) != len(tensor.shape):
            return None
        if found.dtype != tensor.dtype and not {found.dtype, tensor.dtype} <= set(codec.TORCH):
            return None
        stored = found.read()
        self.base[tensor.name] = {"dtype": found.dtype, "shape": list(found.shape), "sha256": sha256(stored)}
        return codec.fitted(stored, found.dtype, tensor.dtype, tensor.bytes)

    def _encode(
        self, tensor: StoredTensor, start: np.ndarray | None, result: np.ndarray, entry: TensorEntry
    ) -> dict[str, Any]:
        """Choose the form of one tensor, fill its entry, return what is stored by name."""
        lossy = start is not None and tensor.dtype in codec.TORCH and len(tensor.shape) > 1
        base = np.zeros_like(result) if start is None else start
        if start is not None and np.array_equal(base, result):
            entry.form = "same"
            self._measure(tensor, base, result, result, entry)
            return {}
        wanted = result
        if lossy and self._form == "sparse":
            wanted = codec.thinned(base, result, tensor.dtype, self._options["density"])
            entry.sha256 = sha256(wanted)
        difference = codec.encode_difference(base, wanted, tensor.width)
        if lossy and self._form == "low_rank":
            exact_bytes = tensor.bytes if difference is None else difference[0].nbytes
            product = codec.encode_low_rank(base, result, tensor.dtype, tensor.shape, int(self._options["rank"]))
            if product is not None and sum(part.nbytes for part in product[0].values()) < exact_bytes:
                errors = _errors(tensor.dtype, base, result, product[1])
                if errors.of_change >= 1:  # rounding ate it: the base itself, which misses what moved, is as near
                    entry.form, entry.sha256 = "same", sha256(base)
                    self._measure(tensor, base, result, base, entry, replace(errors, missed=errors.moved))
                    return {}
                entry.form, entry.sha256 = "low_rank", None
                self._measure(tensor, base, result, product[1], entry, errors)
                return dict(product[0])
        self._measure(tensor, base, result, wanted, entry)
        if difference is None:
            entry.from_base = False
            return {"": wanted}
        entry.form, entry.chunks = "difference", difference[1]
        return {"": difference[0]}

    def _measure(
        self,
        tensor: StoredTensor,
        base: np.ndarray,
        result: np.ndarray,
        decoded: np.ndarray,
        entry: TensorEntry,
        errors: ErrorSum | None = None,
    ) -> None:
        """Count the error of a lossy form, known or not; note it where the bits are not the result's."""
        if self._form == "exact" or tensor.dtype not in codec.TORCH:
            return
        exact = decoded is result or np.array_equal(decoded, result)
        if errors is None:
            errors = _errors(tensor.dtype, base, result, decoded, lossy=not exact)
        self._errors.add(errors)
        if not exact:
            entry.error, entry.error_of_weights = errors.of_change, errors.of_weights


def _errors(dtype: str, base: np.ndarray, result: np.ndarray, restored: np.ndarray, *, lossy: bool = True) -> ErrorSum:
    return ErrorSum.of(*(codec.as_tensor(data, dtype) for data in (base, result, restored)), lossy=lossy)


def _carry(model: Path, folder: Path) -> list[str]:
    """Copy the model's small files; return their names."""
    found = sorted({path for pattern in SMALL_FILES for path in model.glob(pattern) if path.is_file()})
    extra = model / "additional_chat_templates"
    found += sorted(extra.glob("*.jinja")) if extra.is_dir() else []
    for path in found:
        place = folder / path.relative_to(model)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return [path.relative_to(model).as_posix() for path in found]

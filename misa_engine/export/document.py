"""``misa_delta.json``: what a delta holds, how each tensor was stored, and the checksums of base and result.

    {"version": 1, "form": "exact", "base": {"name": "...", "tensors": {"model...weight": {"dtype": "BF16",
     "shape": [64, 64], "sha256": "..."}}}, "files": [{"name": "model.safetensors", "header": "{...}"}],
     "carried": ["config.json", ...], "tensors": {"model...weight": {"form": "difference", ...}}, "total": {...}}

The header of each of the model's files is kept as it was, so that the restored file is the same byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from misa_engine.errors import UserError, did_you_mean
from misa_engine.export.stored import ModelFile, StoredTensor, parse_header
from misa_engine.files import write_whole

DOCUMENT = "misa_delta.json"
#: Where a delta keeps the model's small files, so that nothing takes the delta itself for a model.
CARRIED = "files"
FORMS = ("exact", "sparse", "low_rank")
#: How a single tensor may be stored.
KINDS = ("same", "difference", "whole", "low_rank")
#: Headers of a model of a thousand shards have some 10 MB; more than this is no document of ours.
_MOST_BYTES = 1 << 28


@dataclass
class TensorEntry:
    """How one tensor of the model is stored."""

    form: str
    """One of ``KINDS``; same, with an error, where a low rank is farther off than the base."""
    from_base: bool
    """Whether the base's tensor of that name is where it starts, instead of zeros."""
    sha256: str | None
    """Of the restored bytes; None for low_rank, whose last bit depends on the machine."""
    file: str | None = None
    """That holds its parts, by ``part_name``."""
    bytes: int = 0
    """Stored in this delta."""
    chunks: list[int] = field(default_factory=list)
    """Lengths of the compressed chunks of a difference."""
    error: float | None = None
    """‖restored − result‖ / ‖result − base‖ of a lossy form; None where the bits are the result's."""
    error_of_weights: float | None = None
    """‖restored − result‖ / ‖result‖."""


@dataclass
class Document:
    """Everything that ``misa_delta.json`` says."""

    form: str
    options: dict[str, float]
    """``rank`` of low_rank, ``density`` of sparse."""
    base_name: str
    base: dict[str, dict[str, Any]]
    """Each tensor of the base that the model has as well: dtype, shape, sha256 of its bytes."""
    files: list[tuple[str, str]]
    """Name and header of each of the model's safetensors files."""
    carried: list[str]
    """The model's small files, below ``files/``."""
    tensors: dict[str, TensorEntry]
    total: dict[str, Any]
    """Counts, bytes and errors over all tensors."""
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Into ``folder / DOCUMENT``."""
        shape = {
            "version": 1,
            "form": self.form,
            "options": self.options,
            "base": {"name": self.base_name, "tensors": self.base},
            "files": [{"name": name, "header": header} for name, header in self.files],
            "carried": self.carried,
            "tensors": {name: _short(entry) for name, entry in self.tensors.items()},
            "total": self.total,
            "versions": self.versions,
        }
        write_whole(folder / DOCUMENT, json.dumps(shape, indent=1, allow_nan=False) + "\n")

    def model_files(self) -> Iterator[ModelFile]:
        """The files to be written, tensors in the order of their bytes."""
        for name, header in self.files:
            yield ModelFile(name, header, parse_header(header, Path(name)))

    def layout(self) -> dict[str, StoredTensor]:
        """Every tensor of the model by its name: dtype, shape and size."""
        return {tensor.name: tensor for file in self.model_files() for tensor in file.tensors}


def part_name(tensor: str, part: str) -> str:
    """Under which a part of a tensor lies in a file of the delta: ``<tensor>``, or ``<tensor>:left`` and ``:right``."""
    return f"{tensor}:{part}" if part else tensor


def read_document(folder: Path) -> Document:
    """What is in ``folder``, with every name and number checked.

    Raises:
        UserError: it is no delta, or its document is damaged or of another version.
    """
    path = folder / DOCUMENT
    if not folder.is_dir():
        raise UserError(f"delta directory {folder} does not exist; looked in {Path.cwd()}.")
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"{folder} is no delta: {DOCUMENT} is missing. Found: {found}. misa export writes deltas.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != 1:
            raise UserError(f"{path} is of version {content['version']!r}, and this misa reads version 1: upgrade it.")
        document = Document(
            form=content["form"],
            options=dict(content["options"]),
            base_name=str(content["base"]["name"]),
            base=dict(content["base"]["tensors"]),
            files=[(_inside(entry["name"]), str(entry["header"])) for entry in content["files"]],
            carried=[_inside(name) for name in content["carried"]],
            tensors={name: TensorEntry(**entry) for name, entry in content["tensors"].items()},
            total=dict(content["total"]),
            versions=dict(content["versions"]),
        )
        _check(document)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}): restore the delta.") from error
    return document


def check_form(form: str, rank: int | None, density: float | None) -> dict[str, float]:
    """The options that the form takes, with their defaults.

    Raises:
        UserError: an unknown form, or an option of another one.
    """
    if form not in FORMS:
        raise UserError(f"--form {form!r}: known are {', '.join(FORMS)}.{did_you_mean(form, FORMS)}")
    if rank is not None and form != "low_rank":
        raise UserError(f"--rank belongs to --form low_rank; the form here is {form}.")
    if density is not None and form != "sparse":
        raise UserError(f"--density belongs to --form sparse; the form here is {form}.")
    if rank is not None and rank < 1:
        raise UserError(f"--rank must be at least 1; got {rank}")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density is the share of the numbers that is kept, above 0 and at most 1; got {density:g}")
    if form == "low_rank":
        return {"rank": 64 if rank is None else rank}
    return {"density": 0.1 if density is None else density} if form == "sparse" else {}


def _check(document: Document) -> None:
    if document.form not in FORMS:
        raise ValueError(f"form {document.form!r}")
    layout = document.layout()
    if set(layout) != set(document.tensors):
        raise ValueError("the headers name other tensors than the entries")
    for name, entry in document.tensors.items():
        if entry.form not in KINDS or (entry.file is None) != (entry.form == "same"):
            raise ValueError(f"the entry of {name}")
        if entry.from_base and name not in document.base:
            raise ValueError(f"{name} starts at a tensor of the base that is not described")
        if not entry.from_base and entry.form not in ("whole", "difference"):
            raise ValueError(f"{name} starts at nothing")
        if entry.file is not None:
            _inside(entry.file)


def _inside(name: Any) -> str:
    path = Path(str(name))
    if not isinstance(name, str) or not name or path.is_absolute() or ".." in path.parts or name != path.as_posix():
        raise ValueError(f"the name {name!r} leaves the directory")
    return name


def _short(entry: TensorEntry) -> dict[str, Any]:
    """Without what says nothing."""
    always = ("form", "from_base", "sha256")
    return {key: value for key, value in asdict(entry).items() if key in always or value not in (None, [], 0)}

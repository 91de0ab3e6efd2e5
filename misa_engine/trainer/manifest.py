"""What a checkpoint consists of, written beside it last: size and checksum of every file, so that it can prove itself.

    {"version": 1, "step": 60, "files": {"model.safetensors": {"bytes": 1234, "sha256": "ab12..."}, ...}}

Sizes are compared whenever checkpoints are listed (a few ``stat`` calls), checksums once, before one is resumed from:
1 to 2 GB/s for each core, so some ten seconds for the 16 GB of an 8B model.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "misa_manifest.json"
_CHUNK = 1 << 22
#: A checkpoint of a run has some twenty files; more than this is no manifest of ours.
_MOST_BYTES = 1 << 24


def write_manifest(folder: Path, step: int) -> Path:
    """List every file below ``folder``; the manifest appears whole, after everything that it lists is on the disk.

    Args:
        folder: a checkpoint, complete and flushed.
        step: optimizer steps made when it was taken.

    Returns:
        The manifest's path.
    """
    files = _files(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        sums = list(pool.map(file_digest, files))
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, sums, strict=True)
    }
    temporary = folder / f"{MANIFEST}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump({"version": 1, "step": step, "files": entries}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / MANIFEST)
    return folder / MANIFEST


def has_manifest(folder: Path) -> bool:
    """Whether a checkpoint lists its files; those of older versions and of a plain Trainer do not."""
    return (folder / MANIFEST).is_file()


def why_not_listed(folder: Path) -> str | None:
    """What of the manifest is missing or has another size, or None. Reads no file but the manifest."""
    return _problem(folder, sums=False)


def why_damaged(folder: Path) -> str | None:
    """The first file that is missing or not what the manifest says, byte for byte; None when all are, or without one.

    Reads every file once.
    """
    return _problem(folder, sums=True)


def _problem(folder: Path, *, sums: bool) -> str | None:
    if not has_manifest(folder):
        return None
    try:
        entries = _read(folder / MANIFEST)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{name} is damaged: {size:,} bytes instead of {entry['bytes']:,}"
    if sums:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(file_digest, [folder / name for name in entries]))
        for (name, entry), digest in zip(entries.items(), found, strict=True):
            if digest != entry["sha256"]:
                return f"{name} is damaged: its checksum is not the one it was saved with"
    return None


def _read(manifest: Path) -> dict[str, dict[str, Any]]:
    if manifest.stat().st_size > _MOST_BYTES:
        raise ValueError("too large")
    entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    if not entries:
        raise ValueError("lists no files")
    for name, entry in entries.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name} lies outside")
        int(entry["bytes"]), str(entry["sha256"])
    return dict(entries)


def _files(folder: Path) -> list[Path]:
    own = {MANIFEST, f"{MANIFEST}.tmp"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in own)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

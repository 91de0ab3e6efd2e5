"""Files that are there whole or not at all, and their checksums: what every layer above the engine needs of a disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK = 1 << 22


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces: 1 to 2 GB/s."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

"""What every layer above the engine needs of a disk: files that appear whole, a place for a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from misa_engine.errors import UserError

#: End of the name of a file that is being written.
PART = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to that becomes ``path`` at the end: whole or not at all, also where two processes write it.

    The folder of ``path`` is made if need be; what was written before an error is taken away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all; its folder is made if need be."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_place(directory: Path, option: str = "--output_dir") -> None:
    """Refuse a place where no directory can be made or written. Looks only.

    Args:
        directory: to be made, or there already.
        option: that the user named it with.

    Raises:
        UserError: it is a file, a link to nothing, or not ours to write.
    """
    existing = directory
    while not existing.exists():
        if existing.is_symlink():
            raise UserError(f"{option} {directory}: {existing} is a link to {os.readlink(existing)}, which is gone.")
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{option} {directory}: {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option} {directory}: no permission to write in {existing}.")

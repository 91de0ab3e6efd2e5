"""One run in one directory: a lock that lives as long as the process, and dies with it however it ends."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from misa_engine.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks of this kind; two runs in one directory are not told apart there
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".misa_lock"
#: Directories that this process has locked already: a trainer inside ``misa train`` asks again.
_held: set[Path] = set()


@contextmanager
def lock_run(directory: Path) -> Iterator[None]:
    """Hold the directory of a run; a lock file whose process is dead holds nothing and is taken over.

    The directory is made if it is not there, and removed again if it is empty when the block ends.

    Args:
        directory: the run's output directory.

    Raises:
        UserError: a running process holds it; the message names the process. Nothing has been touched.
    """
    key = directory.resolve()
    if fcntl is None or key in _held:
        yield
        return
    made = _make(directory)
    descriptor = _acquire(directory / LOCK_NAME, directory)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if descriptor is not None:
            (directory / LOCK_NAME).unlink(missing_ok=True)  # while it is still ours
            os.close(descriptor)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _make(directory: Path) -> list[Path]:
    """Make the directory; return what was made, deepest first."""
    missing = []
    place = directory
    while not place.exists():
        missing.append(place)
        place = place.parent
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(path: Path, directory: Path) -> int | None:
    """The descriptor that holds the lock; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(path)
            os.close(descriptor)
            raise UserError(
                f"--output_dir {directory} is in use by another run ({holder}). Choose another directory, or end that "
                "run first."
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return None
            raise
        try:
            current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            current = False
        if current:  # otherwise the run before us removed the file between our open and our lock
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
            return descriptor
        os.close(descriptor)


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']}, since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "its process is unknown"

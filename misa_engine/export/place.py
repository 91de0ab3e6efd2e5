"""A directory that appears under its name when it is whole, and never over something that is there."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from misa_engine.errors import UserError
from misa_engine.files import check_place
from misa_engine.trainer.checkpoints import flush_tree


def check_free(directory: Path) -> None:
    """Refuse a directory that holds something, or that cannot be made.

    Raises:
        UserError: saying which.
    """
    if directory.is_symlink() and not directory.exists():
        raise UserError(f"--output {directory} is a link to {os.readlink(directory)}, which is gone.")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output {directory} is a file; name a directory that is empty or not there yet.")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--output {directory} is not empty, and nothing is overwritten: choose another directory.")
    check_place(directory, "--output")


def check_space(directory: Path, needed: int) -> None:
    """Raise UserError where the disk has less than ``needed`` bytes left."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"--output {directory} needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free there: free some "
            "space or choose another disk."
        )


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A hidden folder beside ``directory`` to write to; it gets that name when the block ends well, or is removed.

    A kill leaves the hidden folder, which the next call with the same name removes.

    Raises:
        UserError: something else took the name meanwhile.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(directory)
    staged = directory.with_name(f".{directory.name}.unfinished-{_host()}-{os.getpid()}")
    staged.mkdir()
    try:
        yield staged
        flush_tree(staged)
        try:
            if directory.is_dir():
                directory.rmdir()  # empty, or this fails
            os.rename(staged, directory)
        except OSError as error:
            raise UserError(f"--output {directory} was taken while it was being written ({error.strerror}).") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^\w]", "_", socket.gethostname()) or "host"


def _remove_left(directory: Path) -> None:
    """Folders of processes of this machine that are gone."""
    prefix = f".{directory.name}.unfinished-{_host()}-"
    for left in directory.parent.iterdir():
        number = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)

"""Checkpoints that are complete or absent, whatever kills the run while one is being written, and that prove it.

A checkpoint is written to ``OUT/_unfinished/checkpoint-N``, flushed to the disk, listed in its manifest
(``manifest.py``), and only then renamed to ``OUT/checkpoint-N``; older ones are removed after that. So a name
``checkpoint-N`` always stands for a whole checkpoint, and at every instant the last good one exists. (Folders that
start with an underscore are also what the Trainer leaves out of uploads to the Hub.) What is read back, and how it is
judged, is in ``completeness.py``.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from misa_engine.trainer.completeness import (
    SAFE_INDEX,
    checkpoint_step,
    find_last_complete_checkpoint,
    list_checkpoints,
)
from misa_engine.trainer.manifest import has_manifest, why_damaged, write_manifest

if TYPE_CHECKING:
    from torch import nn

STAGING = "_unfinished"
#: Checkpoints of a branch of the run that was left by resuming from an earlier one: ``abandoned-1``, ``abandoned-2``.
ABANDONED = "abandoned"
#: safetensors copies all tensors of a file to the host before it writes the first byte: 16 GB for an 8B model under
#: transformers' limit of 50 GB a file. The largest single tensor, a vocabulary of 256,000 x 3,584 in bf16, has 1.8 GB.
SHARD_BYTES = 2 * 10**9

_WEIGHT_FILE = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
#: A full disk reaches us as OSError from Python's own writes, but only as text from torch's and safetensors' writers.
_WRITE_FAILURE = re.compile(
    r"no space left|disk quota|file too large|input/output error|os error \d+|PytorchStreamWriter failed|"
    r"file write failed|unexpected pos \d+ vs|iostream error",  # the last from torch.save into a file stream
    re.IGNORECASE,
)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint or model could not be written. The message names the last checkpoint that is good."""


# ---- writing ----


@contextmanager
def staging(final: Path, run_dir: Path, *, writer: bool = True) -> Iterator[Path]:
    """Give a folder to write to before ``publish`` or ``install_files``; it is gone when the block ends or fails.

    Args:
        final: what is being written; the folder is ``_unfinished/<name>`` beside it.
        run_dir: where the run's checkpoints are, to name the last good one when writing fails.
        writer: whether this process (rank 0) makes and removes the folder; the others only get its name.

    Raises:
        CheckpointError: something in the block failed to write.
    """
    staged = final.parent / STAGING / final.name
    try:
        if writer:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        yield staged
    except Exception as error:
        if is_write_failure(error):
            _tidy(staged, writer)  # before the free space is read for the message
            raise write_error(final, run_dir, error) from error
        raise
    finally:
        _tidy(staged, writer)


@contextmanager
def sharded_saving(model: nn.Module) -> Iterator[None]:
    """Let ``model.save_pretrained`` write files of at most ``SHARD_BYTES``, whoever calls it inside the block."""
    save = getattr(model, "save_pretrained", None)
    if save is None:
        yield
        return
    vars(model)["save_pretrained"] = functools.partial(save, max_shard_size=SHARD_BYTES)  # the Trainer passes no size
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


def publish(staged: Path, final: Path) -> None:
    """Flush everything below ``staged``, list it in a manifest and rename it to ``final``, replacing what is there."""
    flush_tree(staged)
    write_manifest(staged, checkpoint_step(final))
    _flush(staged)
    aside = staged.with_name(f"replaced-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)  # a kill between these two renames is repaired by recover()
    os.replace(staged, final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def install_files(staged: Path, target: Path) -> None:
    """Move a saved model's files into ``target``, which may hold checkpoints, logs and an older model.

    Each file appears whole. The index of a sharded model goes away first and comes back last, so that an interrupted
    replacement is seen as a missing model and not read as a mixture of two.
    """
    target.mkdir(parents=True, exist_ok=True)
    flush_tree(staged)
    new = sorted(path.relative_to(staged) for path in staged.rglob("*") if path.is_file())
    names = {str(path) for path in new}
    (target / SAFE_INDEX).unlink(missing_ok=True)
    for path in sorted(new, key=lambda path: path.name == SAFE_INDEX):
        (target / path.parent).mkdir(parents=True, exist_ok=True)
        os.replace(staged / path, target / path)
    if any(_WEIGHT_FILE.match(name) for name in names):
        for old in target.iterdir():  # shards of a model that had another number of them
            if _WEIGHT_FILE.match(old.name) and old.name not in names:
                old.unlink()
    _flush(target)


def rotate(run_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the oldest checkpoints until at most ``limit`` are left, never one of ``keep``."""
    if limit is None or limit <= 0:
        return
    kept = {path.resolve() for path in keep}
    checkpoints = list_checkpoints(run_dir)
    surplus = len(checkpoints) - max(limit, len(kept))
    for checkpoint in [path for path in checkpoints if path.resolve() not in kept][: max(surplus, 0)]:
        doomed = run_dir / STAGING / f"removed-{checkpoint.name}"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint, doomed)  # so that a kill leaves no half-deleted checkpoint under its name
        shutil.rmtree(doomed, ignore_errors=True)
    _remove_if_empty(run_dir / STAGING)


def recover(run_dir: Path) -> list[Path]:
    """Tidy up after a killed run: finish or undo the replacement of a checkpoint, remove what was never finished.

    Returns:
        Checkpoints that exist only because of this call.
    """
    staging = run_dir / STAGING
    if not staging.is_dir():
        return []
    restored = []
    for staged in staging.glob("checkpoint-*"):  # killed just before the rename: whole, and says so
        final = run_dir / staged.name
        if has_manifest(staged) and not final.exists() and why_damaged(staged) is None:
            os.replace(staged, final)
            restored.append(final)
    for aside in staging.glob("replaced-checkpoint-*"):
        final = run_dir / aside.name.removeprefix("replaced-")
        if not final.exists():
            os.replace(aside, final)
            restored.append(final)
    _flush(run_dir)
    shutil.rmtree(staging, ignore_errors=True)
    return restored


def set_aside_after(run_dir: Path, step: int) -> Path | None:
    """Move the checkpoints of later steps into ``abandoned-<n>``: the run goes on from ``step`` on another branch.

    They are kept for the user, but no later ``--resume_from_checkpoint true`` can jump to them.

    Returns:
        The folder they are in now; None when there were none.
    """
    later = [path for path in list_checkpoints(run_dir) if checkpoint_step(path) > step]
    if not later:
        return None
    number = 1
    while (run_dir / f"{ABANDONED}-{number}").exists():
        number += 1
    folder = run_dir / f"{ABANDONED}-{number}"
    folder.mkdir()
    for checkpoint in reversed(later):  # the latest first: a kill in between leaves no newer one behind an older gap
        os.replace(checkpoint, folder / checkpoint.name)
    _flush(folder)
    _flush(run_dir)
    return folder


def flush_tree(folder: Path) -> None:
    """``fsync`` every file and folder below ``folder``: after this, a power cut cannot take them."""
    for root, _, files in os.walk(folder):
        for name in files:
            _flush(Path(root) / name)
        _flush(Path(root))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tidy(staged: Path, writer: bool) -> None:
    if writer:
        shutil.rmtree(staged, ignore_errors=True)
        _remove_if_empty(staged.parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# ---- failures ----


def is_write_failure(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a file could not be written."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            return True
        if isinstance(error, Exception) and _WRITE_FAILURE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_error(final: Path, run_dir: Path, error: BaseException) -> CheckpointError:
    """What to raise when ``final`` could not be written: why, what is still good, how to go on."""
    last = find_last_complete_checkpoint(run_dir)
    number = getattr(error, "errno", None)
    try:
        free = f"{shutil.disk_usage(run_dir).free / 2**30:.2f} GiB free there"
    except OSError:
        free = "free space unknown"
    remedy = "Free space or lower save_total_limit" if number is None or number in _FULL_DISK else "Repair this"
    good = (
        f"The last complete checkpoint is {last}: continue with --resume_from_checkpoint {last}."
        if last is not None
        else "There is no complete checkpoint yet: start the run again."
    )
    return CheckpointError(
        f"could not write {final} ({free}): {error}. What was unfinished has been removed. {remedy}. {good}"
    )

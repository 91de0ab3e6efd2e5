"""Checkpoints that are complete or absent, whatever kills the run while one is being written.

A checkpoint is written to ``OUT/_unfinished/checkpoint-N``, flushed to the disk, and only then renamed to
``OUT/checkpoint-N``; older ones are removed after that. So a name ``checkpoint-N`` always stands for a whole
checkpoint, and at every instant the last good one exists. (Folders that start with an underscore are also what the
Trainer leaves out of uploads to the Hub.)
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

STAGING = "_unfinished"
SAFE_WEIGHTS = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"

#: safetensors copies all tensors of a file to the host before it writes the first byte: 16 GB for an 8B model under
#: transformers' limit of 50 GB a file. The largest single tensor, a vocabulary of 256,000 x 3,584 in bf16, has 1.8 GB.
SHARD_BYTES = 2 * 10**9

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_WEIGHT_FILE = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
#: What transformers leaves in a folder that its just-in-time checkpoint has not finished.
_INCOMPLETE_MARK = "checkpoint-is-incomplete.txt"
#: A full disk reaches us as OSError from Python's own writes, but only as text from torch's and safetensors' writers.
_WRITE_FAILURE = re.compile(
    r"no space left|disk quota|file too large|input/output error|os error \d+|PytorchStreamWriter failed|"
    r"file write failed|unexpected pos \d+ vs",
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
    """Flush everything below ``staged`` to the disk and rename it to ``final``, replacing what is there."""
    flush_tree(staged)
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


def recover(run_dir: Path) -> None:
    """Tidy up after a killed run: restore a checkpoint that was being replaced, remove what was never finished."""
    staging = run_dir / STAGING
    if not staging.is_dir():
        return
    for aside in staging.glob("replaced-checkpoint-*"):
        final = run_dir / aside.name.removeprefix("replaced-")
        if not final.exists():
            os.replace(aside, final)
    shutil.rmtree(staging, ignore_errors=True)


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


# ---- reading ----


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders named ``checkpoint-N`` in ``run_dir``, ascending in N."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if _CHECKPOINT.match(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """N of ``checkpoint-N``; -1 for any other name."""
    match = _CHECKPOINT.match(checkpoint.name)
    return int(match.group(1)) if match else -1


def find_last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the highest step that is whole, or None. Reads names and headers only, changes nothing."""
    for checkpoint in reversed(list_checkpoints(Path(output_dir))):
        if why_incomplete(checkpoint) is None:
            return checkpoint
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint, or None when it is whole. Costs a few reads, not the weights."""
    if not checkpoint.is_dir():
        return "no such folder"
    if (checkpoint / _INCOMPLETE_MARK).exists():
        return f"it holds {_INCOMPLETE_MARK}"
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (ValueError, KeyError):
        return "trainer_state.json is damaged"
    for archive in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(archive):  # torch.save writes a zip file, whose directory stands at the end
            return f"{archive.name} is cut short"
    files = weight_files(checkpoint)
    if not files and not any(checkpoint.glob("*.bin")) and not any(checkpoint.glob("pytorch_model_fsdp*")):
        return "there are no weights"
    for file in files:
        try:
            read_header(file)
        except FileNotFoundError:
            return f"{file.name} is missing"
        except ValueError:
            return f"{file.name} is cut short"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in ``folder``: one, the shards that the index names, or none."""
    index = folder / SAFE_INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a safetensors file, from its header alone.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the header is damaged, or the file is not as long as it says.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(file)
    try:
        with safe_open(file, framework="pt") as stored:  # reads the header and compares it with the file's length
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the safetensors files of a checkpoint; empty where there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(checkpoint):
        shapes.update(read_header(file))
    return shapes

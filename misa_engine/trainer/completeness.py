"""Which checkpoints of a run are whole: by names, headers and sizes at once, by checksums before one is resumed."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from misa_engine.trainer.manifest import MANIFEST, has_manifest, why_damaged, why_not_listed

SAFE_WEIGHTS = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
#: What transformers leaves in a folder that its just-in-time checkpoint has not finished.
_INCOMPLETE_MARK = "checkpoint-is-incomplete.txt"


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


def find_resume_point(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole by checksums, and a line for each newer one that is not, newest first."""
    lines: list[str] = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        reason = why_incomplete(checkpoint) or why_damaged(checkpoint)
        if reason is None:
            return checkpoint, lines
        lines.append(f"{checkpoint.name} is passed over: {reason}")
    return None, lines


def why_incomplete(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint, or None when it is whole. Costs a few reads, not the weights."""
    if not checkpoint.is_dir():
        return "no such folder"
    if (checkpoint / _INCOMPLETE_MARK).exists():
        return f"it holds {_INCOMPLETE_MARK}"
    problem = _state_problem(checkpoint / STATE_NAME) or why_not_listed(checkpoint)
    if problem is None and not has_manifest(checkpoint):
        earlier = (path for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name)
        if any(has_manifest(path) and checkpoint_step(path) < checkpoint_step(checkpoint) for path in earlier):
            return f"{MANIFEST} is missing, which is written last"
        problem = _state_files_problem(checkpoint)
    return problem or _weights_problem(checkpoint)


def _state_problem(state: Path) -> str | None:
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{state.name} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{state.name} is damaged"
    return None if type(step) is int and step >= 0 else f"{state.name} is damaged: global_step is {step!r:.40}"


def _state_files_problem(checkpoint: Path) -> str | None:
    """Without a manifest: what the Trainer writes beside an optimizer's state must be there."""
    if (checkpoint / "optimizer.pt").is_file():
        for name in ("scheduler.pt", "rng_state.pth"):
            several = any(checkpoint.glob("rng_state_*.pth"))  # one for each process
            if not (checkpoint / name).is_file() and not (several and name == "rng_state.pth"):
                return f"{name} is missing"
    return None


def _weights_problem(checkpoint: Path) -> str | None:
    for archive in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(archive):  # torch.save writes a zip file, whose directory stands at the end
            return f"{archive.name} is cut short"
    try:
        files = weight_files(checkpoint)
    except ValueError as error:
        return str(error)
    if not files and not any(checkpoint.glob("pytorch_model*")):
        return f"{SAFE_WEIGHTS} is missing"
    for file in files:
        try:
            read_header(file)
        except FileNotFoundError:
            return f"{file.name} is missing"
        except ValueError:
            return f"{file.name} is cut short or damaged"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in ``folder``: one, the shards that the index names, or none.

    Raises:
        ValueError: the index is no index.
    """
    index = folder / SAFE_INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("it must name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is damaged ({type(error).__name__})") from error
    return [folder / name for name in sorted(names)]


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

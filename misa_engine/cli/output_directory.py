"""The output directory: whose it is, what of it a run may delete, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from misa_engine.cli.model_card import CARD, is_ours
from misa_engine.errors import UserError
from misa_engine.files import check_place
from misa_engine.report.log import LOG_NAME, RunLog
from misa_engine.trainer.checkpoints import ABANDONED, STAGING

#: What a run writes at the top of its directory. Anything else there belongs to the user and is left alone.
RUN_FILES = (
    LOG_NAME,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "importance_map.png",
    "loss.png",
    "visits.png",
)
CHECKPOINT = re.compile(r"checkpoint-\d+")
#: Any of these says that a run, or a model, is here.
SIGNS = (LOG_NAME, "config.json", "*.safetensors", "pytorch_model*.bin", "trainer_state.json")


def run_files(directory: Path) -> list[Path]:
    """What a run left in ``directory``: files by name, and checkpoint-N folders."""
    found = {path for pattern in RUN_FILES for path in directory.glob(pattern) if path.is_file()}
    found |= {path for path in directory.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()}
    found |= {card for card in [directory / CARD] if is_ours(card)}
    return sorted(found | {path for path in [directory / STAGING] if path.is_dir()})


def holds_run(directory: Path) -> bool:
    """Whether there is something that a new run would overwrite."""
    return any(any(directory.glob(pattern)) for pattern in SIGNS) or any(
        CHECKPOINT.fullmatch(path.name) for path in directory.glob("checkpoint-*")
    )


def has_only_begun(directory: Path) -> bool:
    """Whether a run was ended here before it saved anything: a log without an end, and nothing to go on from."""
    signs = {path.name for pattern in SIGNS for path in directory.glob(pattern)}
    kept = any(directory.glob("checkpoint-*")) or any(directory.glob(f"{ABANDONED}-*"))
    if signs != {LOG_NAME} or kept:
        return False
    try:
        return not any(entry["type"] == "end" for entry in RunLog.read(directory))
    except ValueError:
        return False


def check_output_directory(directory: Path, *, inputs: Iterable[str | None], overwrite: bool, resume: bool) -> None:
    """Refuse a directory that cannot be written, holds another run, or holds what this run reads.

    Args:
        directory: where the run will write; it need not exist.
        inputs: model, data and configuration of this run, as the user named them.
        overwrite: the user said --overwrite_output_dir.
        resume: the user said --resume_from_checkpoint.
    """
    check_place(directory)
    trained_here = any((directory / name).exists() for name in (LOG_NAME, "training_args.bin"))
    if directory.is_dir() and holds_run(directory) and overwrite and not (resume or trained_here):
        raise UserError(
            f"--overwrite_output_dir deletes runs, but {directory} holds a model without {LOG_NAME}, which misa train "
            "always writes: it is somebody else's. Choose another directory."
        )
    doomed = {path.resolve() for path in run_files(directory)} if directory.is_dir() else set()
    for name in inputs:
        source = Path(name).expanduser().resolve() if name else None
        if source is None or not source.exists():
            continue
        if source == directory.resolve() and not resume:
            raise UserError(f"--output_dir {directory} is also the input {name}: write the run somewhere else.")
        if overwrite and not resume and doomed & {source, *source.parents}:
            raise UserError(f"--overwrite_output_dir would delete {name}, which this run reads: copy it elsewhere.")
    if directory.is_dir() and holds_run(directory) and not (overwrite or resume or has_only_begun(directory)):
        shown = ", ".join(path.name for path in run_files(directory)[:5]) or "model files"
        raise UserError(
            f"--output_dir {directory} holds another run ({shown}). Choose another directory, continue that run with "
            "--resume_from_checkpoint, or delete it with --overwrite_output_dir."
        )


def delete_run(directory: Path) -> list[str]:
    """Delete what a run left, and say what. Everything else in the directory stays."""
    deleted = []
    for path in run_files(directory) if directory.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        deleted.append(path.name)
    return deleted

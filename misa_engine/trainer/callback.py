"""For a plain Trainer with MisaFactory: checkpoints that prove themselves, and the last good one to go on from.

    trainer = Trainer(..., optimizer_cls_and_kwargs=(MisaFactory, {...}), callbacks=[ManifestCallback()])
    trainer.train(resume_from_checkpoint=last_good_checkpoint("out"))

What a callback cannot do: the Trainer writes a checkpoint under its final name and removes older ones before any
callback runs. So a checkpoint without a manifest is one that was not finished; ``last_good_checkpoint`` passes it over.
Keep ``save_total_limit`` at 2 or more, or use MisaMixin, which writes aside and renames.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from misa_engine.trainer.checkpoints import flush_tree
from misa_engine.trainer.completeness import find_resume_point
from misa_engine.trainer.manifest import write_manifest


class ManifestCallback(TrainerCallback):
    """Flushes each checkpoint to the disk once the Trainer has written it, and lists its files with checksums."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer after it has written ``checkpoint-<step>``."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            flush_tree(folder)
            write_manifest(folder, state.global_step)
            flush_tree(folder)


def last_good_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint whose files are all there and unchanged, for ``train(resume_from_checkpoint=...)``.

    Args:
        output_dir: of the run. Reads every file of the newest checkpoint once; changes nothing.

    Returns:
        Its folder; None when there is none, with which ``train`` starts anew.
    """
    checkpoint, _ = find_resume_point(Path(output_dir))
    return None if checkpoint is None else str(checkpoint)

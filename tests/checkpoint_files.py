"""Small checkpoints for tests of what is done with their files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from misa_engine.trainer import completeness


def write_checkpoint(folder: Path, value: float = 1.0) -> Path:
    """A folder that looks like the Trainer's checkpoint of the step in its name, without a manifest."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.full((4, 8), value)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"value": value}, folder / name)
    step = completeness.checkpoint_step(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder

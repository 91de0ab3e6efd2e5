"""A place for tests of ``misa sweep``: stand-ins that are looked at often, and a configuration on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins end in a moment, so they are looked at more often, and no pictures are drawn."""
    from misa_engine.sweep import page, trial

    monkeypatch.setattr(trial, "EVERY", 0.02)
    monkeypatch.setattr(page, "_pictures", lambda document: {})


@pytest.fixture
def config(workplace: Path, tmp_path: Path) -> Path:
    values = {
        "model": str(workplace / "model"),
        "dataset": str(workplace / "data.jsonl"),
        "eval_fraction": 0.25,
        "delta": 0.2,
        "inner_steps": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "eval_steps": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"

"""What the tests of ``misa sweep`` share: a study's settings, and stand-ins for the runs of its trials."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from misa_engine.sweep.objective import Objective
from misa_engine.sweep.settings import Settings
from misa_engine.sweep.space import Dimension

LAUNCH = [sys.executable, "-S", "-E", str(Path(__file__).with_name("sweep_trainer.py"))]
RATE = Dimension("learning_rate", 1e-6, 1e-3, log=True)
ETA = Dimension("eta", choices=(0.1, 0.5, 1.0))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins end in a moment, so they are looked at more often, and no pictures are drawn."""
    from misa_engine.sweep import page, trial

    monkeypatch.setattr(trial, "EVERY", 0.02)
    monkeypatch.setattr(page, "_pictures", lambda document: {})


def settings(*space: Dimension, **options: Any) -> Settings:
    """Of a study whose trials are stand-ins."""
    base = {"model_name_or_path": "m", "dataset": ["d.jsonl"], "eval_fraction": 0.1, "learning_rate": 1e-4}
    values = {"objective": Objective(), "micro_batch": 8, "pruner": "none", **options}
    return Settings(base={**base, **values.pop("base", {})}, space=space or (RATE, ETA), **values)


def results(directory: Path) -> dict[str, Any]:
    """results.json."""
    return json.loads((directory / "results.json").read_text())


def states(directory: Path) -> list[str]:
    """How the trials ended."""
    return [row["state"] for row in results(directory)["trials"]]


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

"""Trainers on a tiny model for tests of training, resuming and saving: fixtures, and how logs are read.

PYTEST_DONT_REWRITE: imported by tests and loaded as a plugin, without assertions of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import ByT5Tokenizer, Trainer, TrainingArguments
from trl import SFTConfig

from misa_engine.report.log import RunLog
from misa_engine.trainer.mixin import MisaFactory
from misa_engine.trainer.sft import MisaTrainer
from models import TINY

MISA_OPTIONS: dict[str, Any] = {"delta": 0.2, "inner_steps": 4}
#: Metrics that measure the machine and not the training, and a counter that TRL does not save.
TIMES = ("time_s", "milliseconds", "runtime", "per_second", "memory", "step_time", "rss", "num_tokens")


@pytest.fixture(scope="module")
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@pytest.fixture(scope="module")
def texts() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (24, 20), generator=generator).tolist()
    return Dataset.from_dict({"text": ["".join(map(chr, row)) for row in letters]})


@pytest.fixture(scope="module")
def tokens(texts, tokenizer) -> Dataset:
    rows = [tokenizer(text)["input_ids"] for text in texts["text"]]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@pytest.fixture(scope="module")
def preferences(texts) -> Dataset:
    words = texts["text"]
    columns = {"prompt": words[:8], "chosen": words[8:16], "rejected": words[16:]}
    return Dataset.from_dict(columns)


def tiny(family: str = "llama", **options) -> nn.Module:
    return TINY[family](vocab_size=384, **options)


COMMON: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def sft_arguments(out: Path, **options) -> SFTConfig:
    plain = {"bf16": False, "gradient_checkpointing": False, "max_length": 32}
    return SFTConfig(str(out), **{**COMMON, **plain, **options})


@pytest.fixture
def misa_trainer(tmp_path, tokenizer, texts):
    """Builds a MisaTrainer in ``tmp_path / name``; keyword arguments are SFTConfig's and MisaTrainer's."""

    def build(name: str = "run", model: nn.Module | None = None, misa=None, **options) -> MisaTrainer:
        own = {key: options.pop(key) for key in ("optimizer", "eval_dataset", "callbacks") if key in options}
        return MisaTrainer(
            tiny() if model is None else model,
            args=sft_arguments(tmp_path / name, **options),
            train_dataset=texts,
            processing_class=tokenizer,
            misa=MISA_OPTIONS if misa is None else misa,
            **own,
        )

    return build


def plain_trainer(out: Path, data: Dataset, model: nn.Module | None = None, **options) -> Trainer:
    misa = {**MISA_OPTIONS, "lr": 1e-2, "seed": 42, **options.pop("misa", {})}
    return Trainer(
        tiny() if model is None else model,
        args=TrainingArguments(str(out), **{**COMMON, **options}),
        train_dataset=data,
        optimizer_cls_and_kwargs=(MisaFactory, misa),
    )


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    return RunLog.read(trainer.args.output_dir)


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]

"""``misa train`` in this process, on a tiny model with a byte tokenizer, for tests of what a run does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from models import TINY


def make_workplace(place: Path, cache: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Model, tokenizer and 24 records of 20 to 43 bytes below ``place``; data sets are cached in ``cache``."""
    import datasets
    from transformers import ByT5Tokenizer

    datasets.config.HF_DATASETS_CACHE = cache
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # of subprocesses
    model: Any = TINY["llama"](vocab_size=384, max_position_embeddings=128, **options).to(dtype)
    model.save_pretrained(place / "model")
    ByT5Tokenizer().save_pretrained(place / "model")
    letters = torch.randint(97, 123, (24, 43), generator=torch.Generator().manual_seed(0)).tolist()
    texts = ["".join(map(chr, row))[: 20 + index] for index, row in enumerate(letters)]
    lines = [json.dumps({"prompt": text[:8], "completion": text[8:]}) + "\n" for text in texts]
    (place / "data.jsonl").write_text("".join(lines))
    return place


def words(place: Path, out: Path, *more: str, **options: Any) -> list[str]:
    """The command line; keyword arguments replace options, None leaves one out."""
    values = {
        "model_name_or_path": place / "model",
        "dataset": place / "data.jsonl",
        "output_dir": out,
        "delta": 0.2,
        "inner_steps": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": "false",
        **options,
    }
    pairs = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return ["train", *pairs, *more]

"""A place for tests of ``misa train``: a tiny model, data in several shapes, and its command line as fixtures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import TINY

RECORDS = [
    {"instruction": f"Add {i} and 1.", "input": "Be brief." if i % 2 else "", "output": f"It is {i + 1}."}
    for i in range(24)
]


@pytest.fixture(scope="session")
def log_handlers_of_the_session() -> None:
    """Import these before any test captures stderr: their log handlers keep the stream that they find."""
    import transformers.utils.logging
    import trl  # noqa: F401

    transformers.utils.logging.get_logger("transformers")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, log_handlers_of_the_session: None) -> Path:
    """A tiny Llama with a byte tokenizer, data in several shapes, and a cache of its own."""
    import datasets
    from transformers import ByT5Tokenizer

    place, cache = tmp_path_factory.mktemp("cli"), tmp_path_factory.mktemp("cache")
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # of subprocesses
    model: Any = TINY["llama"](vocab_size=384, max_position_embeddings=128)
    model.save_pretrained(place / "model")
    ByT5Tokenizer().save_pretrained(place / "model")
    TINY["bert"]().save_pretrained(place / "encoder")
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (place / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (place / "template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    (place / "gone").symlink_to("/no/such/place")
    (place / "broken.jinja").write_text("{{ raise_exception('no hello') }}")
    (place / "book.txt").write_text("\n\n".join(f"Paragraph {i}: " + "words and more words. " * 40 for i in range(20)))
    return place


@pytest.fixture
def flags(workplace: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``misa train`` on the tiny model; keyword arguments replace options, None leaves one out."""

    def make(*more: str, **options: Any) -> list[str]:
        values = {
            "model_name_or_path": workplace / "model",
            "dataset": workplace / "data.jsonl",
            "output_dir": tmp_path / "out",
            "delta": 0.2,
            "inner_steps": 2,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "logging_steps": 1,
            "gradient_checkpointing": "false",
            **options,
        }
        pairs = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
        return ["train", *pairs, *more]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

"""A model that is evaluated: its label, what identifies its bytes, and how it is loaded when its turn comes."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misa_engine.errors import UserError
from misa_engine.trainer.manifest import file_digest

#: Files of a model directory on which its answers depend.
DECISIVE = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass
class Subject:
    """One model of an evaluation.

    Model and tokenizer are loaded when they are first asked for and let go by ``release``.
    """

    label: str
    """Its name in tables and below the output directory."""
    path: str
    """A directory, or an id on the Hub."""
    load_model: Callable[[], Any]
    """Makes the model on its device."""
    load_tokenizer: Callable[[], Any]
    digest: str = ""
    """Of the files; found from ``path`` when empty. Results are kept while it stays the same."""
    dtype: str = ""
    """Of the weights, where the caller chose it: results in two precisions are different results."""
    _model: Any = field(default=None, repr=False)
    _tokenizer: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The model, for inference."""
        if self._model is None:
            self._model = self.load_model().eval()
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.load_tokenizer()
        return self._tokenizer

    def identity(self) -> str:
        """The digest, made on first use."""
        self.digest = self.digest or model_digest(self.path)
        return self.digest

    def release(self) -> None:
        """Let the model go, so that the next one finds its memory."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def model_digest(path: str) -> str:
    """SHA-256 (16 hex digits) of the files on which a model's answers depend; of an id on the Hub, of its revision."""
    directory = Path(path).expanduser()
    found = hashlib.sha256()
    if not directory.is_dir():
        from transformers import AutoConfig

        revision = getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
        found.update(f"{path}@{revision}".encode())
        return found.hexdigest()[:16]
    files = {file for pattern in DECISIVE for file in directory.glob(pattern) if file.is_file()}
    for file in sorted(files):
        found.update(file.name.encode() + b"\0" + file_digest(file).encode())
    return found.hexdigest()[:16]


def labels(paths: Iterable[str]) -> list[str]:
    """The shortest ends of paths that tell them apart, joined by ``-``: ``misa-seed0`` of ``runs/misa/seed0``.

    Raises:
        UserError: the same path is named twice.
    """
    parts = []
    for path in paths:
        place = Path(path).expanduser()
        with suppress(OSError):
            place = place.resolve() if place.is_dir() else place
        parts.append([part for part in place.parts if part not in ("/", ".", "..")] or ["model"])
    for index, one in enumerate(parts):
        if one in parts[:index]:
            raise UserError(f"the model {'/'.join(one[-3:])} is named twice: name each once (the base apart).")
    made = []
    for one in parts:
        depth = 1
        while depth < len(one) and sum(other[-depth:] == one[-depth:] for other in parts) > 1:
            depth += 1
        made.append("-".join(one[-depth:]))
    return made

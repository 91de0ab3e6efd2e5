"""Text to tokens and back, for the learning suite's bases: bytes, or a model directory's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from misa_engine.bench.workload import SPECIAL


class Words(Protocol):
    """Text to tokens and back, and how a question is put to the model."""

    end: int
    """The token after an answer."""

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """Their text."""

    def prompt(self, question: str) -> list[int]:
        """Token ids up to where the answer begins."""


class Bytes:
    """The small bases' tokens: a byte plus 3."""

    end = 1

    def encode(self, text: str) -> list[int]:
        """A token for each byte."""
        return [byte + SPECIAL for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return bytes(number - SPECIAL for number in ids if SPECIAL <= number < 256 + SPECIAL).decode(errors="replace")

    def prompt(self, question: str) -> list[int]:
        """Plain text; the small base knows no chat."""
        return self.encode(f"Question: {question}\nAnswer: ")


class Tokenized:
    """A model's own tokenizer; how a question is put is its subclasses'.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Chat(Tokenized):
    """A model directory's tokenizer with its chat template.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        super().__init__(AutoTokenizer.from_pretrained(directory))

    def prompt(self, question: str) -> list[int]:
        """The question as the user's turn; no system turn, whose tokens would fill a short sequence."""
        turns = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        first = text.find("<|im_start|>user")
        return self.encode(text[max(0, first) :])

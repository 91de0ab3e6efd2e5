"""Forgetting: the loss a token on a fixed text after training, minus before (as peft's method comparison reports it).

The text is DATA/HuggingFaceFW/finewiki (100 rows, as peft takes), else DATA/forgetting.txt or .jsonl, else Python's own
reference (``pydoc_data.topics``), which every machine has. Base and models read the same text in one call, and its
digest stands in the result: two results compare only where it is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from misa_engine.errors import UserError
from misa_engine.evaluation import batch_size as sizes
from misa_engine.evaluation.results import Record
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.store import Progress
from misa_engine.evaluation.subjects import Subject
from misa_engine.evaluation.task import Outcome, Task, limited, read_data

#: Rows of a text, as peft takes.
ROWS = 100
#: Tokens of a row at most.
LENGTH = 512
#: Characters of a row at most: more than LENGTH tokens of any tokenizer's prose.
CHARACTERS = 4000
#: The metric.
LOSS = "loss"
PLACES = ("HuggingFaceFW/finewiki", "finewiki", "forgetting.jsonl", "forgetting.txt")


class ForgettingTask(Task):
    """``forgetting``: needs a base."""

    protocol: ClassVar[str] = "forgetting"

    def check(self, subjects: Sequence[Subject], settings: Settings) -> None:
        """The text can be read, and there is more than one model."""
        if len(subjects) < 2:
            raise UserError(f"{self.name} is the loss after training minus before: name the model before with --base.")
        rows(settings)

    def facts(self, settings: Settings) -> dict[str, Any]:
        """The text and its digest."""
        name, texts = rows(settings)
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return {"text": name, "text_sha256": digest, "rows": len(texts), "length": LENGTH}

    def run(self, subject: Subject, settings: Settings, progress: Progress) -> Outcome:
        """Mean loss of each row, weighted by its tokens."""
        _, texts = rows(settings)
        left = [place for place in range(len(texts)) if str(place) not in progress.done]
        if not left:
            return Outcome(batch_size=0)
        length = min(LENGTH, getattr(subject.model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)
        encoded = {place: list(subject.tokenizer(texts[place])["input_ids"])[:length] for place in left}
        progress.total = len(texts)
        order = sorted((place for place in left if len(encoded[place]) > 1), key=lambda place: -len(encoded[place]))
        if not order:
            return Outcome(batch_size=0)
        batch = settings.batch_size or sizes.batch_that_fits(subject.model, length=len(encoded[order[0]]))

        def measured(part: Sequence[int]) -> list[float]:
            return row_losses(subject.model, [encoded[place] for place in part])

        for size, part, losses in sizes.in_batches(order, batch, measured):
            batch = size
            for place, loss in zip(part, losses, strict=True):
                tokens = len(encoded[place]) - 1
                progress.add(Record(str(place), {LOSS: loss}, float(tokens), {"text": texts[place][:80]}))
        return Outcome(batch, {"length_taken": length})


@torch.no_grad()
def row_losses(model: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Mean loss a token of each sequence, in nats.

    Args:
        model: a causal language model.
        sequences: token ids, each at least 2; padded on the right, which causal attention does not see.
    """
    longest = max(map(len, sequences))
    device = model.device
    ids = torch.tensor([list(one) + [0] * (longest - len(one)) for one in sequences], device=device)
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in sequences], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    made = []
    for row, one in zip(logits, sequences, strict=True):  # one at a time: float32 of all would be twice the logits
        target = torch.tensor(list(one[1:]), device=device)
        made.append(float(torch.nn.functional.cross_entropy(row[: len(one) - 1].float(), target)))
    return made


def rows(settings: Settings) -> tuple[str, list[str]]:
    """Name of the text, and its rows.

    Raises:
        UserError: local data for it cannot be read.
    """
    if settings.data is not None:
        for name in PLACES:
            place = settings.data / name
            if place.exists():
                return name, limited(_local(place)[:ROWS], settings)
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    texts = [topics[name][:CHARACTERS] for name in sorted(topics) if len(topics[name]) > 1000]
    return "pydoc_data.topics", limited(texts[:ROWS], settings)


def _local(place: Path) -> list[str]:
    if place.suffix == ".txt":
        text = place.read_text(encoding="utf-8")
        texts = [text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS)]
    else:
        found = [place] if place.is_file() else sorted(place.rglob("*.jsonl")) + sorted(place.rglob("*.parquet"))
        if not found:
            raise UserError(f"{place} holds no .jsonl or .parquet file with rows of text.")
        texts = [str(record.get("text") or "")[:CHARACTERS] for record in read_data(found[0])[:ROWS]]
    if not any(texts):
        raise UserError(f"{place} holds no text: records need a column 'text'.")
    return [text for text in texts if text]

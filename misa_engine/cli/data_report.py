"""What becomes of the records on their way to the trainer: counted, shown, and nothing lost in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from misa_engine.errors import UserError

#: What TRL calls a data set -> what it is called here.
NAMES = {"train": "training", "eval": "evaluation"}
#: Upper ends of the histogram's bins, in tokens.
BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Tokens of the sample that is shown.
SHOWN = 200


@dataclass(frozen=True)
class DataReport:
    """Counts over one tokenized data set, before and after it is cut to ``max_length``."""

    name: str
    """training or evaluation."""
    records: int
    empty: int
    """Records with no token to predict at any length: an empty text or completion."""
    prompt_too_long: int
    """Records whose tokens to predict all lie beyond ``max_length``."""
    truncated: int
    """Records that are kept and lose their end (or their beginning, with truncation_mode keep_end)."""
    tokens: int
    """Tokens of the kept records within ``max_length``."""
    in_loss: int
    """Those of them that are predicted."""
    lengths: tuple[int, ...]
    """Records by bin of BINS and beyond, before cutting."""
    sample: str
    """One kept record, decoded, with the loss mask."""
    max_length: int | None

    def __str__(self) -> str:
        """Some lines of text."""
        kept = self.records - self.empty - self.prompt_too_long
        lines = [heading(self.name, f"{self.records:,} records", kept)]
        if self.empty:
            lines.append(f"  dropped: {self.empty:,} without a token to predict (empty text or completion)")
        if self.prompt_too_long:
            lines.append(
                f"  dropped: {self.prompt_too_long:,} whose tokens to predict all lie beyond max_length="
                f"{self.max_length} (the prompt alone fills it): raise --max_length, or shorten the prompts"
            )
        if self.truncated:
            lines.append(
                f"  truncated to max_length={self.max_length}: {self.truncated:,} ({self.truncated / kept:.0%})"
            )
        lines.append(f"  tokens a record: {length_bins(self.lengths)}")
        lines.append(f"  tokens in the loss: {self.in_loss:,} of {self.tokens:,} ({self.in_loss / self.tokens:.0%})")
        return "\n".join([*lines, f"  a record, [what is in the loss in brackets]: {self.sample}"])


def heading(name: str, records: str, kept: int) -> str:
    """The first line of a report: what came in, and how much of it is used for what."""
    return f"{name} data: {records} in, {kept:,} {'trained' if name == 'training' else 'evaluated'} on"


def histogram(lengths: list[int]) -> tuple[int, ...]:
    """How many of the lengths are in each bin of BINS, and beyond."""
    return tuple(np.bincount(np.searchsorted(BINS, lengths), minlength=len(BINS) + 1).tolist())


def length_bins(counts: tuple[int, ...]) -> str:
    """A histogram in words, without its empty bins."""
    edges = (0, *BINS)
    return "; ".join(
        f"{edges[bin] + 1}-{BINS[bin] if bin < len(BINS) else '...'}: {count:,}"
        for bin, count in enumerate(counts)
        if count
    )


def inspect(
    dataset: Any, name: str, max_length: int | None, tokenizer: Any, *, packing: bool, keep_end: bool = False
) -> tuple[DataReport, Any]:
    """Count, and drop what has nothing to learn from.

    Args:
        dataset: with ``input_ids`` and ``labels`` (-100: not predicted) of full length.
        name: training or evaluation.
        max_length: tokens at which records are cut; no record is cut with ``packing``.
        tokenizer: to decode one record.
        packing: whether records are joined.
        keep_end: which part of a long record is kept.

    Returns:
        The report, and the records with at least one predicted token.

    Raises:
        UserError: nothing is left to learn from.
    """
    cut = None if packing else max_length
    part = slice(None) if cut is None else slice(-cut, None) if keep_end else slice(None, cut)
    kept: list[int] = []
    empty = beyond = truncated = tokens = in_loss = place = 0
    lengths: list[int] = []
    for batch in dataset.select_columns(["labels"]).iter(1000):
        for row in batch["labels"]:
            labels = np.asarray(row)
            lengths.append(len(labels))
            predicted = int((labels[part][1:] != -100).sum())  # a first token is not predicted from anything
            if predicted:
                kept.append(place)
                tokens += len(labels[part])
                in_loss += predicted
                truncated += cut is not None and len(labels) > cut
            elif (labels[1:] != -100).any():
                beyond += 1
            else:
                empty += 1
            place += 1
    if not kept:
        raise UserError(
            f"no sample of the {name} data is left: with max_length={max_length}, of {place:,} records {empty:,} have "
            f"nothing to predict and {beyond:,} only beyond it (a prompt alone may fill it). Raise --max_length, "
            "shorten the prompts, or fill the empty texts."
        )
    first = dataset[kept[0]]
    sample = _marked(tokenizer, first["input_ids"][part], first["labels"][part])
    report = DataReport(name, place, empty, beyond, truncated, tokens, in_loss, histogram(lengths), sample, max_length)
    return report, dataset if len(kept) == place else dataset.select(kept)


def _marked(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """The text in one line, with brackets around what is predicted."""
    parts: list[tuple[bool, list[int]]] = []
    for token, label in list(zip(ids, labels, strict=True))[:SHOWN]:
        if not parts or parts[-1][0] != (label != -100):
            parts.append((label != -100, []))
        parts[-1][1].append(token)
    texts = [repr(tokenizer.decode(run))[1:-1] for _, run in parts]
    marked = "".join(f"[{text}]" if inside else text for (inside, _), text in zip(parts, texts, strict=True))
    return marked + (" ..." if len(ids) > SHOWN else "")

"""Where the experiments' data lies, the command that gets it, and rows of tokens from it.

Everything is read from files under one folder (``--data``), in the layout in which their publishers hand them out, so
that a run neither waits for a network nor changes with one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misa_engine.bench.tasks import answers, rows_digest
from misa_engine.bench.words import Tokenized
from misa_engine.bench.workload import batches
from misa_engine.errors import UserError


@dataclass(frozen=True)
class Source:
    """Data that an experiment trains on."""

    pattern: str
    """Of the training files, below the data folder."""
    get: str
    """The command that gets them; {data} is the folder."""
    records: int
    """As published; counts steps before anything is read."""
    held_out: str = ""
    """Of validation files; empty where rows of the training files are held out."""


_LLM_ADAPTERS = "git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters {data}/LLM-Adapters"
SOURCES: dict[str, Source] = {
    "math10k": Source("LLM-Adapters/ft-training_set/math_10k.json", _LLM_ADAPTERS, 9919),
    "commonsense170k": Source("LLM-Adapters/ft-training_set/commonsense_170k.json", _LLM_ADAPTERS, 170420),
    "alpaca": Source(
        "alpaca-gpt4/data/*.parquet",
        "hf download vicgalle/alpaca-gpt4 --repo-type dataset --local-dir {data}/alpaca-gpt4", 52002,
    ),
    "c4": Source(
        "c4/en/c4-train.*.json.gz",
        "hf download allenai/c4 --repo-type dataset --include 'en/c4-train.000[0-2]*' "
        "--include 'en/c4-validation.00000*' --local-dir {data}/c4", 0, "c4/en/c4-validation.*.json.gz",
    ),
}  # fmt: skip
MT_BENCH = Source(
    "mt_bench/question.jsonl",
    "curl -L --create-dirs -o {data}/mt_bench/question.jsonl https://raw.githubusercontent.com/lm-sys/FastChat/main/"
    "fastchat/llm_judge/data/mt_bench/question.jsonl", 80,
)  # fmt: skip


def files_of(source: Source, data: Path, what: str) -> list[Path]:
    """The training files.

    Raises:
        UserError: there are none; the message is the command that gets them.
    """
    for pattern in filter(None, (source.pattern, source.held_out)):
        if not list(data.glob(pattern)):
            raise UserError(
                f"{what} needs {data / pattern}, which is not there. Get it: {source.get.format(data=data)}"
            )
    return sorted(data.glob(source.pattern))


class PlainWords(Tokenized):
    """A tokenizer with LLM-Adapters' plain prompt, for bases that know no chat.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        first = tokenizer.bos_token_id
        self.begin: list[int] = [] if first is None else [int(first)]

    def prompt(self, question: str) -> list[int]:
        """The ids of a whole prompt; ``prompt_of`` has written it."""
        return self.begin + self.encode(question)


def prompt_of(record: dict[str, Any]) -> str:
    """A record's prompt: an instruction, its input where it has one, and where the response begins."""
    given = str(record.get("input") or "").strip()
    more = ", paired with an input that provides further context" if given else ""
    parts = [
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
        "request.",
        f"### Instruction:\n{record['instruction']}",
        *([f"### Input:\n{given}"] if given else []),
        "### Response:\n",
    ]
    return "\n\n".join(parts)


def records_of(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Records with ``instruction``, ``input`` and ``output``, of JSON lists or Parquet files.

    Raises:
        UserError: a file holds something else.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                from pyarrow import parquet

                rows = parquet.read_table(path).to_pylist()
            else:
                rows = json.loads(path.read_text(encoding="utf-8"))
            missing = {"instruction", "output"} - set(rows[0])
        except (ValueError, OSError, IndexError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no list of records: {error}. Get it again.") from error
        if missing:
            has = ", ".join(sorted(rows[0]))
            raise UserError(f"{path}: its records have no {' and no '.join(sorted(missing))}; they have {has}.")
        found += rows
    return found


@dataclass(frozen=True)
class Rows:
    """What a run trains on and what is held out; each row is (2, length), ids and labels."""

    train: Iterator[Tensor]
    """Endless micro-batches (batch, 2, length)."""
    held_out: Tensor
    """(m, 2, length), the same for every seed."""
    count: int
    """Rows to train on; 0 for a stream."""
    digest: str
    """Of the held-out rows."""


def load_rows(name: str, data: Path, words: PlainWords, *, batch: int, length: int, held_out: int, seed: int) -> Rows:
    """The rows of a source in a model's tokens.

    Raises:
        UserError: the data is not there or is something else.
    """
    source = SOURCES[name]
    paths = files_of(source, data, name)
    if source.held_out:
        test = first_rows(stream(sorted(data.glob(source.held_out)), words, length), held_out)
        return Rows(stacked(stream(paths, words, length), batch), test, 0, rows_digest(test))
    records = sorted(records_of(paths), key=lambda record: hashlib.sha256(repr(record).encode()).digest())
    pairs = [(prompt_of(record), str(record["output"])) for record in records]
    fitting = answers(pairs, words, length)
    test, rows = fitting[:held_out], fitting[held_out:]
    if not len(rows):
        raise UserError(
            f"{name}: {len(fitting)} records fit {length} tokens, and {held_out} are held out: none is left."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Rows(batches(rows[order], batch, torch.device("cpu")), test, len(rows), rows_digest(test))


def stream(paths: Iterable[Path], words: PlainWords, length: int) -> Iterator[Tensor]:
    """Rows (2, length) of documents one after the other, cut where a row is full; ends with the files."""
    held: list[int] = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                held += [*words.encode(json.loads(line)["text"]), words.end]
                while len(held) >= length:
                    ids = torch.tensor(held[:length])
                    held = held[length:]
                    yield torch.stack((ids, ids))


def stacked(rows: Iterator[Tensor], batch: int) -> Iterator[Tensor]:
    """Micro-batches of a stream.

    Raises:
        UserError: the stream ended; more files are needed.
    """
    count = 0
    while True:
        found = [row for _, row in zip(range(batch), rows, strict=False)]
        if len(found) < batch:
            raise UserError(
                f"the training files end after {count} micro-batches of {batch}: fetch more of them, "
                "with a wider --include pattern."
            )
        count += 1
        yield torch.stack(found)


def first_rows(rows: Iterator[Tensor], most: int) -> Tensor:
    """Up to ``most`` rows of a stream, (n, 2, length)."""
    return torch.stack([row for _, row in zip(range(most), rows, strict=False)])

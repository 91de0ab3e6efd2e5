"""From a file, a directory or a Hub id to the columns that TRL trains on.

``datasets`` reads, TRL tokenizes, packs and masks. This file finds the data and names the file and line that is wrong
before a run writes anything; ``misa_engine.cli.record_formats`` says what a record may look like.

Plain text is cut at blank lines into records of about TEXT_RECORD characters. ``text_only`` says so to the caller, who
then packs them with TRL's "wrapped" strategy unless the user chose: every token is used and sequences are full.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.record_formats import (
    CHAT_EXTRAS,
    FORMATS,
    LONGEST_RECORD,
    RecordFormat,
    check_dataset,
    check_records,
    needed_columns,
    recognise,
    record_problem,
)
from misa_engine.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".parquet", ".csv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)
#: Words in a file's path that say which split it belongs to, as on the Hub.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
#: Files (without ending) that lie beside data and are about it.
ABOUT = frozenset(("readme", "license", "licence", "changelog", "citation", "dataset_info", "dataset_infos", "state"))
#: About 2,000 tokens: long enough for the end-of-text token after each record to be rare, short enough to hold out 1%.
TEXT_RECORD = 8192


@dataclass(frozen=True)
class LoadedData:
    """A data set with exactly the columns that TRL needs."""

    dataset: Dataset | IterableDataset
    format: RecordFormat
    text_only: bool = False
    """From plain text files, which the caller packs unless the user says otherwise."""


def load_data(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    text_field: str = "text",
    streaming: bool = False,
) -> LoadedData:
    """Load and check one data set.

    Raises:
        UserError: nothing is there, or a record is broken; with the file, the line or record, what was found and
            what is needed.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"data file {source} does not exist (looked in {Path.cwd()}).")
        return _load_hub(source, split, config, text_field, streaming)
    if streaming:
        raise UserError(f"--dataset_streaming is for data sets of the Hub; {source} is on this machine already.")
    files = _data_files(path, split)
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"data file {file} cannot be read: permission denied.")
        if file.stat().st_size == 0:
            raise UserError(f"data file {file} is empty.")
    if files[0].suffix in TEXT_SUFFIXES:
        from datasets import Dataset

        texts = [record for file in files for record in text_records(_read_text(file))]
        if not texts:
            raise UserError(f"{source} holds nothing but white space.")
        return LoadedData(Dataset.from_dict({text_field: texts}), FORMATS[-1], text_only=True)
    dataset, format = _load_records(files, text_field)
    return LoadedData(_columns(dataset, format, text_field), format)


def _data_files(path: Path, split: str) -> list[Path]:
    """The file itself, or the files of one kind and one split below a directory, in order of their names."""
    if path.is_file():
        if split != "train":
            raise UserError(f"{path} is one file and has no split {split!r}; name the evaluation file itself.")
        if path.suffix not in SUFFIXES:
            raise UserError(f"data file {path} has no known ending: {', '.join(SUFFIXES)} are read.")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    data = [file for file in files if file.stem.lower() not in ABOUT]
    files = data or files  # what describes a data set is none of it, unless nothing else is there
    if not files:
        raise UserError(f"data directory {path} holds no file ending in {', '.join(SUFFIXES)}.")
    kinds = {"text" if file.suffix in TEXT_SUFFIXES else file.suffix.replace(".jsonl", ".json") for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"data directory {path} mixes kinds of files: {files[0].name}, "
            f"{next(file.name for file in files if file.suffix != files[0].suffix)}. Name one file, or sort them apart."
        )
    chosen = [file for file in files if _split_of(file.relative_to(path)) == split]
    if not chosen:
        raise UserError(
            f"data directory {path} holds nothing of split {split!r}; files: {', '.join(f.name for f in files[:8])}."
        )
    return chosen


def _split_of(file: Path) -> str:
    """The split that a path names (``data/test-00000.parquet``), or else train; held-out data must not be mixed in."""
    words = set(re.split(r"[^a-z]+", str(file.with_suffix("")).lower()))
    return next((split for split, names in SPLIT_WORDS.items() if words & names), "train")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.") from None


def text_records(text: str) -> list[str]:
    """Paragraphs, joined to records of about TEXT_RECORD characters; no character but blank lines is lost.

    A paragraph of more than eight times that (a book in one line) is cut, at white space where there is some.
    """
    records: list[str] = []
    block: list[str] = []
    size = 0
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if not paragraph.strip():
            continue
        pieces = list(_pieces(paragraph))
        if len(pieces) > 1 and block:  # a cut paragraph shares no record, whose parts are joined by blank lines
            records.append("\n\n".join(block))
            block, size = [], 0
        for piece in pieces:
            block.append(piece)
            size += len(piece)
            if size >= TEXT_RECORD or len(pieces) > 1:
                records.append("\n\n".join(block))
                block, size = [], 0
    return records + (["\n\n".join(block)] if block else [])


def _pieces(paragraph: str) -> Iterator[str]:
    if len(paragraph) <= 8 * TEXT_RECORD:
        yield paragraph
        return
    start = 0
    while start < len(paragraph):
        end = start + TEXT_RECORD
        cut = max(paragraph.rfind(mark, start + TEXT_RECORD // 2, end) for mark in (" ", "\n")) + 1
        end = cut if cut > 0 and end < len(paragraph) else end
        yield paragraph[start:end]
        start = end


def _load_records(files: list[Path], text_field: str) -> tuple[Dataset, RecordFormat]:
    """JSON, parquet and CSV. JSON is read twice: for errors with line numbers, then into Arrow by ``datasets``."""
    from datasets import concatenate_datasets, load_dataset

    format: RecordFormat | None = None
    parts = []
    for file in files:
        if file.suffix in TABLE_SUFFIXES:
            kind = file.suffix.removeprefix(".")
            try:
                parts.append(load_dataset(kind, data_files=str(file), split="train"))
            except Exception as error:  # pyarrow and datasets raise a dozen types here; all mean the file is bad
                raise UserError(f"{file} cannot be read as {kind}: {_root_cause(error)}") from error
            format = check_dataset(parts[-1], str(file), text_field, format)
            continue
        reader = JsonReader(file)
        format = check_records(reader, str(file), text_field, format)
        try:
            parts.append(load_dataset("json", data_files=str(file), split="train", field=reader.field))
        except Exception as error:  # the lines are valid JSON of the right format: columns of mixed types remain
            raise UserError(f"{file} cannot be read into columns: {_root_cause(error)}") from error
    assert format is not None
    columns = needed_columns(format, text_field)
    for file, part in zip(files, parts, strict=True):
        for column, kind in zip(columns, format.kinds, strict=True):
            if kind == "text" and getattr(part.features[column], "dtype", "") not in ("string", "large_string"):
                raise UserError(f"{file}: column {column!r} was read as {part.features[column]}; it must be text.")
    if len(parts) == 1:
        return parts[0], format
    return concatenate_datasets([_columns(part, format, text_field, convert=False) for part in parts]), format


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


class JsonReader:
    """Iterates over (place, record) of a JSON or JSON-lines file, naming the line that is broken."""

    def __init__(self, file: Path):
        self.file = file
        self.field: str | None = None
        """Name of the list of records when the file is one object around it."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """A ``.jsonl`` file holds one record a line; a ``.json`` file may also be one list, or one object around it."""
        with open(self.file, encoding="utf-8-sig") as lines:
            try:
                if self.file.suffix == ".json":
                    text = lines.read()
                    lines.seek(0)
                    if not self._is_lines(text):
                        yield from self._document(text)
                        return
                for number, line in enumerate(lines, 1):
                    if len(line) > LONGEST_RECORD:
                        raise UserError(
                            f"{self.file}, line {number} has {len(line):,} characters; a record may have "
                            f"{LONGEST_RECORD:,}. Split it into several records."
                        )
                    if line.strip():
                        yield f"line {number}", self._parse(line, number)
            except UnicodeDecodeError as error:
                raise UserError(f"{self.file} is not UTF-8 text: {error.reason} at byte {error.start}.") from None

    @staticmethod
    def _is_lines(text: str) -> bool:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return error.msg == "Extra data"
        except RecursionError:
            return "\n" in text.strip()
        return False

    def _parse(self, text: str, line: int) -> Any:
        try:
            return json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            shown = text.split("\n")[error.lineno - 1].strip()[:80]
            raise UserError(
                f"{self.file}, line {line + error.lineno - 1}, column {error.colno}: broken JSON ({error.msg}): "
                f"{shown!r}"
            ) from None
        except RecursionError:
            raise UserError(f"{self.file}, line {line}: JSON nested too deeply to be a record.") from None

    def _document(self, text: str) -> Iterator[tuple[str, Any]]:
        content = self._parse(text, 1)
        if isinstance(content, dict):
            if any(record_problem(content, format) is None for format in FORMATS):
                yield "record 1", content
                return
            lists = {key: value for key, value in content.items() if isinstance(value, list)}
            if len(lists) != 1:
                raise UserError(
                    f"{self.file} is one JSON object with keys {', '.join(map(repr, content))}; needed is a list of "
                    "records, one record a line, or an object with one list of records."
                )
            ((self.field, content),) = lists.items()
        for number, record in enumerate(content, 1):
            yield f"record {number}", record


def _columns(dataset: Any, format: RecordFormat, text_field: str, convert: bool = True) -> Any:
    """Only what TRL should see: a stray 'prompt' column beside 'messages' would change what it trains on."""
    known = dataset.column_names or list(next(iter(dataset)))
    used = [name for name in (*needed_columns(format, text_field), *format.optional) if name in known]
    dataset = dataset.select_columns(used)
    if convert and format.rename:
        dataset = dataset.rename_column(*format.rename)
    if convert and format.convert:
        dataset = dataset.map(format.convert, remove_columns=[name for name in used if name not in CHAT_EXTRAS])
    return dataset


def _load_hub(source: str, split: str, config: str | None, text_field: str, streaming: bool) -> LoadedData:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, config, split=split, streaming=streaming)
    except (ValueError, OSError) as error:  # includes DatasetNotFoundError, an unknown split, and no network
        raise UserError(
            f"--dataset {source}: no such file or directory in {Path.cwd()}, and as a data set of the Hub it cannot "
            f"be loaded: {error}"
        ) from error
    if streaming:
        first = next(iter(dataset), None)
        if first is None:
            raise UserError(f"{source} (split {split}) holds no records.")
        format = recognise(first, f"{source}, record 1", text_field)
    else:
        format = check_dataset(dataset, f"{source} (split {split})", text_field)
    return LoadedData(_columns(dataset, format, text_field), format)


def hold_out(dataset: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Split off an evaluation part, the same for the same seed."""
    if not hasattr(dataset, "train_test_split"):
        raise UserError("--eval_fraction cannot split a streamed data set; name an --eval_split or --eval_dataset.")
    if len(dataset) < 2:
        raise UserError(f"--eval_fraction needs at least 2 records; the data set holds {len(dataset)}.")
    held_out = min(len(dataset) - 1, max(1, round(fraction * len(dataset))))
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def check_prepared(dataset: Any, name: str, max_length: int | None) -> None:
    """After TRL tokenized, cut and filtered: something to learn from must be left."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise UserError(
            f"no sample of the {name} data is left: with max_length={max_length} every sequence is cut before its "
            "first token that counts for the loss (a prompt alone may fill it). Raise --max_length, or shorten the "
            "prompts."
        )

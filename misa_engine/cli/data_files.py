"""Finding data files and reading them line by line: endings, compression, splits, plain text, JSON with its places."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from misa_engine.cli.record_formats import FORMATS, LONGEST_RECORD, record_problem
from misa_engine.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)
#: Endings after those of JSON, CSV and text files, and how such files are opened.
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
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


def ending(file: Path) -> str:
    """The ending that says what is in the file: ``.jsonl`` of ``data.jsonl.gz``."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def is_data_name(file: Path) -> bool:
    """Whether the name ends as one of a data file that can be read."""
    return ending(file) in SUFFIXES and (file.suffix not in COMPRESSED or ending(file) != ".parquet")


@contextmanager
def opened(file: Path, encoding: str = "utf-8") -> Iterator[IO[str]]:
    """The file as text, unpacked if its name says so.

    Raises:
        UserError: it is not UTF-8, or damaged or not packed in the way that its name says.
    """
    try:
        with COMPRESSED.get(file.suffix, open)(file, mode="rt", encoding=encoding) as text:
            yield text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{file} is not UTF-8 text: byte {error.start} is {byte:#04x} ({error.reason}). Convert it to UTF-8."
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be unpacked: {error}. Restore the file.") from error
    except OSError as error:
        if file.suffix not in COMPRESSED or error.errno is not None:
            raise
        raise UserError(f"{file} cannot be unpacked: {error}. Restore the file.") from error


def data_files(path: Path, split: str) -> list[Path]:
    """The file itself, or the files of one kind and one split below a directory, in order of their names."""
    if path.is_file():
        if split != "train":
            raise UserError(f"{path} is one file and has no split {split!r}; name the evaluation file itself.")
        if not is_data_name(path):
            raise UserError(
                f"data file {path} has no known ending: {', '.join(SUFFIXES)} are read, all but .parquet also packed "
                f"({', '.join(COMPRESSED)})."
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if is_data_name(file) and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    data = [file for file in files if file.name.partition(".")[0].lower() not in ABOUT]
    files = data or files  # what describes a data set is none of it, unless nothing else is there
    if not files:
        raise UserError(f"data directory {path} holds no file ending in {', '.join(SUFFIXES)}.")
    kinds = {"text" if ending(file) in TEXT_SUFFIXES else ending(file).replace(".jsonl", ".json") for file in files}
    if len(kinds) > 1:
        other = next(file.name for file in files if ending(file) != ending(files[0]))
        raise UserError(
            f"data directory {path} mixes kinds of files: {files[0].name}, {other}. Name one file, or sort them apart."
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


def read_text(file: Path) -> str:
    """All of a text file; raises as ``opened`` does."""
    with opened(file) as text:
        return text.read()


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


class JsonReader:
    """Iterates over (place, record) of a JSON or JSON-lines file, naming the line that is broken."""

    def __init__(self, file: Path):
        self.file = file
        self.field: str | None = None
        """Name of the list of records when the file is one object around it."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """A ``.jsonl`` file holds one record a line; a ``.json`` file may also be one list, or one object around it."""
        with opened(self.file, "utf-8-sig") as lines:
            if ending(self.file) == ".json":
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

"""From a file, a directory or a Hub id to the columns that TRL trains on.

``datasets`` reads, TRL tokenizes, packs and masks. This file loads the data and names the file and line that is wrong
before a run writes anything; ``data_files.py`` finds and opens files, ``record_formats.py`` says what a record may look
like, ``data_mix.py`` puts several data sets together.

Plain text is cut at blank lines into records of about TEXT_RECORD characters. ``text_only`` says so to the caller, who
then packs them with TRL's "wrapped" strategy unless the user chose: every token is used and sequences are full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.data_files import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    JsonReader,
    data_files,
    ending,
    read_text,
    text_records,
)
from misa_engine.cli.early_checks import check_there
from misa_engine.cli.record_formats import (
    CHAT_EXTRAS,
    COLUMNS,
    FORMATS,
    RecordFormat,
    check_dataset,
    check_records,
    needed_columns,
    recognise,
)
from misa_engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class LoadedData:
    """A data set with exactly the columns that TRL needs."""

    dataset: Dataset | IterableDataset
    format: RecordFormat
    text_only: bool = False
    """From plain text files, which the caller packs unless the user says otherwise."""


@dataclass(frozen=True)
class Reading:
    """How records are read: for which objective, and which of their columns are which."""

    text_field: str = "text"
    objective: str = "sft"
    columns: Mapping[str, str] = field(default_factory=dict)
    """The name that a format knows -> the column of the data (``--columns prompt=q``)."""

    @classmethod
    def of(cls, text_field: str, objective: str, columns: str | None) -> Reading:
        """From the options of the command line.

        Raises:
            UserError: ``columns`` is no list of known=yours, or names what no format knows.
        """
        found: dict[str, str] = {}
        for pair in (columns or "").split(",") if columns else ():
            known, sign, yours = (part.strip() for part in pair.partition("="))
            if not sign or not known or not yours:
                raise UserError(
                    f"--columns takes known=yours, separated by commas (prompt=q,completion=a); got {pair!r}"
                )
            if known not in COLUMNS:
                hint = did_you_mean(known, COLUMNS) or f" Known: {', '.join(COLUMNS)}."
                raise UserError(f"--columns {pair}: no format has a column {known!r}.{hint}")
            if known in found:
                raise UserError(f"--columns names {known} twice: {found[known]} and {yours}. Keep one.")
            found[known] = yours
        return cls(text_field, objective, found)

    def renamed(self, record: Any, place: str) -> Any:
        """One record under the known names; anything but an object is left for the check to name."""
        if not self.columns or not isinstance(record, Mapping):
            return record
        self.check(record, place)
        return {self._new_name(name): value for name, value in record.items() if name not in self._hidden(record)}

    def renamed_dataset(self, dataset: Any, place: str) -> Any:
        """A data set in Arrow, or a stream, under the known names."""
        if not self.columns:
            return dataset
        names = dataset.column_names or list(next(iter(dataset), {}))
        self.check(names, place)
        dataset = dataset.remove_columns(sorted(self._hidden(names)))
        return dataset.rename_columns({yours: known for known, yours in self.columns.items() if known != yours})

    def check(self, names: Any, place: str) -> None:
        """Raise UserError where a column that ``--columns`` names is not there."""
        for known, yours in self.columns.items():
            if yours not in names:
                shown = ", ".join(map(repr, names)) or "nothing"
                hint = did_you_mean(yours, names)
                raise UserError(
                    f"{place}: there is no column {yours!r} (--columns {known}={yours}); found: {shown}.{hint}"
                )

    def _new_name(self, name: str) -> str:
        return next((known for known, yours in self.columns.items() if yours == name), name)

    def _hidden(self, names: Any) -> set[str]:
        """Columns whose name another one takes."""
        return {name for name in names if name in self.columns and name not in self.columns.values()}


def load_data(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    reading: Reading | None = None,
    streaming: bool = False,
) -> LoadedData:
    """Load and check one data set.

    Raises:
        UserError: nothing is there, or a record is broken; with the file, the line or record, what was found and
            what is needed.
    """
    reading = reading or Reading()
    path = Path(source).expanduser()
    if not path.exists():
        check_there(source)
        return _load_hub(source, split, config, reading, streaming)
    if streaming:
        raise UserError(f"--dataset_streaming is for data sets of the Hub; {source} is on this machine already.")
    files = data_files(path, split)
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"data file {file} cannot be read: permission denied.")
        if file.stat().st_size == 0:
            raise UserError(f"data file {file} is empty.")
    if ending(files[0]) in TEXT_SUFFIXES:
        from datasets import Dataset

        if reading.objective != "sft":
            raise UserError(f"{source} is plain text; --objective {reading.objective} needs records of preferences.")
        texts = [record for file in files for record in text_records(read_text(file))]
        if not texts:
            raise UserError(f"{source} holds nothing but white space.")
        return LoadedData(Dataset.from_dict({reading.text_field: texts}), FORMATS[-1], text_only=True)
    dataset, format = _load_records(files, reading)
    return LoadedData(_columns(dataset, format, reading.text_field), format)


def _load_records(files: list[Path], reading: Reading) -> tuple[Dataset, RecordFormat]:
    """JSON, parquet and CSV. JSON is read twice: for errors with line numbers, then into Arrow by ``datasets``."""
    from datasets import concatenate_datasets, load_dataset

    format: RecordFormat | None = None
    parts = []
    for file in files:
        if ending(file) in TABLE_SUFFIXES:
            kind = ending(file).removeprefix(".").replace("tsv", "csv")
            options = {"sep": "\t"} if ending(file) == ".tsv" else {}
            try:
                part = load_dataset(kind, data_files=str(file), split="train", **options)
            except Exception as error:  # pyarrow and datasets raise a dozen types here; all mean the file is bad
                raise UserError(f"{file} cannot be read as {kind}: {_root_cause(error)}") from error
            parts.append(reading.renamed_dataset(part, str(file)))
            format = check_dataset(parts[-1], str(file), reading.text_field, format, reading.objective)
            continue
        reader = JsonReader(file)
        records = _renamed(reader, reading)
        format = check_records(records, str(file), reading.text_field, format, reading.objective)
        try:
            part = load_dataset("json", data_files=str(file), split="train", field=reader.field)
        except Exception as error:  # the lines are valid JSON of the right format: columns of mixed types remain
            raise UserError(f"{file} cannot be read into columns: {_root_cause(error)}") from error
        parts.append(reading.renamed_dataset(part, str(file)))
    assert format is not None
    columns = needed_columns(format, reading.text_field)
    for file, part in zip(files, parts, strict=True):
        for column, kind in zip(columns, format.kinds, strict=True):
            if kind == "text" and getattr(part.features[column], "dtype", "") not in ("string", "large_string"):
                raise UserError(f"{file}: column {column!r} was read as {part.features[column]}; it must be text.")
    if len(parts) == 1:
        return parts[0], format
    parts = [_columns(part, format, reading.text_field, convert=False) for part in parts]
    return concatenate_datasets(parts), format


def _renamed(reader: JsonReader, reading: Reading) -> Iterator[tuple[str, Any]]:
    for place, record in reader:
        yield place, reading.renamed(record, f"{reader.file}, {place}")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


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


def _load_hub(source: str, split: str, config: str | None, reading: Reading, streaming: bool) -> LoadedData:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, config, split=split, streaming=streaming)
    except (ValueError, OSError) as error:  # includes DatasetNotFoundError, an unknown split, and no network
        raise UserError(
            f"--dataset {source}: no such file or directory in {Path.cwd()}, and as a data set of the Hub it cannot "
            f"be loaded: {error}"
        ) from error
    dataset = reading.renamed_dataset(dataset, source)
    if streaming:
        first = next(iter(dataset), None)
        if first is None:
            raise UserError(f"{source} (split {split}) holds no records.")
        format = recognise(first, f"{source}, record 1", reading.text_field, reading.objective)
    else:
        place = f"{source} (split {split})"
        format = check_dataset(dataset, place, reading.text_field, objective=reading.objective)
    return LoadedData(_columns(dataset, format, reading.text_field), format)


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

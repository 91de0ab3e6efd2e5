"""Data sets for lm-eval's tasks: files of the user's in the hub's layout, or the hub's at a pinned revision.

``DIR/OWNER/NAME/CONFIG/test-00000-of-00001.parquet`` is what ``hf download OWNER/NAME --repo-type dataset --local-dir
DIR/OWNER/NAME`` makes; ``test.jsonl``, ``test.json`` and a folder ``data`` in between are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from misa_engine.errors import UserError
from misa_engine.evaluation.task import read_data
from misa_engine.trainer.manifest import file_digest

#: Revisions of the data sets of the tasks that the paper and its peers report. Others are looked up when they are
#: loaded, and stand in the result.
REVISIONS = {
    "openai/gsm8k": "740312add88f781978c0658806c59bc2815b9866",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "TIGER-Lab/MMLU-Pro": "b189ec765aa7ed75c8acfea42df31fdae71f97be",
    "google/IFEval": "966cd89545d6b6acfd7638bc708b98261ca58e84",
}
SUFFIXES = (".parquet", ".jsonl", ".json")
#: Folders of a data set with one configuration.
DEFAULT_FOLDERS = ("", "default", "plain_text", "data")
#: Names of one split. mmlu's dev is no validation, so a name that is there itself goes before its others.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
#: Files that lie beside data and are about it.
ABOUT = frozenset(("dataset_info", "dataset_infos", "dataset_dict", "state"))
#: Seconds to wait for the hub.
PATIENCE = 5.0


class DataSource:
    """Stands in for ``datasets.load_dataset`` while lm-eval makes its tasks.

    Args:
        data: folder of local data; None takes the hub's only.
    """

    def __init__(self, data: Path | None) -> None:
        self.data = data
        self.used: dict[str, str] = {}
        """Data file -> SHA-256, data set of the hub -> revision."""
        self._made: dict[tuple[str, str | None], Any] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """lm-eval asks here as long as this holds."""
        import datasets

        original = datasets.load_dataset

        def load(path: str, name: str | None = None, **options: Any) -> Any:
            if (path, name) not in self._made:
                local = self._local(path, name)
                self._made[path, name] = local if local is not None else self._hub(original, path, name, options)
            return self._made[path, name]

        datasets.load_dataset = load
        try:
            yield
        finally:
            datasets.load_dataset = original

    def _local(self, path: str, name: str | None) -> Any:
        if self.data is None or not (self.data / path).is_dir():
            return None
        found = split_files(self.data / path, name)
        if not found:
            raise UserError(
                f"{self.data / path} holds no files of {name or 'its only configuration'}: needed are SPLIT.parquet, "
                f".jsonl or .json in {self.data / path / (name or '')}, as this makes them: {self._command(path)}"
            )
        for files in found.values():
            self.used |= {str(file.relative_to(self.data)): file_digest(file) for file in files}
        return dataset_of(found)

    def _hub(self, original: Any, path: str, name: str | None, options: dict[str, Any]) -> Any:
        revision = options.pop("revision", None) or REVISIONS.get(path)
        try:
            from huggingface_hub import HfApi

            # asked in any case: the client of datasets waits half a minute before it says that there is no network
            revision = HfApi().dataset_info(path, revision=revision, timeout=PATIENCE).sha or revision
            made = original(path, name, revision=revision, **options)
        except Exception as error:  # of whichever HTTP library; the text goes to the user
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(
                f"the data set {path} is not in {self.data or '--data DIR'} and cannot be had from the hub ({reason}). "
                f"Where there is a network: {self._command(path)}, then --data {self.data or 'data'}"
            ) from error
        self.used[path] = str(revision)
        return made

    def _command(self, path: str) -> str:
        pinned = f" --revision {REVISIONS[path]}" if path in REVISIONS else ""
        return f"hf download {path} --repo-type dataset{pinned} --local-dir {(self.data or Path('data')) / path}"


def split_files(root: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of each split of a data set's configuration; empty where there are none.

    Args:
        root: the data set's folder.
        name: the configuration; None for the only one.
    """
    folders = [root / name, root / name / "data", root / "data" / name] if name else []
    folders += [root / folder for folder in DEFAULT_FOLDERS] if name in (None, "default") else []
    for folder in folders:
        for suffix in SUFFIXES:  # one kind of file: a folder may hold the same rows twice
            files = sorted(file for file in folder.glob(f"*{suffix}") if file.stem not in ABOUT)
            if files:
                return _by_split(files)
    return {}


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    known = {word for words in SPLITS.values() for word in words}
    for file in files:
        stem = re.sub(r"-\d{5}-of-\d{5}.*$", "", file.stem)
        words = [word for word in re.split(r"[^a-z]+", stem.lower()) if word in known]
        split = stem if stem in known or len(files) > 1 and not words else (words or ["train"])[-1]
        found.setdefault(split, []).append(file)
    for split, others in SPLITS.items():
        for other in others:
            if split not in found and other in found:
                found[split] = found[other]
    return found


def dataset_of(files: dict[str, list[Path]]) -> Any:
    """Splits as ``datasets.load_dataset`` gives them, in memory.

    Raises:
        UserError: a file cannot be read.
    """
    import datasets
    import pyarrow.parquet

    made = {}
    for split, paths in files.items():
        if paths[0].suffix == ".parquet":  # the table carries its features, labels included
            try:
                made[split] = datasets.concatenate_datasets(
                    [datasets.Dataset(pyarrow.parquet.read_table(path)) for path in paths]
                )
            except (OSError, ValueError) as error:
                raise UserError(f"{paths[0]} cannot be read: {error}. Restore the file.") from error
        else:
            made[split] = datasets.Dataset.from_list([record for path in paths for record in read_data(path)])
    return datasets.DatasetDict(made)

"""The model card in a run's directory: data, method, options and results, from the run's log and its options.

It is written after training, replaced by the next run in the directory, and never put over a README.md that is not
ours: a line in it says so, and whoever takes that line out keeps the file. Results of ``misa eval`` are added to its
table and to the ``model-index`` of its metadata, which the Hub shows (``add_results``).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.report.log import RunLog
from misa_engine.trainer.manifest import file_digest

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments

CARD = "README.md"
MARK = "<!-- misa train writes this file anew after each run; take this line out to keep your changes -->"
RESULTS = ("<!-- results: begin -->", "<!-- results: end -->")
#: Begins the names of losses on a run's own evaluation data, which stand among the figures already.
HELD_OUT = "held-out records of "
#: Larger data files are named without a checksum: 1 to 2 GB/s.
MOST_HASHED = 4 << 30


class KeepsReadme:
    """For a TRL trainer: no model card over a README.md of the user's, and none with links to a Hub model."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card where the model is pushed to the Hub and there is none; TRL calls it at each checkpoint."""
        trainer: Any = self
        if trainer.args.push_to_hub and not Path(str(trainer.args.output_dir), CARD).exists():
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]


def is_ours(card: Path) -> bool:
    """Whether a file is a card that misa train wrote and may replace."""
    try:
        return MARK in card.read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return False


def write_card(arguments: TrainArguments, out: Path, records: int | None = None) -> Path | None:
    """Write the card of the run in ``out``, unless a README.md of somebody else's is there.

    Args:
        arguments: of the run.
        out: the run's directory, with its log.
        records: of the training data; None for a stream.

    Returns:
        The card; None where there is another README.md.
    """
    card = out / CARD
    if card.exists() and not is_ours(card):
        return None
    entries = RunLog.read(out)
    run = next((entry for entry in entries if entry["type"] == "run"), {})
    end: dict[str, Any] = next((entry for entry in reversed(entries) if entry["type"] == "end"), {})
    losses = [(entry["step"], entry["eval_loss"]) for entry in entries if entry.get("eval_loss") is not None]
    results = [_loss_row(arguments, losses[-1][1])] if losses else []
    base, licence = _base(arguments)
    text = "\n".join(
        [
            f"# {out.resolve().name}",
            "",
            MARK,
            "",
            f"{base} {_method(run)}",
            "",
            *_data(arguments, records),
            *_options(arguments),
            "## Results",
            "",
            *_figures(entries, end, losses),
            "",
            *RESULTS,
            "",
            *_versions(run),
        ]
    )
    _write(card, _front(out, arguments, licence, results), text)
    return card


def add_results(folder: Path, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Put results of an evaluation into the card of a model: its table, and ``model-index`` in its metadata.

    Args:
        folder: of the model.
        rows: each with ``task``, ``metric`` and ``value``, and ``stderr`` where there is one; a row replaces an earlier
            one of the same task and metric.

    Returns:
        Whether there is a card that is ours; another README.md is left as it is.
    """
    import yaml

    card = folder / CARD
    if not is_ours(card):
        return False
    _, front, text = re.split(r"^---\n", card.read_text(encoding="utf-8"), maxsplit=2, flags=re.MULTILINE)
    metadata = yaml.safe_load(front) or {}
    known = {(row["task"], row["metric"]): row for row in _rows_of(metadata)}
    known |= {(str(row["task"]), str(row["metric"])): dict(row) for row in rows}
    evaluated = [row for row in known.values() if not str(row["task"]).startswith(HELD_OUT)]
    lines = ["| task | metric | value |", "| --- | --- | --- |"] if evaluated else []
    for row in evaluated:
        error = f" ± {row['stderr']:.4f}" if row.get("stderr") is not None else ""
        lines.append(f"| {row['task']} | {row['metric']} | {row['value']:.4f}{error} |")
    before, _, rest = text.partition(RESULTS[0])
    after = rest.partition(RESULTS[1])[2]
    metadata["model-index"] = _index(folder.resolve().name, known.values())
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    _write(card, front, "\n".join([before + RESULTS[0], *lines, RESULTS[1] + after]).rstrip("\n"))
    return True


def licence_of(source: str) -> str | None:
    """What a data set's own files say about its licence; None where they say nothing. Asks no server.

    Args:
        source: a file or directory, whose README.md or dataset_info.json is looked at, or a Hub id, whose card is
            looked for in the Hub's cache.
    """
    path = Path(source).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        stated = _stated(folder / CARD) or _from_info(folder)
        file = next((file.name for file in sorted(folder.glob("LICEN[CS]E*")) if file.is_file()), None)
        return stated or (f"see {file} beside it" if file else None)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(source, CARD, repo_type="dataset")
    except ValueError:  # not the form of an id
        return None
    return _stated(Path(cached)) if isinstance(cached, str) else None


# ---- parts ----


def _base(arguments: TrainArguments) -> tuple[str, str | None]:
    """A sentence about where the model comes from, and the licence that its base states."""
    name = str(arguments.model.model_name_or_path)
    if arguments.model.from_scratch:
        return f"Trained from random weights, with the configuration of `{name}`", None
    path = Path(name).expanduser()
    licence = _stated(path / CARD) if path.is_dir() else None
    note = "" if licence or not path.is_dir() else " (its directory states no licence: look at its origin)"
    return f"Trained from `{path.resolve().name if path.is_dir() else name}`{note}", licence


def _method(run: Mapping[str, Any]) -> str:
    config = run.get("config") or {}
    total = run.get("total_parameters") or 0
    if run.get("optimizer") != "misa":
        return f"with AdamW on all of its {total:,} parameters."
    return (
        "with [MISA](https://arxiv.org/abs/2511.00056), module-wise importance sampling: at most "
        f"{run.get('budget_parameters') or 0:,} of its {total:,} parameters (δ = {config.get('delta')}) train with "
        f"Adam at a time, drawn anew every {config.get('inner_steps')} steps (preset `{config.get('preset')}`, "
        f"η = {config.get('eta')}); the matrices outside the draw: `{config.get('rest')}`."
    )


def _data(arguments: TrainArguments, records: int | None) -> list[str]:
    lines = ["## Data", "", "| data set | for | licence | sha256 |", "| --- | --- | --- | --- |"]
    options = arguments.data
    for use, sources in (("training", options.dataset), ("evaluation", options.eval_dataset)):
        for source in sources:
            lines.append(f"| `{source}` | {use} | {licence_of(source) or 'not stated'} | {_checksum(source)} |")
    count = f"{records:,} records to train on" if records is not None else "read as a stream"
    held = f", {options.eval_fraction:g} of each data set held out" if options.eval_fraction else ""
    return [*lines, "", f"{count}{held}.", ""]


def _options(arguments: TrainArguments) -> list[str]:
    """What was given, as a file for ``misa train --config``."""
    import yaml

    parts = (arguments.model, arguments.data, arguments.run, arguments.misa, arguments.sft)
    given = {}
    for name in sorted(arguments.given):
        holder = next((part for part in parts if hasattr(part, name)), None)
        if holder is not None and name != "resume_from_checkpoint":
            given[name] = _plain(getattr(holder, name))
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True).strip()
    return ["## Options", "", "Of `misa train`; all others are its defaults.", "", "```yaml", text, "```", ""]


def _figures(entries: list[dict[str, Any]], end: Mapping[str, Any], losses: list[tuple[int, float]]) -> list[str]:
    rows = [("optimizer steps", f"{end.get('step', entries[-1]['step']):,}")]
    trained = [entry["loss"] for entry in entries if entry["type"] == "metrics" and entry.get("loss") is not None]
    if trained:
        rows.append(("training loss, last logged", f"{trained[-1]:.4f}"))
    if losses:
        rows.append(("loss on the evaluation data", f"{losses[0][1]:.4f} at step {losses[0][0]}"))
        rows.append(("... after training", f"{losses[-1][1]:.4f} (perplexity {_exp(losses[-1][1])})"))
    if end.get("step_time_s"):
        rows.append(("step time, median", f"{1e3 * end['step_time_s']['median']:,.0f} ms"))
    if end.get("peak_memory_bytes"):
        rows.append(("peak memory", f"{end['peak_memory_bytes'] / 2**30:.2f} GiB"))
    visits = list((end.get("visits") or {}).values())
    if visits:
        shares = f"{min(visits)} to {max(visits)} rounds each, {sum(not visit for visit in visits)} of them none"
        rows.append((f"{len(visits)} drawn matrices", shares))
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _versions(run: Mapping[str, Any]) -> list[str]:
    found = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
    return ["## Made with", "", f"{found}; on {run.get('device', 'an unknown device')}."]


def _front(out: Path, arguments: TrainArguments, licence: str | None, results: list[dict[str, Any]]) -> str:
    """Metadata as the Hub reads it: nothing that is not known."""
    from huggingface_hub import ModelCardData

    name = str(arguments.model.model_name_or_path)
    hub_model = not arguments.model.from_scratch and not Path(name).expanduser().exists()
    data = [source for source in arguments.data.dataset if not Path(source).expanduser().exists()]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["misa_engine", arguments.run.optimizer, arguments.run.objective],
        base_model=name if hub_model else None,
        datasets=data or None,
        license=licence,
    ).to_dict()
    if results:
        metadata["model-index"] = _index(out.resolve().name, results)
    import yaml

    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _loss_row(arguments: TrainArguments, loss: float) -> dict[str, Any]:
    options = arguments.data
    source = (options.eval_dataset or options.dataset)[0]
    return {"task": f"{HELD_OUT}{Path(source).name}", "metric": "loss", "value": loss}


def _index(model: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", str(row["task"])),
            dataset_name=str(row["task"]),
            metric_type=str(row["metric"]),
            metric_value=float(row["value"]),
            metric_args=None if row.get("stderr") is None else {"stderr": float(row["stderr"])},
        )
        for row in rows
    ]
    return eval_results_to_model_index(model, results)


def _rows_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that ``_index`` made, whatever else is in the metadata."""
    rows = []
    for model in metadata.get("model-index") or []:
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                stderr = (metric.get("args") or {}).get("stderr")
                row = {"task": result["dataset"]["name"], "metric": metric["type"], "value": metric["value"]}
                rows.append({**row, "stderr": stderr})
    return rows


def _stated(card: Path) -> str | None:
    """The licence in the metadata of a card."""
    import yaml

    try:
        parts = re.split(r"^---\s*$", card.read_text(encoding="utf-8"), maxsplit=2, flags=re.MULTILINE)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence) if licence else None


def _from_info(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return str(found["license"]) if isinstance(found, dict) and found.get("license") else None


def _checksum(source: str) -> str:
    path = Path(source).expanduser()
    if not path.is_file() or path.stat().st_size > MOST_HASHED:
        return "–"
    return f"`{file_digest(path)[:16]}`"


def _exp(loss: float) -> str:
    return f"{math.exp(loss):.3g}" if loss < 700 else "beyond all numbers"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    value = getattr(value, "value", value)  # of an enumeration
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _write(card: Path, front: str, text: str) -> None:
    temporary = card.with_name(f".{CARD}.{os.getpid()}.tmp")
    temporary.write_text(f"---\n{front}---\n\n{text.lstrip()}\n", encoding="utf-8")
    os.replace(temporary, card)

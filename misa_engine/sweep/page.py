"""The result page of a study: HTML in one file, the same in Markdown and JSON, and the best settings as a YAML file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.files import write_whole
from misa_engine.report import html
from misa_engine.sweep.settings import Settings
from misa_engine.sweep.trial import write_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, TABLE, DOCUMENT, BEST = "index.html", "results.md", "results.json", "best.yaml"


def write_results(document: dict[str, Any], settings: Settings, directory: Path) -> list[Path]:
    """Write everything; each file appears whole.

    Args:
        document: of ``results.collect``.
        settings: of the study.
        directory: that gets the files.

    Returns:
        The files. Without a complete trial there is no ``best.yaml``; without matplotlib the page has no pictures.
    """
    written = [
        _write(directory / DOCUMENT, json.dumps(document, indent=1) + "\n"),
        _write(directory / TABLE, markdown(document)),
        _write(directory / PAGE, page(document)),
    ]
    if document["best"] is not None:
        written.append(_write_best(document, settings, directory / BEST))
    return written


def page(document: dict[str, Any]) -> str:
    """HTML without a link to anything outside."""
    title = f"misa sweep: {document['objective']}"
    parts = [f"<p>{escape(_summary(document))}</p>"]
    best = document["best"]
    if best is not None:
        values = [(escape(name), escape(_shown(value))) for name, value in best["values"].items()]
        parts.append(html.section("Best settings", "best", ("option", "value"), values))
        path = f"{document['directory']}/{BEST}"
        parts.append(f"<p>Ready to run:</p><pre>misa train --config {escape(path)}</pre>")
    parts.append(f"<h2>What mattered</h2>\n<p>{escape(document['importance_remark'])}</p>")
    if document["importance"]:
        parts.append(html.table("importance", ("option", "importance"), _escaped(_importance_rows(document))))
    parts += [html.picture(name, figure) for name, figure in _pictures(document).items()]
    headings, rows, states = _trial_rows(document)
    parts.append("<h2>All trials</h2>\n" + html.table("trials", list(map(escape, headings)), _escaped(rows), states))
    searched = _escaped([space["text"], space["source"]] for space in document["space"])
    parts.append(html.section("What was searched", "searched", ("range", "where it comes from"), searched))
    fixed = "\n".join(f"{name}: {json.dumps(value)}" for name, value in document["base"].items())
    parts.append(f"<h2>The same in all trials</h2><pre>{escape(fixed)}</pre>")
    parts.append(f"<h2>How it was made</h2><pre>{escape(document['command'])}</pre>")
    made_with = _escaped([name, str(value)] for name, value in document["environment"].items())
    parts.append(html.table("environment", ("what", "is"), made_with))
    return html.page(title, parts)


def markdown(document: dict[str, Any]) -> str:
    """The page's tables as Markdown."""
    lines = [f"# misa sweep: {document['objective']}", "", _summary(document), ""]
    if document["best"] is not None:
        lines += ["## Best settings", "", "| option | value |", "| --- | --- |"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in document["best"]["values"].items()]
        lines += ["", f"`misa train --config {document['directory']}/{BEST}`", ""]
    lines += ["## What mattered", "", document["importance_remark"], ""]
    if document["importance"]:
        lines += ["| option | importance |", "| --- | --- |"]
        lines += [f"| {name} | {share} |" for name, share in _importance_rows(document)] + [""]
    headings, rows, _ = _trial_rows(document)
    lines += ["## All trials", "", f"| {' | '.join(headings)} |", f"| {' | '.join(['---'] * len(headings))} |"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _summary(document: dict[str, Any]) -> str:
    states = [row["state"] for row in document["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    best = document["best"]
    found = f"best {best['value']:.4f}, trial {best['trial']}" if best else "no trial is complete"
    return f"{len(states)} trials ({counts or 'none'}): {found}."


def _importance_rows(document: dict[str, Any]) -> list[list[str]]:
    return [[name, f"{share:.0%}"] for name, share in document["importance"].items()]


def _trial_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, cells and the class of each row; complete trials first, best on top."""
    names = [space["name"] for space in document["space"]]
    sign = 1 if document["direction"] == "minimize" else -1
    order = sorted(
        document["trials"],
        key=lambda row: (row["value"] is None, sign * (row["value"] or 0), row["trial"]),
    )
    rows, states = [], []
    for row in order:
        memory = row["peak_memory_bytes"]
        cells = [str(row["trial"]), "–" if row["value"] is None else f"{row['value']:.4f}"]
        cells += [_shown(row["values"].get(name, "–")) for name in names]
        cells += ["–" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        cells += [f"{memory / 2**30:.2f}" if memory else "–"]
        rows.append([*cells, row["state"] + (f": {row['reason']}" if row["reason"] else "")])
        states.append("best" if document["best"] and row["trial"] == document["best"]["trial"] else row["state"])
    return ["trial", document["objective"], *names, "seconds", "peak GiB", "ended"], rows, states


def _pictures(document: dict[str, Any]) -> dict[str, Figure]:
    if find_spec("matplotlib") is None:
        return {}
    from misa_engine.sweep import pictures

    made = {}
    if document["importance"]:
        made["importance"] = pictures.importance_bars(document)
    if any(row["value"] is not None for row in document["trials"]):
        made["trials"], made["settings"] = pictures.history(document), pictures.slices(document)
    if any(row["losses"] for row in document["trials"]):
        made["losses"] = pictures.curves(document)
    return made


def _write_best(document: dict[str, Any], settings: Settings, path: Path) -> Path:
    best = document["best"]
    options = {name: value for name, value in settings.options(best["values"]).items() if name != "save_strategy"}
    options["output_dir"] = str(Path(document["directory"]) / "best")
    heading = (
        f"# The best of {len(document['trials'])} trials: {document['objective']} {best['value']:.6g}, trial "
        f"{best['trial']}.\n# misa train --config {document['directory']}/{BEST}\n"
    )
    write_config(path, options, heading)
    return path


def _write(path: Path, text: str) -> Path:
    write_whole(path, text)
    return path


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in row] for row in rows]

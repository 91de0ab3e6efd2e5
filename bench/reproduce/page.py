"""The page of an experiment: one HTML file with everything in it, readable in a light and in a dark browser."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from misa_engine.bench.presets import GIB

Row = dict[str, Any]
HELD = {None: "not judged", True: '<span class="yes">holds</span>', False: '<span class="no">does not</span>'}
STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; --dim: #5c5c5c; --good: #00694b; --bad: #a33f00; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #222; --dim: #aaa; --good: #4cc79c; --bad: #ff9b5c; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; vertical-align: top; }
th { background: var(--soft); text-align: left; } td:first-child, td.word { text-align: left; }
.wide { overflow-x: auto; } .dim { color: var(--dim); font-size: .85em; } .yes { color: var(--good); }
.no { color: var(--bad); } code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; background: #fff; padding: .5rem; } figure img { max-width: 100%; height: auto; }
.notice { border-left: 4px solid var(--bad); padding: .3rem 1rem; background: var(--soft); }
"""


def page_of(document: Row) -> str:
    """The whole file."""
    where = document["environment"]
    tiny = document["scale"] == "tiny"
    parts = [
        f"<h1>{escape(document['title'])}</h1>",
        f"<p>{escape(document['summary'])}</p>",
        '<p class="notice">Scale tiny: toy data and a model of 0.2 million random weights. It shows that everything '
        "runs; its numbers rank nothing and do not compare with the paper's.</p>" if tiny else "",
        f'<p><a href="https://arxiv.org/abs/{document["paper"].split()[-1]}">{document["paper"]}</a>, recipe '
        f'<code>{document["variant"]}</code>. {escape(document["missing"])}</p>',
        "<h2>Results</h2>",
        _results(document),
        _claims(document["claims"]),
        *_pictures(document),
        _costs(document["costs"]),
        _section("Settings of the recipe", "settings", ("option", "value", "source"), [
            (f"<code>{escape(row['option'])}</code>", escape(json.dumps(row["value"])), escape(row["source"]))
            for row in document["hyperparameters"]
        ]),
        _runs(document["runs"]),
        _section("Environment", "environment", ("what", "is"), [
            (name, f"<code>{escape(str(where[name]))}</code>")
            for name in ("command", "hardware", "python", "driver", "commit", "date") if where.get(name)
        ]),
        _section("Packages", "packages", ("package", "version", "SHA-256 of RECORD"), [
            (escape(name), escape(one["version"]), f"<code>{one['sha256']}</code>")
            for name, one in document["packages"].items()
        ]),
    ]  # fmt: skip
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(document["title"])}</title>'
    )
    head += f'\n<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
    return head + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"


def _section(title: str, name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<h2>{title}</h2>\n{_table(name, headings, rows)}" if rows else ""


def _table(name: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )  # fmt: skip
    table = f'<table id="{name}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _kind(cell: str) -> str:
    return "" if cell[:1].isdigit() or cell[:1] in "-–" else ' class="word"'


# ---- tables ----


def number(metric: str, value: float | None) -> str:
    """A metric as the page shows it."""
    if value is None:
        return "–"
    if metric.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB" if value >= GIB / 8 else f"{value / (1 << 20):.2f} MiB"
    if metric == "seconds":
        return f"{value:,.1f}"
    return f"{value:.4f}" if "loss" in metric else f"{value:.2f}"


def _results(document: Row) -> str:
    headings = ["model", "method", "seeds"]
    sources: list[str] = []
    told_of = {
        name for line in document["table"] for name, cell in line["cells"].items() if {"paper", "lacking"} & set(cell)
    }
    for metric in document["metrics"]:
        shown = metric.replace("_", " ")
        headings += [shown, f"{shown}, paper"] if metric in told_of else [shown]
    rows = []
    for line in document["table"]:
        cells = [escape(line["model"]), escape(line["label"]), f"{line['seeds']} of {line['of']}"]
        for place, metric in enumerate(document["metrics"]):
            cell = line["cells"][metric]
            shown = number(metric, cell.get("median"))
            if cell.get("least") != cell.get("most"):
                shown += (
                    f'<br><span class="dim">{number(metric, cell["least"])} … {number(metric, cell["most"])}</span>'
                )
            if place == 0 and line["status"]:
                shown += f'<br><span class="dim">{escape(line["status"])}</span>'
            cells.append(shown)
            if metric in told_of:
                cells.append(_told(cell, sources))
        rows.append(cells)
    notes = "".join(f"<br><sup>{place}</sup> {escape(source)}" for place, source in enumerate(sources, start=1))
    said = "Medians over the seeds, least and most below. – is not measured. Not transcribed: the "
    said += "paper has the number, and it could not be checked here."
    return f'{_table("results", headings, rows)}\n<p class="dim">{said}{notes}</p>'


def _told(cell: Row, sources: list[str]) -> str:
    """The paper's number with the place of its source, which ``sources`` gets, or why there is none."""
    if "paper" not in cell:
        return f'<span class="dim">{cell.get("lacking", "–")}</span>'
    if cell["source"] not in sources:
        sources.append(cell["source"])
    return f"{cell['paper']:.1f}<sup>{sources.index(cell['source']) + 1}</sup>"


def _claims(claims: Sequence[Row]) -> str:
    rows = []
    for claim in claims:
        for one in claim["found"]:
            numbers = [f"{one[side]:.4g}" if one[side] is not None else "–" for side in ("better", "worse")]
            rows.append((escape(claim["said"]), escape(one["model"]), *numbers, HELD[one["holds"]],
                escape(claim["source"])))  # fmt: skip
    return _section("What the paper claims, and what is here", "claims",
        ("claim", "model", "first", "second", "here", "source"), rows)  # fmt: skip


def _costs(costs: Sequence[Row]) -> str:
    rows = [
        (escape(cost["run"]), f"{cost['steps']:,}", f"{cost['gpu_hours']:.1f}",
         number("vram_bytes", cost["vram_bytes"]), escape(cost["how"]))
        for cost in costs
    ]  # fmt: skip
    return _section("Cost, computed and not measured", "costs", ("run", "steps", "GPU-hours", "VRAM", "how"), rows)


def _runs(runs: Sequence[Row]) -> str:
    rows = []
    for run in runs:
        notes = "; ".join(filter(None, (run["source"], *run.get("notes", ()))))
        trained = f"{run['trained_parameters']:,}" if "trained_parameters" in run else "–"
        rows.append((escape(run["run"]), escape(run["status"]), f"{run['case_s']:.1f}" if run.get("case_s") else "–",
            f"{run['steps']:,}" if "steps" in run else "–", trained,
            f"<code>{run['base_digest']}</code>" if "base_digest" in run else "–",
            f"<code>{run['data_digest']}</code>" if "data_digest" in run else "–", escape(notes)))  # fmt: skip
    return _section("Runs", "runs", ("run", "status", "s in all", "steps", "trained at first", "base", "held-out rows",
        "notes"), rows)  # fmt: skip


# ---- pictures ----


def _pictures(document: Row) -> list[str]:
    """The curves of each model, drawn into the page; none without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ["<p>No pictures: matplotlib is not installed (pip install 'misa_engine[bench]').</p>"]
    from misa_engine.bench.reproduce.pictures import bytes_figure, curves_figure

    figures = {}
    for model in dict.fromkeys(run["model"] for run in document["runs"]):
        runs = [run for run in document["runs"] if run["model"] == model and run.get("curve")]
        if runs:
            figures[f"{model}: held-out loss over steps and over seconds of training"] = curves_figure(model, runs)
        lines = [line for line in document["table"] if line["model"] == model]
        if any(cell.get("median") for line in lines for name, cell in line["cells"].items() if name.endswith("_bytes")):
            figures[f"{model}: bytes of a step"] = bytes_figure(model, lines)
    return [_figure(title, figure) for title, figure in figures.items()]


def _figure(title: str, figure: Any) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="svg", facecolor="white", metadata={"Date": None})
    data = base64.b64encode(held.getvalue()).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>'

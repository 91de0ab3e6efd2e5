"""The page of an experiment: one HTML file with everything in it, readable in a light and in a dark browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from misa_engine.bench.presets import GIB
from misa_engine.report import html

Row = dict[str, Any]
HELD = {None: "not judged", True: '<span class="yes">holds</span>', False: '<span class="no">does not</span>'}


def page_of(document: Row) -> str:
    """The whole file."""
    where = document["environment"]
    tiny = document["scale"] == "tiny"
    parts = [
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
        html.section("Settings of the recipe", "settings", ("option", "value", "source"), [
            (f"<code>{escape(row['option'])}</code>", escape(json.dumps(row["value"])), escape(row["source"]))
            for row in document["hyperparameters"]
        ]),
        _runs(document["runs"]),
        html.section("Environment", "environment", ("what", "is"), [
            (name, f"<code>{escape(str(where[name]))}</code>")
            for name in ("command", "hardware", "python", "driver", "commit", "date") if where.get(name)
        ]),
        html.section("Packages", "packages", ("package", "version", "SHA-256 of RECORD"), [
            (escape(name), escape(one["version"]), f"<code>{one['sha256']}</code>")
            for name, one in document["packages"].items()
        ]),
    ]  # fmt: skip
    return html.page(document["title"], parts)


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
    return f'{html.table("results", headings, rows)}\n<p class="dim">{said}{notes}</p>'


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
    return html.section("What the paper claims, and what is here", "claims",
        ("claim", "model", "first", "second", "here", "source"), rows)  # fmt: skip


def _costs(costs: Sequence[Row]) -> str:
    rows = [
        (escape(cost["run"]), f"{cost['steps']:,}", f"{cost['gpu_hours']:.1f}",
         number("vram_bytes", cost["vram_bytes"]), escape(cost["how"]))
        for cost in costs
    ]  # fmt: skip
    return html.section("Cost, computed and not measured", "costs", ("run", "steps", "GPU-hours", "VRAM", "how"), rows)


def _runs(runs: Sequence[Row]) -> str:
    rows = []
    for run in runs:
        notes = "; ".join(filter(None, (run["source"], *run.get("notes", ()))))
        trained = f"{run['trained_parameters']:,}" if "trained_parameters" in run else "–"
        rows.append((escape(run["run"]), escape(run["status"]), f"{run['case_s']:.1f}" if run.get("case_s") else "–",
            f"{run['steps']:,}" if "steps" in run else "–", trained,
            f"<code>{run['base_digest']}</code>" if "base_digest" in run else "–",
            f"<code>{run['data_digest']}</code>" if "data_digest" in run else "–", escape(notes)))  # fmt: skip
    headings = ("run", "status", "s in all", "steps", "trained at first", "base", "held-out rows", "notes")
    return html.section("Runs", "runs", headings, rows)


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
    return [html.picture(title, figure) for title, figure in figures.items()]

"""The page of an evaluation: tables, a picture, answers side by side, and what the numbers depend on, in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from misa_engine.evaluation.results import PROTOCOLS, Evaluation, Result, less_is_better
from misa_engine.evaluation.tables import NOTES, lines_of
from misa_engine.report import html

PAGE = "index.html"
#: Answers of a task that are shown, and characters of each.
SHOWN, CHARACTERS = 12, 400
#: What a record of a generated answer carries.
ANSWERED = {"question", "target", "generated"}


def page_of(evaluation: Evaluation, command: str = "") -> str:
    """HTML without a link to anything outside.

    Args:
        evaluation: results and comparisons.
        command: the call that made it; empty leaves it out.
    """
    models = list(dict.fromkeys(result.model for result in evaluation.results))
    tasks = list(dict.fromkeys(result.task for result in evaluation.results))
    against = f" Differences are to {evaluation.reference}, item by item." if len(models) > 1 else ""
    parts = [f"<p>{escape(', '.join(models))}.{escape(against)}</p>"]
    for lines in lines_of(evaluation):
        rows = [[escape(cell) for cell in row] for rows in lines.tasks for row in rows]
        parts.append(f"<h2>{PROTOCOLS[lines.protocol]}</h2>")
        parts.append(html.table(lines.protocol, [escape(name) for name in lines.headings], rows))
        parts.append(f'<p class="dim">{NOTES[lines.protocol]}</p>' if lines.protocol in NOTES else "")
    parts.append(_picture(evaluation, models, tasks))
    parts += [_answers(evaluation, task) for task in tasks]
    parts.append(html.section("Settings", "settings", ("task", "settings"), _settings(evaluation, tasks)))
    parts.append(html.section("Models", "models", ("model", "from", "digest of its files"), _models(evaluation)))
    parts.append(html.section("Versions", "versions", ("package", "version"), _versions(evaluation)))
    parts.append(f"<h2>How it was made</h2>\n<pre>{escape(command)}</pre>" if command else "")
    return html.page(f"Evaluation: {', '.join(tasks)}", parts)


def _picture(evaluation: Evaluation, models: Sequence[str], tasks: Sequence[str]) -> str:
    """Each task's first metric with two standard errors to both sides; nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        return ""
    from misa_engine.report.figures import BLUE, new_figure

    figure = new_figure(10, 0.8 + (0.9 + 0.3 * len(models)) * len(tasks))
    for place, task in enumerate(tasks):
        results = _of(evaluation, task)
        metric = next(iter(results[0].metrics))
        having = [result for result in results if metric in result.metrics]
        found = [result.metrics[metric] for result in having]
        axes = figure.add_subplot(len(tasks), 1, place + 1)
        heights = range(len(found))[::-1]
        errors = [2 * (one.stderr or 0.0) for one in found]
        axes.errorbar([one.value for one in found], heights, xerr=errors, fmt="o", color=BLUE, capsize=3)
        axes.set_yticks(list(heights), [result.model for result in having])
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_title(f"{task}: {metric}{' (less is better)' if less_is_better(metric) else ''}", fontsize=10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    said = (
        '<p class="dim">Bars are two standard errors of a mean over items; for a difference read the paired ones.</p>'
    )
    return html.picture("Each model on each task", figure) + said


def _of(evaluation: Evaluation, task: str) -> list[Result]:
    """In the order of the models."""
    return [result for result in evaluation.results if result.task == task]


def _answers(evaluation: Evaluation, task: str) -> str:
    """What the models said to the same questions, those first on which they differ."""
    results = _of(evaluation, task)
    said = [{record.id: record for record in result.records} for result in results]
    metric = next(iter(results[0].metrics))
    asked = [
        record.id for record in results[0].records
        if all(record.id in one and one[record.id].detail.keys() >= ANSWERED for one in said)
    ]  # fmt: skip
    asked.sort(key=lambda id: len({one[id].metrics.get(metric) for one in said}) < 2)  # stable: else in order
    rows = []
    for id in asked[:SHOWN]:
        detail = said[0][id].detail
        row = [_short(detail["question"]), _short(detail["target"], from_end=True)]
        for one in said:
            right = one[id].metrics.get(metric) == 1.0
            mark = '<span class="yes">right</span>' if right else '<span class="no">wrong</span>'
            row.append(f"{mark}<br>{_short(one[id].detail['generated'])}")
        rows.append(row)
    if not rows:
        return ""
    headings = ("question", "target", *(escape(result.model) for result in results))
    made = html.section(f"Answers: {escape(task)}", f"answers-{escape(task)}", headings, rows)
    more = f"{len(rows)} of {len(asked)}, first those on which the models differ; all are in the files of records"
    return f'{made}\n<p class="dim">{more} beside this page.</p>'


def _short(text: Any, from_end: bool = False) -> str:
    """Escaped, and cut; the end is what a worked solution is told by."""
    text = str(text)
    if len(text) <= CHARACTERS:
        return escape(text)
    return "…" + escape(text[-CHARACTERS:]) if from_end else escape(text[:CHARACTERS]) + "…"


def _settings(evaluation: Evaluation, tasks: Sequence[str]) -> list[tuple[str, str]]:
    """A row for each task, and another where a model was asked otherwise."""
    told: dict[tuple[str, str], None] = {}
    for task in tasks:
        for result in _of(evaluation, task):
            words = json.dumps(dict(result.settings), ensure_ascii=False, sort_keys=True)
            told[escape(task), f"<code>{escape(words)}</code>"] = None
    return list(told)


def _models(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    made: dict[str, Result] = {}
    for result in evaluation.results:
        made.setdefault(result.model, result)
    return [
        (escape(label), f"<code>{escape(one.path)}</code>", f"<code>{escape(one.model_digest)}</code>")
        for label, one in made.items()
    ]


def _versions(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Of what the results were made with; a result of an earlier call may have had others."""
    told: dict[tuple[str, str], None] = {}
    for result in evaluation.results:
        for package, version in result.versions.items():
            told[escape(package), f"<code>{escape(version)}</code>"] = None
    return sorted(told)

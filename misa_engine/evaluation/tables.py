"""Tables of an evaluation, one for each protocol: numbers of two protocols are different quantities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from misa_engine.evaluation.results import PROTOCOLS, Evaluation, Result, less_is_better
from misa_engine.evaluation.statistics import Paired

if TYPE_CHECKING:
    from rich.table import Table

#: Below a table, where its numbers need a word.
NOTES = {
    "adapters": "answers in words, matched; not comparable with lm-eval's log-likelihood accuracies",
    "lm-eval": "acc and acc_norm compare log-likelihoods of given answers; not comparable with generated answers",
    "forgetting": "nats a token; the difference is the forgetting",
}
#: Columns that hold words.
WORDS = ("task", "metric", "model")


@dataclass(frozen=True)
class Lines:
    """What a protocol's table shows, as text, for a terminal and for a page."""

    protocol: str
    headings: tuple[str, ...]
    tasks: tuple[tuple[tuple[str, ...], ...], ...]
    """For each task its rows; a row names task and metric only where they begin."""


def lines_of(evaluation: Evaluation) -> list[Lines]:
    """A table for each protocol that occurs: a row for each task, metric and model, with the paired difference."""
    return [_lines(evaluation, protocol) for protocol in PROTOCOLS if _of(evaluation, protocol)]


def tables(evaluation: Evaluation) -> list[Table]:
    """The same for a terminal."""
    return [_table(lines, evaluation.reference) for lines in lines_of(evaluation)]


def _table(lines: Lines, reference: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=PROTOCOLS[lines.protocol], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                  caption=NOTES.get(lines.protocol), caption_justify="left")  # fmt: skip
    for name in lines.headings:
        if name in WORDS:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=name != f"− {reference}")
    for rows in lines.tasks:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _of(evaluation: Evaluation, protocol: str) -> list[Result]:
    return [result for result in evaluation.results if result.protocol == protocol]


def _lines(evaluation: Evaluation, protocol: str) -> Lines:
    results = _of(evaluation, protocol)
    several = len({result.model for result in results}) > 1
    compared = (f"− {evaluation.reference}", "± se", "won–lost", "p") if several else ()
    tasks = []
    for task in dict.fromkeys(result.task for result in results):
        ours = [result for result in results if result.task == task]
        rows = []
        for metric in dict.fromkeys(name for result in ours for name in result.metrics):
            for place, result in enumerate(one for one in ours if metric in one.metrics):
                found = result.metrics[metric]
                head = (task, metric + (" ↓" if less_is_better(metric) else "")) if not place else ("", "")
                cells = (result.model, f"{found.value:.4f}", _error(found.stderr), str(found.n))
                difference = evaluation.against_reference(result.model, task, metric)
                rows.append((*head, *cells, *(_difference(difference, metric) if several else ())))
        tasks.append(tuple(rows))
    return Lines(protocol, (*WORDS, "value", "± se", "n", *compared), tuple(tasks))


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _difference(found: Paired | None, metric: str) -> tuple[str, str, str, str]:
    if found is None:
        return ("", "", "", "")
    p = "" if found.p_value is None else f"{found.p_value:.3f}"
    won, lost = (found.losses, found.wins) if less_is_better(metric) else (found.wins, found.losses)
    return (f"{found.difference:+.4f}", _error(found.stderr), f"{won}–{lost}", p)

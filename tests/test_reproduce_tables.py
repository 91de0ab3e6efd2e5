"""Tables and claims of ``misa reproduce``: our numbers beside the paper's."""

import pytest

from misa_engine.bench.reproduce import results
from misa_engine.bench.reproduce.experiments import runs_of
from misa_engine.bench.reproduce.paper import Claim
from reproducing import fake


def test_the_table_shows_medians_ranges_and_the_papers_numbers():
    runs = runs_of("math", "llama3-8b MISA δ 3%")
    rows = {run.name: fake(run, gsm8k=70.0 + run.seed**2) for run in runs}
    (line,) = results.table_of("math", runs, rows, {})
    cell = line["cells"]["gsm8k"]
    assert (cell["least"], cell["median"], cell["most"]) == (70.0, 71.0, 74.0) and line["seeds"] == 3
    assert cell["paper"] == 71.3 and cell["source"] == "arXiv 2511.00056, Table 4"
    assert line["cells"]["average"] == {"paper": 73.6, "source": "arXiv 2511.00056, Table 4"}
    assert line["cells"]["heldout_loss"] == {}
    rows[runs[1].name] = {"case": runs[1].name, "kind": "reproduce", "status": "failed: RuntimeError"}
    (line,) = results.table_of("math", runs, rows, {})
    assert line["seeds"] == 2 and line["cells"]["gsm8k"]["median"] == 72.0


def test_losses_are_compared_when_the_fastest_run_has_ended():
    runs = [run for run in runs_of("figure-3", "tinyllama") if run.seed == 0 and run.entry.label in ("MISA", "LISA")]
    rows = {runs[0].name: fake(runs[0], heldout_loss=2.0, seconds=10.0)}
    rows[runs[1].name] = fake(runs[1], heldout_loss=1.0, seconds=20.0)
    results.add_loss_at_time(runs, rows)
    found = [rows[run.name]["reproduce"]["metrics"]["loss_at_time"] for run in runs]
    assert found == [2.0, 2.5]  # of the second at 10 of its 20 s: half of the way from 4 to 1


@pytest.mark.parametrize(("ours", "theirs", "close", "holds"), ((20.0, 21.0, 0, True), (21.0, 20.0, 0, False),
    (20.4, 20.0, 0.03, True), (21.0, 20.0, 0.03, False), (None, 20.0, 0, None)))  # fmt: skip
def test_claims_are_judged_by_our_numbers(ours, theirs, close, holds):
    claim = Claim(experiment="c4-350m", model="", better="MISA", worse="Adam", metric="perplexity", source="s",
        close=close)  # fmt: skip
    table = [
        {"model": "m", "label": label, "cells": {"perplexity": {"median": value} if value else {}}}
        for label, value in (("MISA", ours), ("Adam", theirs))
    ]
    assert results.checked(claim, table, "paper")["found"][0]["holds"] is holds
    assert results.checked(claim, table, "tiny")["found"][0]["holds"] is None

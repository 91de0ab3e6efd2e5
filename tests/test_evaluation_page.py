"""The page of an evaluation: the tables of the terminal, answers side by side, and nothing loaded from anywhere."""

import re
from dataclasses import replace

import pytest

from evaluation_cases import adapters_data, scripted
from misa_engine.cli import evaluate as command
from misa_engine.evaluation import Settings, evaluate
from misa_engine.evaluation.page import SHOWN, page_of
from misa_engine.evaluation.tables import lines_of
from pages import Page

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'misa_engine[train]'")
TASKS = ("adapters:boolq", "adapters:gsm8k")


def told(prompt):
    return "<b>true</b> & 72" if "water" in prompt else "no idea"


def right(prompt):
    return "true" if "water" in prompt else "false"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    settings = Settings(data=adapters_data(folder / "data", ("boolq", "gsm8k")))
    return evaluate([scripted("one <1>", told), scripted("two", right)], TASKS, folder / "out",
        settings=settings, command="misa eval 'one <1>'", say=str)  # fmt: skip


def test_the_page_is_written_beside_the_results_and_is_the_same_for_the_same_results(evaluation):
    written = (evaluation.output / "index.html").read_text()
    assert written == page_of(evaluation, "misa eval 'one <1>'")


def test_the_page_loads_nothing_and_shows_the_terminals_numbers(evaluation):
    page = Page(page_of(evaluation))
    assert page.open == [] and len(page.loads) == 1 and page.loads[0].startswith("data:image/svg+xml;base64,")
    (lines,) = lines_of(evaluation)
    assert page.tables["adapters"] == [list(lines.headings), *(list(row) for rows in lines.tasks for row in rows)]
    assert "not comparable with lm-eval" in page.text


def test_answers_stand_side_by_side_and_those_that_differ_come_first(evaluation):
    page = Page(page_of(evaluation))
    head, first, second = page.tables["answers-adapters:boolq"]
    assert head[2:] == ["one <1>", "two"]
    assert "ice" in first[0] and first[2:] == ["wrongno idea", "rightfalse"]
    assert "water" in second[0] and second[2:] == ["right<b>true</b> & 72", "righttrue"]  # said is text, not HTML


def test_many_answers_are_cut_and_the_rest_is_named(evaluation):
    boolq = [one for one in evaluation.results if one.task == "adapters:boolq"]
    many = [
        replace(one, records=tuple(replace(one.records[0], id=str(number), metrics={"accuracy": float(number == 19 and
            one.model == "two")}) for number in range(20))) for one in boolq
    ]  # fmt: skip
    page = Page(page_of(replace(evaluation, results=tuple(many), comparisons=())))
    rows = page.tables["answers-adapters:boolq"][1:]
    assert len(rows) == SHOWN and f"{SHOWN} of 20" in page.text
    assert rows[0][2].startswith("wrong") and rows[0][3].startswith("right")


def test_settings_models_and_versions_are_on_the_page(evaluation):
    page = Page(page_of(evaluation, "misa eval 'one <1>'"))
    assert [row[0] for row in page.tables["settings"][1:]] == list(TASKS)
    assert "data_sha256" in page.tables["settings"][1][1]
    assert [row[0] for row in page.tables["models"][1:]] == ["one <1>", "two"]
    assert {"torch", "transformers"} <= {row[0] for row in page.tables["versions"][1:]}
    assert "misa eval 'one <1>'" in page.text and "How it was made" not in Page(page_of(evaluation)).text


def test_the_command_says_where_the_page_is(evaluation, capsys):
    command.show(evaluation)
    assert re.search(r"^page: \S+index\.html$", capsys.readouterr().out, re.MULTILINE)

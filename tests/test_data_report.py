"""The data report of ``misa train``: what came in, what was dropped and why, what is cut and what is in the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import make_workplace, words
from misa_engine.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("cache"))


def write(place: Path, *records: dict[str, str]) -> Path:
    file = place / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("dry", [["--dry_run"], []])
def test_records_that_cannot_be_learned_from_are_counted_and_shown(place, tmp_path, capsys, dry):
    records = [
        *({"prompt": "ab ", "completion": "cdef"} for _ in range(5)),  # 3 + 4 bytes and an end
        *({"prompt": "x" * 40, "completion": "y"} for _ in range(3)),
        {"prompt": "ab ", "completion": "z" * 100},
    ]
    data = write(tmp_path, *records)
    assert main(words(place, tmp_path / "out", *dry, dataset=data, max_length=32)) == 0
    shown = capsys.readouterr().out
    assert "training data: 9 records in, 6 trained on" in shown
    assert "dropped: 3 whose tokens to predict all lie beyond max_length=32" in shown
    assert "truncated to max_length=32: 1 (17%)" in shown
    assert "tokens a record: 1-32: 5; 33-64: 3; 65-128: 1" in shown
    assert "tokens in the loss: 54 of 72 (75%)" in shown  # 5 x 5 of 8, 29 of 32
    assert "ab [cdef" in shown
    assert (tmp_path / "out").exists() is not bool(dry)


def test_empty_texts_are_dropped_and_said(place, tmp_path, capsys):
    data = write(tmp_path, {"text": "abcdef"}, {"text": ""}, {"text": "ghi"})
    assert main(words(place, tmp_path / "out", dataset=data)) == 0
    shown = capsys.readouterr().out
    assert "3 records in, 2 trained on" in shown and "dropped: 1 without a token to predict (empty" in shown


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": ""}, "of 4 records 4 have nothing to predict"),
        (
            {"prompt": "x" * 40, "completion": "y"},
            "with max_length=16, of 4 records 0 have nothing to predict and 4 only beyond it",
        ),
    ],
)
@pytest.mark.parametrize("dry", [["--dry_run"], []])
def test_nothing_left_to_learn_is_an_error(place, tmp_path, capsys, record, text, dry):
    data = write(tmp_path, *[record] * 4)
    assert main(words(place, tmp_path / "out", *dry, dataset=data, max_length=16)) == 2
    error = capsys.readouterr().err
    assert error.startswith("misa: error: no sample of the training data is left") and text in error


def test_evaluation_data_has_a_report_of_its_own(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", "--dry_run", eval_fraction=0.25)) == 0
    shown = capsys.readouterr().out
    assert "training data: 18 records in, 18 trained on" in shown
    assert "evaluation data: 6 records in, 6 evaluated on" in shown


@pytest.mark.parametrize("max_length", [128, 24])  # whole, and cut
def test_completion_only_loss_false_trains_on_prompts_too(place, tmp_path, capsys, max_length):
    more = {"completion_only_loss": "false", "max_length": max_length}
    assert main(words(place, tmp_path / "out", **more)) == 0
    shown = capsys.readouterr().out
    assert "24 records in, 24 trained on" in shown
    predicted = shown.split("tokens in the loss: ")[1].split(" (")[0].replace(",", "").split(" of ")
    assert int(predicted[0]) == int(predicted[1]) - 24  # all but the first of each


def test_packed_records_are_not_cut(place, tmp_path, capsys):
    data = write(tmp_path, {"text": "the quick brown fox jumps over a dog " * 3}, {"text": "and back again"})
    assert main(words(place, tmp_path / "out", "--dry_run", dataset=data, packing="true", max_length=16)) == 0
    shown = capsys.readouterr().out
    assert "2 records in, 2 trained on" in shown and "truncated" not in shown

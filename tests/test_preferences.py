"""``misa train --objective dpo`` and ``misa data``: preferences are trained on, counted and never lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command import make_workplace, words
from misa_engine.cli.main import main
from misa_engine.cli.model_card import is_ours
from misa_engine.report.log import RunLog

pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [{"prompt": f"what {i}? ", "chosen": f"it is {i}", "rejected": f"no idea {i % 3}"} for i in range(8)]
SAME = {"prompt": "q ", "chosen": "same", "rejected": "same"}
LONG = {"prompt": "x" * 90, "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_workplace(tmp_path_factory.mktemp("pairs"), tmp_path_factory.mktemp("cache"))
    (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*PAIRS, SAME, LONG]))
    return place


def dpo(place: Path, out: Path, *more: str, **options: object) -> list[str]:
    options = {"dataset": place / "pairs.jsonl", "objective": "dpo", "max_length": 64, **options}
    return words(place, out, *more, **options)


def test_preferences_train_and_the_margin_grows(place, tmp_path, capsys):
    from safetensors.torch import load_file

    assert main(dpo(place, tmp_path / "out", max_steps=8, eval_fraction=0.2)) == 0
    shown = capsys.readouterr().out
    assert "training data: 8 preferences in, " in shown and "evaluation data: 2 preferences in, " in shown
    logged = [entry for entry in RunLog.read(tmp_path / "out") if "rewards/margins" in entry]
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the model is its own reference at first
    assert logged[-1]["loss"] < logged[0]["loss"] and logged[-1]["rewards/margins"] > 0
    before, after = load_file(place / "model/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert is_ours(tmp_path / "out" / "README.md")


def test_a_resumed_run_keeps_the_reference_of_its_beginning(place, tmp_path, capsys):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    assert main(dpo(place, tmp_path / "whole", **options)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = dpo(place, tmp_path / "again", **options, resume_from_checkpoint=checkpoint)
    assert main(again) == 0

    def losses(out):
        return {entry["step"]: entry["loss"] for entry in RunLog.read(out) if "loss" in entry}

    assert losses(tmp_path / "again")[5] == losses(tmp_path / "whole")[5]


@pytest.mark.parametrize("command", ["data", "dry"])
def test_what_is_dropped_is_counted_with_the_reason(place, tmp_path, capsys, command):
    if command == "data":
        given = ["data", str(place / "pairs.jsonl"), "--model", str(place / "model")]
        assert main([*given, "--objective", "dpo", "--max_length", "32"]) == 0
    else:
        assert main(dpo(place, tmp_path / "out", "--dry_run", max_length=32)) == 0
    shown = capsys.readouterr().out
    assert "training data: 10 preferences in, 8 trained on" in shown
    assert "dropped: 1 whose chosen and rejected answers are the same" in shown
    assert "dropped: 1 whose prompt alone fills max_length=32" in shown
    assert "what 0?  chosen [it is 0</s>] rejected [no idea 0</s>]" in shown
    assert not (tmp_path / "out").exists()


REFUSED = {
    "unknown objective": ("--objective is one of sft, dpo; got 'ppo'", {"objective": "ppo"}),
    "packing": ("--packing is for --objective sft", {"packing": "true"}),
    "beta of sft": ("--beta is for --objective dpo", {"objective": "sft", "beta": 0.2}),
    "planned memory": ("sequences", {"max_vram_gb": 1}),
    "odd option": ("'bta' is no option of DPO alone. Did you mean beta?", {"dpo_options": '{"bta": 1}'}),
    "option of ours": ("Give it as an option of its own", {"dpo_options": '{"learning_rate": 1}'}),
    "no preferences": ("--objective dpo needs 'chosen' and 'rejected'", {"dataset": "{place}/data.jsonl"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_dpo_cannot_do_is_refused_in_one_line(name, place, tmp_path, capsys):
    text, options = REFUSED[name]
    options = {key: str(value).replace("{place}", str(place)) for key, value in options.items()}
    assert main(dpo(place, tmp_path / "out", **options)) == 2
    shown = capsys.readouterr().err
    assert text in shown and len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_options_of_dpo_reach_the_trainer(place, tmp_path, capsys):
    given = {"dpo_options": '{"loss_type": ["ipo"]}', "beta": 0.5, "max_steps": 1}
    assert main(dpo(place, tmp_path / "out", **given)) == 0
    first = next(entry["loss"] for entry in RunLog.read(tmp_path / "out") if "loss" in entry)
    assert first == pytest.approx(1.0)  # (0 - 1 / (2 beta))^2


def test_misa_data_counts_texts_without_the_weights(place, tmp_path, capsys):
    (place / "model" / "model.safetensors").rename(place / "weights.aside")
    try:
        given = ["data", str(place / "data.jsonl"), str(place / "data.jsonl"), "--model", str(place / "model")]
        assert main([*given, "--dataset_weights", "2", "0.5", "--max_length", "30"]) == 0
    finally:
        (place / "weights.aside").rename(place / "model" / "model.safetensors")
    shown = capsys.readouterr().out
    assert "24 records x 2 = 48" in shown and "24 records x 0.5 = 12, 12 are left out" in shown
    assert "training data: 60 records in, 60 trained on" in shown and "truncated to max_length=30" in shown


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "needs a file"),
        (["{place}/data.jsonl"], "needs --model"),
        (["--model", "{place}/model"], "needs a file"),
        (["nothing.jsonl", "--model", "{place}/model"], "does not exist"),
    ],
)
def test_misa_data_says_what_it_needs(place, capsys, given, text):
    assert main(["data", *(word.replace("{place}", str(place)) for word in given)]) == 2
    assert text in capsys.readouterr().err


def test_a_repeated_data_set_is_used_and_the_same_in_yaml(place, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"prompt": "p ", "completion": "c"}) + "\n")
    assert main(words(place, tmp_path / "out", "--dry_run", "--dataset", str(more))) == 0
    shown = capsys.readouterr().out
    assert "more.jsonl: 1 records" in shown and "training data: 25 records in" in shown
    (tmp_path / "run.yaml").write_text(json.dumps({"dataset": [str(place / "data.jsonl"), str(more)]}))
    given = words(place, tmp_path / "out", "--dry_run", "--config", str(tmp_path / "run.yaml"), dataset=None)
    assert main(given) == 0
    assert "training data: 25 records in" in capsys.readouterr().out

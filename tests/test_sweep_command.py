"""``misa sweep`` as it is typed: a real trial, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from misa_engine.cli.main import main
from sweep_studies import results

pytest_plugins = ["cli_place", "sweep_studies"]
pytestmark = pytest.mark.usefixtures("quick")


def test_trials_of_the_command_are_runs_of_misa_train(config: Path, tmp_path: Path, capsys) -> None:
    """The whole, with a real trial; what is best trains when it is given back."""
    out = tmp_path / "s"
    words = ["sweep", "--config", str(config), "--output", str(out), "--trials", "1", "--learning_rate", "1e-4"]
    assert main([*words, "--space", "eta=0.5,1", "--space", "batch=2,4"]) == 0
    shown = capsys.readouterr().out
    assert "trial 0: eta 1, batch 2" in shown and "best settings" in shown
    (row,) = results(out)["trials"]
    assert row["state"] == "complete" and [step for step, _ in row["losses"]] == [1, 2], (
        out / "trials/0000/output.txt"
    ).read_text()
    run = out / "trials" / "0000" / "run"
    assert (run / "model.safetensors").is_file() and not list(run.glob("checkpoint-*"))
    from misa_engine.cli.arguments import parse_train

    parsed = parse_train([], str(out / "best.yaml"))
    assert parsed.misa.eta == 1.0 and parsed.sft.learning_rate == 1e-4 and parsed.sft.gradient_accumulation_steps == 1
    assert main([*words, "--space", "eta=0.1,1", "--space", "batch=2,4"]) == 2
    assert "holds a study of other settings (eta=0.5,1, now eta=0.1,1)" in capsys.readouterr().err
    assert main([*words, "--space", "eta=0.5,1", "--space", "batch=2,4", "--max_steps", "3"]) == 2
    assert "(max_steps 2, now 3)" in capsys.readouterr().err


BAD: dict[str, tuple[str, list[str]]] = {
    "no output": ("misa sweep needs --output", ["no output"]),
    "misspelt option of ours": ("Did you mean --trials?", ["--trails", "4"]),
    "misspelt option of misa train": ("Did you mean --max_steps?", ["--max_stebs", "4"]),
    "unknown option in the space": ("Did you mean inner_steps?", ["--space", "inner_step=1,2"]),
    "the space holds what makes runs differ": ("is the same in all trials", ["--space", "dataset=a,b"]),
    "no range of the paper": ("the paper searches learning_rate, eta", ["--space", "weight_decay"]),
    "one value": ("needs two or more different values", ["--space", "eta=0.1"]),
    "backwards": ("the lower end comes first", ["--space", "eta=1..0.1"]),
    "no numbers": ("LOW..HIGH needs two numbers", ["--space", "eta=a..b"]),
    "no such scale": ("log or linear", ["--space", "eta=0.1..1:cubic"]),
    "logarithm of nothing": ("begins above 0", ["--space", "eta=0..1:log"]),
    "twice": ("names eta twice", ["--space", "eta", "--space", "eta=1,2"]),
    "misa train would refuse it": ("--space delta: ", ["--space", "delta=0.1..7"]),
    "a word for a number": ("--space eta: ", ["--space", "eta=0.5,warm"]),
    "batch is no multiple": ("a batch is a multiple of per_device_train_batch_size, here 2", ["--space", "batch=2,5"]),
    "both ways to a batch": (
        "search one of them",
        ["--space", "batch=2,4", "--space", "gradient_accumulation_steps=1,2"],
    ),
    "space file missing": ("cannot be read", ["--space", "nothing.yaml"]),
    "unknown objective": ("--objective loss: eval_loss, or task:NAME", ["--objective", "loss"]),
    "data of a task without one": ("belong to --objective task:NAME", ["--task_limit", "5"]),
    "unknown pruner": ("Did you mean median?", ["--pruner", "medain"]),
    "unknown keep": ("Did you mean best?", ["--keep", "bets"]),
    "no trials": ("at least 1", ["--trials", "0"]),
    "a run to go on with": ("--resume_from_checkpoint is about one run", ["--resume_from_checkpoint", "true"]),
    "no held-out data": ("no evaluation data: add --eval_fraction", ["--config", "{bare}"]),
    "no such recipe": ("neither a file nor a recipe", ["--config", "llama-9-nothing"]),
    "not a study": ("holds something that is no study", ["--output", "{place}"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_sweep_is_one_line_and_nothing_is_written(
    name: str, config: Path, workplace: Path, tmp_path: Path, capsys
) -> None:
    expected, more = BAD[name]
    bare = tmp_path / "bare.yaml"
    bare.write_text("model: m\ndataset: d.jsonl\n")
    more = [word.format(bare=bare, place=workplace) for word in more]
    words = {"--config": str(config), "--output": str(tmp_path / "s"), "--trials": "1"}
    words = {flag: value for flag, value in words.items() if flag not in more}
    if more == ["no output"]:
        del words["--output"], more[:]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["sweep", *(word for pair in words.items() for word in pair), *more]) == 2
    shown = capsys.readouterr().err
    assert expected in shown and len(shown.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_missing_is_named_with_its_remedy(
    config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from misa_engine.sweep import command, objective

    words = ["sweep", "--config", str(config), "--output", str(tmp_path / "s"), "--trials", "1"]
    monkeypatch.setattr(objective, "find_spec", lambda name: None)
    assert main([*words, "--objective", "task:gsm8k"]) == 2
    assert "has no misa eval" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "optuna" else object())
    assert main(words) == 2
    assert "pip install 'misa_engine[sweep]'" in capsys.readouterr().err

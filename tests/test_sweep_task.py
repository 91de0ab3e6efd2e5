"""``misa sweep --objective task:NAME``: what is asked of misa eval, and a real evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from evaluation_cases import adapters_data
from misa_engine.errors import UserError
from misa_engine.sweep.command import sweep
from misa_engine.sweep.evaluating import evaluate, value_of
from misa_engine.sweep.objective import Objective, check_evaluable, parse_objective
from sweep_studies import LAUNCH, results, settings

pytest_plugins = ["cli_place", "sweep_studies"]
pytestmark = pytest.mark.usefixtures("quick")


def test_a_task_as_objective_rises_and_its_failures_are_recorded(tmp_path: Path) -> None:
    about = settings(objective=Objective("gsm8k"), start={"learning_rate": 1e-4, "eta": 0.1})
    sweep(about, tmp_path / "a", 3, launch=LAUNCH)
    document = results(tmp_path / "a")
    values = [row["value"] for row in document["trials"]]
    assert document["direction"] == "maximize" and document["best"]["value"] == max(values) == values[0]
    sweep(settings(objective=Objective("broken")), tmp_path / "b", 1, launch=LAUNCH)
    (row,) = results(tmp_path / "b")["trials"]
    assert row["state"] == "failed" and "misa eval ended with exit code 1: misa: failed: no such data" in row["reason"]
    sweep(settings(objective=Objective("falls")), tmp_path / "c", 1, launch=LAUNCH)
    (row,) = results(tmp_path / "c")["trials"]
    assert "word_perplexity of falls does not go the way of task:falls" in row["reason"]
    assert Objective("forgetting").direction == "minimize" and Objective("a").intermediate(2.0) == -2.0
    assert Objective("a", "d", 5).words == ["--tasks", "a", "--data", "d", "--limit", "5"]


def test_names_and_results_are_those_of_misa_eval() -> None:
    evaluation = pytest.importorskip("misa_engine.evaluation", reason="this misa_engine has no misa eval")
    assert parse_objective("task:adapters:gsm8k", limit=5) == Objective("adapters:gsm8k", limit=5)
    with pytest.raises(UserError, match="Did you mean adapters:gsm8k?"):
        parse_objective("task:adapters:gsm8")

    def document(metric: str, **values: float) -> dict[str, Any]:
        made = []
        for task, value in values.items():
            metrics = {metric: evaluation.Estimate(value, 0.1, 4)}
            made.append(evaluation.Result(task, "p", "m", "path", "d", metrics, {}, {}, "k", 1, 1.0))
        return json.loads(json.dumps(evaluation.Evaluation(tuple(made), (), "m", Path()).to_dict()))

    assert value_of(document("accuracy", gsm8k=0.25, svamp=0.75), Objective("adapters:math")) == 0.5
    assert value_of(document("loss", forgetting=2.5), Objective("forgetting")) == 2.5
    both = document("loss", forgetting=2.5)
    both["results"].append({**both["results"][0], "model": "trained", "metrics": {"loss": {"value": 2.75}}})
    assert value_of(both, Objective("forgetting")) == 2.75, "the base's own result is what it is compared with"


def test_what_a_task_needs_is_looked_at_before_the_first_trial(tmp_path: Path, workplace: Path) -> None:
    base = {"model_name_or_path": str(workplace / "model")}
    check_evaluable(Objective(), {})
    check_evaluable(Objective("forgetting"), base)
    with pytest.raises(UserError, match="LLM-Adapters"):
        check_evaluable(Objective("adapters:boolq", str(tmp_path)), base)
    with pytest.raises(UserError, match="not --from_scratch"):
        check_evaluable(Objective("forgetting"), {**base, "from_scratch": True})
    launch = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(1)"]
    evaluate(tmp_path, Objective("forgetting"), tmp_path, launch, base="start")
    assert "'--base', 'start'" in (tmp_path / "eval.txt").read_text()


def test_a_trained_model_is_really_evaluated(tmp_path: Path, workplace: Path) -> None:
    """misa eval itself, in a process of its own, on real-shaped records of LLM-Adapters."""
    data = adapters_data(tmp_path / "data", ("boolq",))
    objective = parse_objective("task:adapters:boolq", str(data), 2)
    launch = [sys.executable, "-m", "misa_engine"]
    found = evaluate(workplace / "model", objective, tmp_path, launch)
    document = json.loads((tmp_path / "eval/results.json").read_text())
    (result,) = document["results"]
    assert isinstance(found, float), (tmp_path / "eval.txt").read_text()
    assert found == result["metrics"]["accuracy"]["value"] and result["metrics"]["accuracy"]["n"] == 2
    assert result["task"] == "adapters:boolq" and result["settings"]["limit"] == 2


@pytest.mark.soak
@pytest.mark.parametrize("task", ["adapters:boolq", "forgetting"])
def test_a_sweep_over_a_task_from_end_to_end(task: str, config: Path, tmp_path: Path) -> None:
    """Real trials, real evaluations, by the command: the best is the best, and the same words go on."""
    data, out = adapters_data(tmp_path / "data", ("boolq",)), tmp_path / "s"
    words = [sys.executable, "-m", "misa_engine", "sweep", "--config", str(config), "--output", str(out)]
    words += ["--objective", f"task:{task}", "--task_data", str(data), "--task_limit", "2", "--space", "eta=0.5,1"]
    for trials in (2, 3):
        done = subprocess.run([*words, "--trials", str(trials)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = results(out)["trials"]
        assert [row["state"] for row in rows] == ["complete"] * trials, rows
    better = min if task == "forgetting" else max
    assert results(out)["best"]["value"] == better(row["value"] for row in rows)
    kept = [path.parent.parent.name for path in out.glob("trials/*/run/model.safetensors")]
    assert kept == [f"{results(out)['best']['trial']:04}"] and (out / "index.html").is_file()

"""``misa sweep``: the study, its processes, what is refused. Trials are stand-ins for misa train but in one test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.sweep import page as pages
from misa_engine.sweep import study as studies
from misa_engine.sweep import trial as trials
from misa_engine.sweep.command import sweep
from misa_engine.sweep.evaluating import evaluate, value_of
from misa_engine.sweep.objective import Objective, check_evaluable, parse_objective
from misa_engine.sweep.settings import Settings
from misa_engine.sweep.space import PAPER, Dimension, parse_space
from pages import Page

pytest_plugins = ["cli_place"]

LAUNCH = [sys.executable, "-S", "-E", str(Path(__file__).with_name("sweep_trainer.py"))]
RATE = Dimension("learning_rate", 1e-6, 1e-3, log=True)
ETA = Dimension("eta", choices=(0.1, 0.5, 1.0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Stand-ins end in a moment, so they are looked at more often; pictures are drawn where they are looked at."""
    monkeypatch.setattr(trials, "EVERY", 0.02)
    if "page" not in request.node.name:
        monkeypatch.setattr(pages, "_pictures", lambda document: {})


def settings(*space: Dimension, **options: Any) -> Settings:
    base = {"model_name_or_path": "m", "dataset": ["d.jsonl"], "eval_fraction": 0.1, "learning_rate": 1e-4}
    values = {"objective": Objective(), "micro_batch": 8, "pruner": "none", **options}
    return Settings(base={**base, **values.pop("base", {})}, space=space or (RATE, ETA), **values)


def results(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())


def states(directory: Path) -> list[str]:
    return [row["state"] for row in results(directory)["trials"]]


# ---- what a study does ----


def test_a_study_finds_the_best_settings_and_goes_on_where_it_ended(tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    about = settings(start={"learning_rate": 1e-4, "eta": 1.0})
    assert sweep(about, out, 4, launch=LAUNCH, typed="misa sweep --trials 5") == 0
    first = results(out)
    assert states(out) == ["complete"] * 4
    assert first["trials"][0]["values"] == {"learning_rate": 1e-4, "eta": 1.0}, "the configuration as it is comes first"
    assert first["importance"] == {} and "4 complete trials" in first["importance_remark"]
    assert sweep(about, out, 11, launch=LAUNCH) == 0
    assert "goes on: 4 of 11 trials are there" in capsys.readouterr().out
    document = results(out)
    assert document["trials"][:4] == first["trials"] and len(document["trials"]) == 11
    values = [row["value"] for row in document["trials"]]
    best = document["best"]
    assert best["value"] == min(values) and document["trials"][best["trial"]]["value"] == best["value"]
    assert set(document["importance"]) == {"learning_rate", "eta"}
    assert sum(document["importance"].values()) == pytest.approx(1, abs=1e-3)
    assert document["importance"]["learning_rate"] > document["importance"]["eta"], "one moves the loss 20 times more"
    assert document["trials"][0]["peak_memory_bytes"] == 2**30 and document["trials"][0]["losses"][-1][0] == 30

    weights = sorted(path.parts[-3] for path in (out / "trials").rglob("model.safetensors"))
    assert weights == [f"{best['trial']:04}"], "only the best trial keeps its weights"

    settled = yaml.safe_load((out / "best.yaml").read_text())
    assert settled["learning_rate"] == best["values"]["learning_rate"] and settled["eta"] == best["values"]["eta"]
    assert settled["dataset"] == ["d.jsonl"] and settled["output_dir"] == str(out / "best")
    assert sweep(about, out, 11, launch=LAUNCH) == 0 and len(results(out)["trials"]) == 11


def test_the_page_needs_no_other_file_and_shows_every_trial(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    about = settings(base={"seed": 3, "dataset": ["<data>&.jsonl"]})
    sweep(settings(), tmp_path / "a", 6, launch=LAUNCH, typed="misa sweep --output 'a b'")
    page = (tmp_path / "a" / "index.html").read_text()
    read = Page(page)
    assert read.open == [] and [load.partition(",")[0] for load in read.loads] == 4 * ["data:image/svg+xml;base64"]
    document = results(tmp_path / "a")
    assert len(read.tables["trials"]) == 1 + 6 and page.count('<tr class="best">') == 1
    assert {"best", "importance", "trials", "searched", "environment"} == set(read.tables)
    assert f"{document['best']['value']:.4f}" in page and "misa sweep --output &#x27;a b&#x27;" in page
    for name in ("torch", "optuna"):
        assert document["environment"][name] in page
    table = (tmp_path / "a" / "results.md").read_text()
    assert all(f"| {row['trial']} | " in table for row in document["trials"])

    sweep(about, tmp_path / "b", 1, launch=LAUNCH)
    page = (tmp_path / "b" / "index.html").read_text()
    assert "&lt;data&gt;&amp;.jsonl" in page and "no trial is complete" in page
    assert not (tmp_path / "b" / "best.yaml").exists()


FAILURES = {
    1: "exit code 2: misa: error: delta is too small",
    2: "out of memory: misa: failed: the GPU is out of memory",
    3: "diverged: the held-out loss at step 18 is not a number",
    4: "killed by SIGKILL (the system may have run out of memory)",
}


def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_study_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    about = settings(Dimension("seed", choices=(0, *FAILURES)), base={"learning_rate": 1e-4})
    found = studies.Sweep(out, about, launch=LAUNCH)
    for seed in (*FAILURES, 0):
        found.study.enqueue_trial({"seed": seed})
    found.work(5)
    *failed, last = found.study.trials
    assert [trial.state.name for trial in failed] == ["FAIL"] * 4 and last.state.name == "COMPLETE"
    for trial, reason in zip(failed, FAILURES.values(), strict=True):
        assert trial.user_attrs["reason"].startswith(reason)
        assert not list((out / "trials" / f"{trial.number:04}").rglob("*.safetensors"))


def test_a_study_whose_trials_are_all_refused_stops_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="first 3 trials were all refused by misa train; the last: exit code 2: .*too small"
    ):
        sweep(settings(base={"seed": 1}), tmp_path / "s", 20, launch=LAUNCH)
    assert states(tmp_path / "s") == ["failed"] * 3


def test_runs_that_fall_behind_are_ended_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_PAUSE", "0.06")
    rates = tuple(1e-4 * 10**-power for power in (0, 0.1, 0.2, 0.3))
    good = Dimension("learning_rate", choices=(*rates, 1e-9))
    about = settings(good, pruner="median")
    out = tmp_path / "s"
    out.mkdir()
    found = studies.Sweep(out, about, launch=LAUNCH)
    for rate in (*rates, 1e-9):  # the worst comes when four are there to compare it with
        found.study.enqueue_trial({"learning_rate": rate})
    found.work(5)
    last = found.study.trials[4]
    assert last.state.name == "PRUNED" and last.user_attrs["reason"].startswith("fell behind: held-out loss")
    assert 2 <= len(last.user_attrs["losses"]) < 10
    assert [trial.state.name for trial in found.study.trials[:4]] == ["COMPLETE"] * 4


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


# ---- several processes, and kills ----

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sweep import LAUNCH, RATE, settings
from misa_engine.sweep.command import sweep
sys.exit(sweep(settings(RATE, base={{"seed": int(sys.argv[3])}}), Path(sys.argv[1]), int(sys.argv[2]), launch=LAUNCH))
"""


def start(out: Path, trials: int, seed: int = 0) -> subprocess.Popen[str]:
    code = WORKER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(out), str(trials), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)


def test_two_processes_share_a_study_and_a_killed_one_costs_its_trial_only(tmp_path: Path) -> None:
    """Both wait in their trials, which so run at the same time; one is killed with SIGKILL, then all goes on."""
    out = tmp_path / "s"
    folders = [out / "trials" / f"{number:04}" for number in range(2)]
    processes = [start(out, 4, seed=5) for _ in folders]
    wait_for(lambda: all((folder / "run" / "misa_log.jsonl").exists() for folder in folders))
    holders = [json.loads((folder / ".misa_lock").read_text())["pid"] for folder in folders]
    assert sorted(holders) == sorted(process.pid for process in processes), "each runs one trial"
    victim = next(process for process in processes if process.pid == holders[0])
    other = next(process for process in processes if process is not victim)
    victim.kill()
    victim.communicate()
    for number in range(6):  # the killed one's stand-in too, which misa's own trials would not outlive
        (out / "trials" / f"{number:04}").mkdir(exist_ok=True)
        (out / "trials" / f"{number:04}" / "go").touch()
    said = other.communicate(timeout=120)[0]
    assert other.returncode == 0, said
    rows = results(out)["trials"]
    assert len(rows) == 5 and [row["state"] for row in rows].count("complete") == 4, "the killed one is made up for"
    assert rows[0]["state"] == "failed" and rows[0]["reason"] == studies.KILLED and f"trial 0: {studies.KILLED}" in said
    assert len({row["values"]["learning_rate"] for row in rows}) == 5, "no two trials are the same"


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    child = "from misa_engine.sweep.worker import end_with; import os, time; end_with(os.getppid()); time.sleep(60)"
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    process.kill()
    process.communicate()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    wait_for(gone, 30)


def test_a_signal_marks_the_trial_and_writes_the_results(tmp_path: Path) -> None:
    out = tmp_path / "s"
    process = start(out, 3, seed=5)
    log = out / "trials" / "0000" / "run" / "misa_log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode and "Stopped" in said
    (row,) = results(out)["trials"]
    assert row["state"] == "failed" and row["reason"] == trials.STOPPED
    assert (out / "index.html").is_file()


# ---- what is searched ----


def test_the_papers_ranges_are_its_search_ranges_and_settings() -> None:
    """Learning rate and η are its search ranges; the others are ours and hold its δ, its T and the code's batch."""
    assert (PAPER["learning_rate"].low, PAPER["learning_rate"].high, PAPER["learning_rate"].log) == (1e-6, 2e-4, True)
    assert PAPER["eta"].choices == (0.1, 0.5, 1.0)
    for name, setting in (("delta", 0.03), ("inner_steps", 50), ("batch", 16)):
        assert PAPER[name].contains(setting) and PAPER[name].source.startswith("ours")
    assert all("paper" in PAPER[name].source for name in ("learning_rate", "eta"))
    found = parse_space([], ("learning_rate", "eta", "delta", "inner_steps"), 8)
    assert [space.name for space in found] == ["learning_rate", "eta", "delta", "inner_steps", "batch"]


def test_ranges_are_read_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("learning_rate: 1e-5..1e-4\nrest: [none, sign]\neta:\n")
    known = ("learning_rate", "eta", "delta", "inner_steps", "rest", "weight_decay", "bf16")
    texts = [
        str(tmp_path / "space.yaml"),
        "delta=0.01..0.03",
        "inner_steps=10..200:linear",
        "bf16=true,false",
        "batch=4,8",
    ]
    spaces = {space.name: space for space in parse_space(texts, known, 4)}
    assert spaces["learning_rate"].log and spaces["learning_rate"].high == 1e-4
    assert not spaces["delta"].log and not spaces["delta"].whole, "a factor of 3 is not searched in logarithms"
    assert spaces["inner_steps"].whole and not spaces["inner_steps"].log
    assert spaces["rest"].choices == ("none", "sign") and spaces["bf16"].choices == (True, False)
    assert spaces["eta"] is PAPER["eta"] and spaces["batch"].choices == (4, 8)
    assert [parse_space([space.describe()], known, 4)[0].to_dict() for space in spaces.values()] == [
        space.to_dict() for space in spaces.values()
    ]


def test_batch_is_micro_batch_times_accumulation() -> None:
    about = settings(Dimension("batch", choices=(8, 16)))
    assert about.options({"batch": 16, "eta": 0.5})["gradient_accumulation_steps"] == 2
    assert "batch" not in about.options({"batch": 16})
    assert parse_space(["batch"], (), 16)[0].choices == (16, 32)
    assert parse_space(["batch"], (), 6)[0].choices == (6, 12, 24), "none of the paper's is a multiple of 6"


# ---- the command, and what it refuses ----


@pytest.fixture
def config(workplace: Path, tmp_path: Path) -> Path:
    values = {
        "model": str(workplace / "model"),
        "dataset": str(workplace / "data.jsonl"),
        "eval_fraction": 0.25,
        "delta": 0.2,
        "inner_steps": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "eval_steps": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


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


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "s"
    sweep(settings(), out, 1, launch=LAUNCH)
    database = (out / "study.db").read_bytes()
    (out / "study.db").write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match="study.db cannot be read"):
        sweep(settings(), out, 2, launch=LAUNCH)
    (out / "study.db").write_bytes(database)
    (out / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="sweep.json is damaged"):
        sweep(settings(), out, 2, launch=LAUNCH)
    (out / "sweep.json").unlink()
    with pytest.raises(UserError, match=r"sweep.json is missing beside study.db"):
        sweep(settings(), out, 2, launch=LAUNCH)


def test_no_trial_outlives_an_error_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised while a run is watched, the run is ended first."""
    children = []
    started = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        children.append(started(*args, **kwargs))
        return children[-1]

    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    (tmp_path / "0000").mkdir()
    values = {**settings().base, "seed": 5}

    def interrupted(number: int, loss: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trials.run_trial(tmp_path / "0000", values, interrupted, LAUNCH)
    assert children[0].returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(children[0].pid, 0)

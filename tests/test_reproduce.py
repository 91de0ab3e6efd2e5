"""``misa reproduce``: what is listed, costed, refused; runs, an interruption and its resumption; tables and claims."""

import json
import math
import shutil

import pytest

from in_process import Here, run_here
from misa_engine.bench.reproduce import building, experiments, sources, toys
from misa_engine.bench.reproduce.command import cost_text
from misa_engine.bench.reproduce.cost import cost_of
from misa_engine.bench.reproduce.experiments import EXPERIMENTS, TINY, runs_of
from misa_engine.bench.reproduce.paper import CLAIMS, MISSING, REPORTED, TABLED
from misa_engine.cli.main import main
from misa_engine.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
EACH = pytest.mark.parametrize("name", EXPERIMENTS)


@pytest.fixture
def here(monkeypatch):
    run_here(monkeypatch)
    monkeypatch.setitem(TINY, "rows", 4)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """Toys are made once for all tests here."""
    folder = tmp_path_factory.mktemp("toys")
    toys.make_toys(folder)
    return folder


@pytest.fixture
def toy_model(toy_folder):
    """The toys' model for inference, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from misa_engine.bench.reproduce.cases import load_tokenizer

    directory = str(toy_folder / "models/tiny")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, load_tokenizer(directory)


@pytest.fixture
def few_steps(monkeypatch):
    def shorten(name, steps=3, entries=None):
        whole = EXPERIMENTS[name]
        kept = {**vars(whole), "tiny_steps": steps}
        kept["entries"] = [one for one in whole.entries if entries is None or one.label in entries]
        monkeypatch.setitem(EXPERIMENTS, name, experiments.Experiment(**kept))

    return shorten


def reproduce(name, out, toys_made, *words):
    (out / "work").mkdir(parents=True, exist_ok=True)
    if not (out / "work/toys").exists():
        shutil.copytree(toys_made, out / "work/toys")
    return main(["reproduce", name, "--scale", "tiny", "--output", str(out), *words])


# ---- what is declared ----


@EACH
def test_runs_are_listed_once_each_and_in_part(name, capsys):
    assert main(["reproduce", name, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    experiment = EXPERIMENTS[name]
    assert len(lines) == len(experiment.models) * len(experiment.entries) * len(experiment.seeds) == len(set(lines))
    assert main(["reproduce", name, "--list", "--runs", f"{experiment.models[0]} {experiment.entries[0].label} *"]) == 0
    part = capsys.readouterr().out.splitlines()
    assert len(part) == len(experiment.seeds) and set(part) < set(lines)


def test_all_experiments_are_listed(capsys):
    assert main(["reproduce", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)


@EACH
def test_each_run_gets_the_recipes_settings_and_its_own(name):
    experiment = EXPERIMENTS[name]
    recipe = experiments.recipe_of(experiment.recipe)
    for run in runs_of(name):
        found = building.settings_of(run, "paper", "official")
        given = run.entry.settings
        assert found["lr"] == given.get("lr", recipe["learning_rate"])
        assert found["delta"] == given.get("delta", recipe["delta"])
        assert found["inner_steps"] == given.get("inner_steps", recipe["inner_steps"])
        sequences = {"math": 8, "c4-130m": 256, "c4-350m": 256}.get(name, 16)
        assert found["batch"] * found["accumulation"] == sequences
        if run.entry.method == "misa" and "preset" not in run.entry.misa:
            assert found["misa"]["preset"] == "official"
            assert building.settings_of(run, "paper", "paper")["misa"]["preset"] == "paper"
        if run.entry.method != "misa":
            assert found["misa"] == {}


def test_every_number_and_claim_of_the_paper_has_a_row_and_a_source():
    for one in REPORTED:
        labels = {entry.label for entry in EXPERIMENTS[one.experiment].entries}
        assert one.label in labels and one.model in EXPERIMENTS[one.experiment].models
        assert one.metric in TABLED[one.experiment]
        assert one.metric in EXPERIMENTS[one.experiment].metrics and one.source.startswith("arXiv 2511.00056")
    for one in CLAIMS:
        labels = {entry.label for entry in EXPERIMENTS[one.experiment].entries}
        assert {one.better, one.worse} <= labels and one.metric in EXPERIMENTS[one.experiment].metrics
    assert set(MISSING) == set(EXPERIMENTS)
    for name, metrics in TABLED.items():
        assert set(metrics) <= set(EXPERIMENTS[name].metrics)


def test_cost_is_the_planners_and_says_that_it_is_computed():
    from misa_engine import plan
    from misa_engine.planner.activations import MicroBatch

    (run,) = [one for one in runs_of("ablations", "recipe") if one.seed == 0]
    cost = cost_of(run)
    planned = plan(
        published("tinyllama"), micro_batch=MicroBatch(2, 512, True), preset="official", delta=0.03, inner_steps=50
    )
    assert cost.vram_bytes == planned.total_bytes and cost.steps == 9753
    tokens = 9753 * 16 * 512
    assert cost.tokens == tokens and cost.gpu_hours == pytest.approx(
        2 * planned.parameters * tokens * 3.03 / 80e12 / 3600, rel=1e-6
    )
    text = cost_text([run], "official")
    assert "computed, not measured" in text and f"{planned.total_bytes / 2**30:.2f} GiB" in text


def published(name):
    from misa_engine.planner.cards import published_config

    return published_config(name)


# ---- bad input ----


def test_an_unknown_experiment_names_the_closest(capsys):
    assert main(["reproduce", "comonsense"]) == 2
    assert "Did you mean commonsense?" in capsys.readouterr().err
    assert main(["reproduce"]) == 2
    assert "ablations, memory" in capsys.readouterr().err
    assert main(["reproduce", "math", "--runs", "nothing of it", "--list"]) == 2
    assert "--list names them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "command"),
    (
        ("math", "git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters {data}/LLM-Adapters"),
        ("commonsense", "git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters {data}/LLM-Adapters"),
        ("alpaca", "hf download vicgalle/alpaca-gpt4 --repo-type dataset --local-dir {data}/alpaca-gpt4"),
        ("c4-130m", "--include 'en/c4-validation.00000*' --local-dir {data}/c4"),
        ("figure-3", "hf download vicgalle/alpaca-gpt4"),
    ),
)
def test_missing_data_is_named_with_the_command_that_gets_it(name, command, tmp_path, capsys):
    words = ["--data", str(tmp_path / "none"), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["reproduce", name, *words]) == 2
    assert command.format(data=tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_named_with_the_command_that_gets_it(toy_folder, tmp_path, capsys):
    words = ["--data", str(toy_folder / "data"), "--models", str(tmp_path), "--device", "cpu", "--output",
             str(tmp_path / "out")]  # fmt: skip
    assert main(["reproduce", "math", *words]) == 2
    said = capsys.readouterr().err
    assert f"hf download meta-llama/Meta-Llama-3-8B --local-dir {tmp_path}/Meta-Llama-3-8B" in said


def test_a_damaged_training_file_is_named(tmp_path):
    path = tmp_path / "math_10k.json"
    path.write_text('[{"question": "?"}]')
    with pytest.raises(UserError, match="no instruction and no output; they have question"):
        sources.records_of([path])
    path.write_text("[")
    with pytest.raises(UserError, match="no list of records"):
        sources.records_of([path])


def test_a_folder_of_another_experiment_is_refused(tmp_path, capsys):
    fixed = {"experiment": "math", "scale": "tiny", "recipe": "official", "device": "cpu"}
    (tmp_path / "settings.json").write_text(json.dumps(fixed))
    assert main(["reproduce", "c4-130m", "--scale", "tiny", "--output", str(tmp_path)]) == 2
    assert "experiment math: choose another --output" in capsys.readouterr().err


# ---- toys ----


def test_toys_have_the_data_sets_files_and_fields(toy_folder):
    import gzip

    data = toy_folder / "data"
    for name, source in sources.SOURCES.items():
        assert sources.files_of(source, data, name)
        if name != "c4":
            records = sources.records_of(sources.files_of(source, data, name))
            assert {"instruction", "input", "output"} <= set(records[0]) and len(records) == toys.TRAIN
    with gzip.open(data / "c4/en/c4-train.00000-of-01024.json.gz", "rt") as lines:
        assert set(json.loads(next(lines))) == {"text", "timestamp", "url"}
    question = json.loads((data / "mt_bench/question.jsonl").read_text().splitlines()[0])
    assert set(question) == {"question_id", "category", "turns"} and len(question["turns"]) == 2


def test_tasks_can_be_asked_of_the_toys_and_prompts_are_those_of_training(toy_folder):
    from misa_engine.bench.reproduce.scoring import check_tasks
    from misa_engine.evaluation.adapters import ALPACA

    for name in ("math", "commonsense"):
        check_tasks(EXPERIMENTS[name].tasks.values(), toy_folder / "data")
    assert sources.prompt_of({"instruction": "Add.", "input": ""}) == ALPACA.format("Add.")


# ---- runs ----


def test_an_interrupted_experiment_is_resumed_to_the_same_table(here, few_steps, toy_folder, tmp_path, monkeypatch):
    few_steps("c4-130m", entries=("MISA", "this engine", "Adam"))
    monkeypatch.setitem(TINY, "length", 96)
    assert reproduce("c4-130m", tmp_path / "whole", toy_folder) == 0
    whole = json.loads((tmp_path / "whole/results.json").read_text())
    assert [line["seeds"] for line in whole["table"]] == [1, 1, 1]
    assert len({line["cells"]["perplexity"]["median"] for line in whole["table"]}) == 3
    Here.ran.clear()
    monkeypatch.setattr(Here, "most", 1)
    assert reproduce("c4-130m", tmp_path / "cut", toy_folder) == 130
    cut = json.loads((tmp_path / "cut/results.json").read_text())
    assert [line["status"] for line in cut["table"]] == ["", "not run", "not run"]
    monkeypatch.setattr(Here, "most", math.inf)
    assert reproduce("c4-130m", tmp_path / "cut", toy_folder) == 0
    assert Here.ran == [run.name for run in runs_of("c4-130m", scale="tiny")]  # none twice
    resumed = json.loads((tmp_path / "cut/results.json").read_text())
    assert resumed["table"] == whole["table"]
    stored = (tmp_path / "cut/runs").glob("*.json")
    assert not any(str(tmp_path) in path.read_text() for path in stored)  # no folder of this machine


def test_runs_are_chosen_and_the_page_tells_which_are_left(here, few_steps, toy_folder, tmp_path):
    few_steps("figure-3")
    assert reproduce("figure-3", tmp_path, toy_folder, "--runs", "*LISA*") == 0
    assert Here.ran == ["mistral-7b LISA seed 0"]
    document = json.loads((tmp_path / "results.json").read_text())
    assert [line["label"] for line in document["table"] if not line["status"]] == ["LISA"]
    (line,) = [line for line in document["table"] if not line["status"]]
    assert line["cells"]["loss_at_time"]["median"] == pytest.approx(line["cells"]["heldout_loss"]["median"])
    assert {claim["found"][0]["holds"] for claim in document["claims"]} == {None}


def test_answers_for_a_judge_are_written_as_fastchat_reads_them(toy_folder, toy_model, tmp_path):
    from misa_engine.bench.reproduce.scoring import answer_judged

    model, tokenizer = toy_model
    words = sources.PlainWords(tokenizer)
    path = tmp_path / "answers/misa.jsonl"
    assert answer_judged(model, words, toy_folder / "data", path, "misa", new_tokens=4) == 2
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["question_id"] for one in answers] == [81, 82]
    assert all(len(one["choices"][0]["turns"]) == 2 and one["model_id"] == "misa" for one in answers)
    assert set(answers[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_a_task_that_fails_leaves_a_note_and_the_others_scores(toy_folder, toy_model, tmp_path, monkeypatch):
    from misa_engine.bench.reproduce.scoring import score_tasks
    from misa_engine.evaluation import harness

    monkeypatch.setattr(harness, "installed", lambda: False)
    model, tokenizer = toy_model
    tasks = {"piqa": "adapters:piqa", "mmlu": "mmlu"}
    amounts = {"name": "one run", "questions": 2, "beams": 1, "answer_tokens": 4}
    scores, notes = score_tasks(model, tokenizer, tasks, toy_folder / "data", tmp_path, **amounts)
    assert scores == {"piqa": 0.0}  # no average over two protocols, and none where one is missing
    assert notes == ["mmlu was not scored: mmlu: lm-eval is not installed: pip install 'misa_engine[eval]'"]
    scores, notes = score_tasks(
        model, tokenizer, {"piqa": "adapters:piqa", "boolq": "adapters:boolq"}, toy_folder / "data",
        tmp_path, **amounts,
    )  # fmt: skip
    assert set(scores) == {"piqa", "boolq", "average"} and notes == []
    assert len((tmp_path / "one_run/adapters-boolq.jsonl").read_text().splitlines()) == 2


def test_missing_lm_eval_is_refused_before_anything_is_trained(toy_folder, tmp_path, capsys, monkeypatch):
    from misa_engine.evaluation import harness

    monkeypatch.setattr(harness, "installed", lambda: False)
    words = ["--data", str(toy_folder / "data"), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["reproduce", "alpaca", *words]) == 2
    assert "pip install 'misa_engine[eval]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_loss_of_labelled_tokens_is_the_models_own(toy_folder):
    import torch
    from transformers import AutoModelForCausalLM

    from misa_engine.bench.reproduce.cases import labelled_loss

    model = AutoModelForCausalLM.from_pretrained(str(toy_folder / "models/tiny"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, 40), generator=generator)
    labels = ids.clone()
    labels[:, :7], labels[1, 30:] = -100, -100
    pair = torch.stack((ids, labels), dim=1)
    expected = model(input_ids=ids, labels=labels).loss
    loss = labelled_loss(model, torch.device("cpu"), pair)
    torch.testing.assert_close(loss, expected)  # measured: equal to 1e-7
    loss.backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(ours, model.lm_head.weight.grad)


def test_a_stream_that_ends_says_so(toy_folder):
    import torch

    rows = iter(torch.zeros(5, 2, 8, dtype=torch.long))
    batches = sources.stacked(rows, 2)
    assert next(batches).shape == next(batches).shape == (2, 2, 8)
    with pytest.raises(UserError, match="end after 2 micro-batches of 2"):
        next(batches)


# ---- end to end, by the command ----


@pytest.mark.soak
@EACH
def test_each_experiment_ends_in_a_page_at_scale_tiny(name, tmp_path):
    import subprocess
    import sys

    words = [sys.executable, "-m", "misa_engine", "reproduce", name, "--scale", "tiny", "--output", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert not any(line["status"] for line in document["table"])
    assert (tmp_path / f"{name}.html").stat().st_size > 20_000
    if name in ("math", "commonsense"):
        assert all("median" in line["cells"]["average"] for line in document["table"])
    if name == "alpaca":
        assert len(list((tmp_path / "mt_bench").glob("*.jsonl"))) == len(document["table"])


@pytest.mark.soak
def test_an_experiment_that_was_killed_goes_on_to_the_same_table(tmp_path):
    import subprocess
    import sys
    import time

    def command(out):
        return [sys.executable, "-m", "misa_engine", "reproduce", "c4-130m", "--scale", "tiny", "--output", str(out)]

    assert subprocess.run(command(tmp_path / "whole"), timeout=600).returncode == 0
    running = subprocess.Popen(command(tmp_path / "cut"))
    while not list((tmp_path / "cut").glob("runs/*.json")) and running.poll() is None:
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert len(list((tmp_path / "cut").glob("runs/*.json"))) < 4
    assert subprocess.run(command(tmp_path / "cut"), timeout=600).returncode == 0
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text())["table"] for name in ("whole", "cut"))
    assert cut == whole

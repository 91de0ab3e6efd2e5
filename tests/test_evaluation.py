"""Evaluation of several models: statistics, resuming, comparison, tables, bad input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation_cases import TEMPLATE, adapters_data, scripted
from misa_engine.cli.main import main
from misa_engine.cli.model_card import MARK, RESULTS
from misa_engine.errors import UserError
from misa_engine.evaluation import Settings, evaluate
from misa_engine.evaluation.forgetting import ForgettingTask, row_losses, rows
from misa_engine.evaluation.results import Record, pair
from misa_engine.evaluation.run import unpaired
from misa_engine.evaluation.store import Progress, slug, stored
from misa_engine.evaluation.subjects import Subject, labels, model_digest
from misa_engine.evaluation.tables import tables
from training import tiny

pytest_plugins = ["cli_place"]

TASKS = ["adapters:boolq", "adapters:gsm8k"]


# ---- several models ----


def right(prompt: str) -> str:
    return "true" if "wet" in prompt else "false" if "hot" in prompt else "so 72" if "Ann" in prompt else "600"


def half(prompt: str) -> str:
    return "true" if "wet" in prompt or "hot" in prompt else "71 or 72"


def run(tmp_path: Path, *subjects: Subject, say=str, **options):
    data = adapters_data(tmp_path / "data", ("boolq", "gsm8k"))
    return evaluate(subjects, TASKS, tmp_path / "out", settings=Settings(data=data), say=say, **options)


def test_models_are_compared_with_the_base_item_by_item(tmp_path):
    found = run(tmp_path, scripted("good", right), scripted("poor", lambda prompt: ""), base=scripted("base", half))
    values = {(one.model, one.task): one.metrics["accuracy"].value for one in found.results}
    assert values == {
        ("base", TASKS[0]): 0.5, ("base", TASKS[1]): 0.5, ("good", TASKS[0]): 1.0, ("good", TASKS[1]): 1.0,
        ("poor", TASKS[0]): 0.0, ("poor", TASKS[1]): 0.0,
    }  # fmt: skip
    gain = found.against_reference("good", TASKS[0], "accuracy")
    assert (gain.difference, gain.wins, gain.losses) == (0.5, 1, 0)
    assert found.against_reference("base", TASKS[0], "accuracy") is None
    assert {(one.model, one.against) for one in found.comparisons} == {
        ("good", "base"), ("poor", "base"), ("good", "poor"),
    }  # fmt: skip
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["reference"] == "base" and len(written["results"]) == 6 and len(written["comparisons"]) == 6
    first = written["results"][0]
    lines = (tmp_path / "out" / first["model"] / first["records_file"]).read_text().splitlines()
    record = json.loads(lines[0])
    assert record["detail"]["generated"] == "true" and record["metrics"] == {"accuracy": 1.0}
    assert {"torch", "transformers"} <= first["versions"].keys() and len(first["settings"]["data_sha256"]) == 64


def test_each_protocol_has_its_own_table(tmp_path):
    from dataclasses import replace

    from rich.console import Console

    found = run(tmp_path, scripted("one", right), scripted("two", half))
    more = tuple(replace(one, protocol="lm-eval", task="boolq") for one in found.results[:1])
    made = tables(replace(found, results=found.results + more))
    assert len(made) == 2
    console = Console(width=140, record=True, file=io.StringIO())
    for table in made:
        console.print(table)
    shown = console.export_text()
    ours, theirs = shown.split("lm-eval\n", 1) if "lm-eval\n" in shown else shown.split("lm-eval ", 1)
    assert "adapters:boolq" in ours and "0.5000" in ours and "1–0" not in theirs
    assert "not comparable" in ours and "adapters:" not in theirs


def test_what_is_done_is_not_made_again_and_what_changed_is_said(tmp_path):
    said: list[str] = []
    run(tmp_path, scripted("one", right), say=said.append)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = scripted("one", lambda prompt: pytest.fail("asked again"))
    run(tmp_path, again, say=said.append)
    assert said[-1] == "one: adapters:gsm8k: done before"
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = scripted("one", half)
    other.digest = "trained on"
    run(tmp_path, other, say=said.append)
    assert any("made again, because the model's files have changed" in line for line in said)


def test_a_killed_evaluation_goes_on_behind_its_last_item(tmp_path):
    whole = run(tmp_path / "whole", scripted("one", right))
    seen: list[str] = []

    def dies(prompt: str) -> str:
        seen.append(prompt)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return right(prompt)

    data = adapters_data(tmp_path / "data", ("boolq", "gsm8k"))
    settings = Settings(data=data, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate([scripted("one", dies)], TASKS[::-1], tmp_path / "out", settings=settings, say=str)
    part = tmp_path / "out/one/adapters-boolq.jsonl.part"
    assert not part.exists() and (tmp_path / "out/one/adapters-gsm8k.json").exists()
    seen[:] = seen[:1]  # the third call dies again: within the second task now
    with pytest.raises(KeyboardInterrupt):
        evaluate([scripted("one", dies)], TASKS, tmp_path / "out", settings=settings, say=str)
    with part.open("a") as file:
        file.write('{"id": "1", "metr')  # the kill cut a line
    asked: list[str] = []
    subject = scripted("one", lambda prompt: asked.append(prompt) or right(prompt))
    said: list[str] = []
    found = evaluate([subject], TASKS, tmp_path / "out", settings=settings, say=said.append)
    assert len(asked) == 1 and any("goes on after 1 items" in line for line in said) and not part.exists()
    assert {one.task: one.records for one in found.results} == {one.task: one.records for one in whole.results}


def test_records_of_other_settings_are_not_gone_on_with(tmp_path):
    first = Progress(tmp_path / "a.jsonl", "key")
    first.add(Record("0", {"accuracy": 1.0}))
    first.close()
    assert Progress(tmp_path / "a.jsonl", "key").done.keys() == {"0"}
    assert Progress(tmp_path / "a.jsonl", "other").done == {} and not (tmp_path / "a.jsonl.part").exists()
    assert stored(tmp_path / "a.json") is None
    with pytest.raises(ValueError, match="no records"):
        Progress(tmp_path / "b.jsonl", "key").finish()


def test_records_stand_in_the_order_of_their_numbers(tmp_path):
    progress = Progress(tmp_path / "a.jsonl", "key")
    for name in ("10", "9", "mmlu/2", "mmlu/11"):
        progress.add(Record(name, {"accuracy": 1.0}))
    assert [record.id for record in progress.finish()] == ["9", "10", "mmlu/2", "mmlu/11"]


def test_long_tasks_say_how_far_they_are(tmp_path, monkeypatch):
    from misa_engine.evaluation import store

    monkeypatch.setattr(store, "EVERY", -1.0)
    said: list[str] = []
    run(tmp_path, scripted("one", right), say=said.append)
    assert said[:2] == ["one: adapters:boolq: 1 of 2", "one: adapters:boolq: 2 of 2"]


def test_a_cut_prompt_keeps_its_end_and_is_marked(tmp_path):
    subject = scripted("one", right)
    short = SimpleNamespace(model_type="scripted", max_position_embeddings=96)
    subject.model.config.get_text_config = lambda: short
    settings = Settings(data=adapters_data(tmp_path / "data", ("boolq",)))
    found = evaluate([subject], TASKS[:1], tmp_path / "out", settings=settings, say=str).results[0]
    assert found.settings["prompts_cut"] == 2 and all(record.detail["prompt_cut"] for record in found.records)


# ---- forgetting ----


def test_losses_of_rows_are_the_models_own_whatever_their_lengths():
    model = tiny().eval()
    texts = [list(range(3, 3 + n)) for n in (20, 7, 2)]
    for one, loss in zip(texts, row_losses(model, texts), strict=True):
        ids = torch.tensor([one])
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def subject_of(model, label):
    from evaluation_cases import Bytes

    return Subject(label, f"/models/{label}", lambda: model, lambda: Bytes(None), digest=label)


def test_forgetting_is_the_loss_after_minus_before_weighted_by_tokens(tmp_path):
    texts = [{"text": "the quick brown fox " * 3}, {"text": "jumps"}, {"text": "over the lazy dog"}]
    place = tmp_path / "data/HuggingFaceFW/finewiki/data/en"
    place.mkdir(parents=True)
    (place / "part.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    before, after = tiny(vocab_size=384), tiny(vocab_size=384)
    with torch.no_grad():
        after.lm_head.weight.mul_(3)
    subjects = [subject_of(after, "after")]
    settings = Settings(data=tmp_path / "data", batch_size=2)
    found = evaluate(
        subjects, ["forgetting"], tmp_path / "out", base=subject_of(before, "before"), settings=settings, say=str
    )
    losses = {}
    for name, model in (("before", before), ("after", after)):
        rows_of = [[byte + 3 for byte in text["text"].encode()] for text in texts]
        total = sum(model(input_ids=torch.tensor([r]), labels=torch.tensor([r])).loss.item() * (len(r) - 1)
                    for r in rows_of)  # fmt: skip
        losses[name] = total / sum(len(r) - 1 for r in rows_of)
        assert found.of(name, "forgetting").metrics["loss"].value == pytest.approx(losses[name], rel=1e-4)
    forgotten = found.against_reference("after", "forgetting", "loss")
    assert forgotten.difference == pytest.approx(losses["after"] - losses["before"], rel=1e-3) and forgotten.n == 3
    assert found.results[0].settings["text"] == "HuggingFaceFW/finewiki"


def test_every_machine_has_a_text_and_local_ones_go_first(tmp_path):
    name, texts = rows(Settings(limit=5))
    assert name == "pydoc_data.topics" and len(texts) == 5 and min(map(len, texts)) > 500
    (tmp_path / "forgetting.txt").write_text("A text. " * 1000)
    assert rows(Settings(data=tmp_path))[0] == "forgetting.txt"
    (tmp_path / "forgetting.jsonl").write_text('{"words": "none"}\n')
    with pytest.raises(UserError, match="need a column 'text'"):
        rows(Settings(data=tmp_path))
    with pytest.raises(UserError, match="--base"):
        ForgettingTask("forgetting").check([scripted("one", str)], Settings())


def test_models_that_count_tokens_otherwise_are_not_paired(tmp_path):
    found = run(tmp_path, scripted("one", right), scripted("two", half))
    from dataclasses import replace

    first, second = found.of("one", TASKS[0]), found.of("two", TASKS[0])
    assert pair(first, second, "accuracy") is not None
    heavier = tuple(replace(record, weight=2.0) for record in second.records)
    assert pair(first, replace(second, records=heavier), "accuracy") is None
    assert pair(first, replace(second, records=second.records[:1]), "accuracy") is None
    odd = replace(second, metrics={"accuracy": replace(second.metrics["accuracy"], value=9.0)})
    assert pair(first, odd, "accuracy") is None  # a perplexity, say, is no mean of items
    (line,) = unpaired(replace(found, comparisons=found.comparisons[1:]))
    assert "two: adapters:boolq accuracy has no paired difference to one" in line and unpaired(found) == []


# ---- models ----


def test_labels_are_the_shortest_ends_that_differ():
    assert labels(["runs/misa", "runs/lora"]) == ["misa", "lora"]
    assert labels(["runs/misa/seed0", "runs/lora/seed0", "/x/base"]) == ["misa-seed0", "lora-seed0", "base"]
    assert labels(["a/b", "b"]) == ["a-b", "b"]
    with pytest.raises(UserError, match="twice"):
        labels(["a/b", "./a/b"])


def test_a_digest_follows_every_file_that_decides(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "misa_log.jsonl"):
        (tmp_path / name).write_text("x")
    before = model_digest(str(tmp_path))
    (tmp_path / "misa_log.jsonl").write_text("y")
    assert model_digest(str(tmp_path)) == before
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("y")
        assert model_digest(str(tmp_path)) != before
        before = model_digest(str(tmp_path))


# ---- the command ----


@pytest.fixture
def data(tmp_path):
    return adapters_data(tmp_path / "data", ("boolq", "gsm8k"))


def test_the_command_evaluates_a_real_model_and_compares(workplace, data, tmp_path, capsys):
    other = tmp_path / "other"
    tiny(vocab_size=384, max_position_embeddings=128).save_pretrained(other)
    for file in (workplace / "model").glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    card = other / "README.md"
    card.write_text("\n".join(["---", "tags: [a]", "---", "# other", MARK, *RESULTS, ""]))
    words = [str(other), "--base", str(workplace / "model"), "--tasks", "adapters:boolq,forgetting", "--limit", "2"]
    call = ["eval", *words, "--data", str(data), "--output", str(tmp_path / "out"), "--batch_size", "auto"]
    assert main([*call, "--num_beams", "2"]) == 0
    shown = capsys.readouterr().out
    assert "LLM-Adapters protocol" in shown and "Forgetting" in shown and "− model" in shown
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert {(one["model"], one["task"]) for one in written["results"]} == {
        (model, task) for model in ("model", "other") for task in ("adapters:boolq", "forgetting")
    }
    assert main([*call, "--num_beams", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == written and captured.err.count("done before") == 4
    assert captured.err.count("results are in its model card") == 1, "the trained model has a card, its base none"
    text = card.read_text()
    assert "| adapters:boolq | accuracy |" in text and "| forgetting | loss |" in text and "model-index" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "adapters:bolq"], "unknown task 'adapters:bolq'. Did you mean adapters:boolq?"),
        (["--tasks", "forgeting"], "Did you mean forgetting?"),
        (["--tasks", ""], "no tasks"),
        (["--tasks", "adapters:piqa"], "git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters"),
        (["--tasks", "adapters:boolq", "--prompt", "chat"], "has no chat template: say --prompt plain"),
        (["--tasks", "adapters:boolq", "--data", "/nowhere"], "is no folder"),
        (["--tasks", "adapters:boolq", "--limit", "0"], "at least 1"),
        (["--tasks", "adapters:boolq", "--batch_size", "many"], "batch_size"),
        (["--tasks", "forgetting"], "name the model before with --base"),
        (["--tasks", "adapters:boolq", "--base", "MODEL"], "named twice"),
        (["--tasks", "adapters:boolq", "--dtype", "float16"], "Use --dtype bfloat16"),
    ],
    ids=str,
)
def test_bad_input_of_eval_is_one_line_before_anything_is_loaded(
    words, said, workplace, data, tmp_path, capsys, monkeypatch
):
    import misa_engine.cli.loading as loading
    from misa_engine.evaluation import harness

    monkeypatch.setattr(loading, "load_model", lambda *args, **options: pytest.fail("loaded"))
    monkeypatch.setattr(harness, "installed", lambda: False)  # its index of 14,000 tasks takes seconds
    model = str(workplace / "model")
    words = [model if word == "MODEL" else word for word in words]
    data_words = [] if "--data" in words else ["--data", str(data)]
    assert main(["eval", model, "--output", str(tmp_path / "out"), *data_words, *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_directory_that_holds_no_model_is_refused(workplace, data, tmp_path, capsys):
    for name, said in ((tmp_path, "is not a model directory"), (tmp_path / "gone", "does not exist"),
                       (workplace / "encoder", "bert")):  # fmt: skip
        call = ["eval", str(workplace / "model"), str(name), "--tasks", "adapters:boolq", "--data", str(data)]
        assert main([*call, "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["eval", "--tasks", "forgetting"]) == 2
    assert "needs a model and --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothere", "--output", "OUT"], "MODEL nothere: there is no such directory"),
        (["MODEL", "--base", "nothere", "--output", "OUT"], "--base nothere: there is no such directory"),
        (["MODEL", "--output", "FILE"], "--output FILE: FILE is a file"),
        (["--training_problems", "FILE/p.jsonl"], "--training_problems FILE: FILE is a file"),
    ],
    ids=str,
)
def test_errors_name_what_was_typed(words, said, workplace, tmp_path, capsys, monkeypatch):
    from misa_engine.cli import hub

    monkeypatch.setattr(hub, "why_unreachable", lambda: "no network")
    (tmp_path / "file").touch()
    places = {"MODEL": workplace / "model", "OUT": tmp_path / "out", "FILE": tmp_path / "file"}

    def placed(text):
        for name, place in places.items() if not text.startswith("MODEL nothere") else ():
            text = text.replace(name, str(place))
        return text

    assert main(["eval", *map(placed, words), "--tasks", "reasoning:mixed"]) == 2
    shown = capsys.readouterr().err
    assert placed(said) in shown and not (tmp_path / "out").exists()


def test_slugs_are_file_names():
    assert slug("adapters:arc-e") == "adapters-arc-e" and "/" not in slug("a/../b")
    assert TEMPLATE

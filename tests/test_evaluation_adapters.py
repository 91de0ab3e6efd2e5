"""The LLM-Adapters protocol on records in the published files' shape."""

from __future__ import annotations

import json

import pytest

from evaluation_cases import RECORDS, adapters_data, scripted
from misa_engine.cli.record_formats import instruction_to_prompt
from misa_engine.errors import UserError
from misa_engine.evaluation import Settings, evaluate
from misa_engine.evaluation.adapters import ALPACA, COMMONSENSE, MATH, PLAIN, AdaptersTask
from misa_engine.evaluation.tasks import tasks_named


def task(name):
    return AdaptersTask(f"adapters:{name}")


def settings(folder, **options):
    return Settings(data=folder, **options)


@pytest.mark.parametrize("name", RECORDS)
def test_the_published_output_of_each_task_is_right_and_another_is_wrong(name, tmp_path):
    one = task(name)
    for item, record in zip(one.items(settings(adapters_data(tmp_path))), RECORDS[name], strict=True):
        assert one.mark(item, record["output"])[1]
        for text in ("", "I do not know", "\n\n### Instruction:", "answer9 ending9 999999"):
            assert not one.mark(item, text)[1]


def test_groups_are_the_papers_twelve():
    assert [one.name for one in tasks_named(["adapters:commonsense", "adapters:math", "adapters:boolq"])] == [
        f"adapters:{name}" for name in (*COMMONSENSE, *MATH)
    ]
    assert len(COMMONSENSE) == 8 and len(MATH) == 4 and set(RECORDS) == {*COMMONSENSE, *MATH}


@pytest.mark.parametrize(
    ("name", "text", "answer", "right"),
    [
        ("gsm8k", "She has 3 * 24 = 72 nuts.", "72", True),
        ("gsm8k", "It is 72.0005", "72.0005", True),  # within the published 0.001
        ("gsm8k", "It is 72.002", "72.002", False),
        ("gsm8k", "72 nuts, or 71", "71", False),
        ("gsm8k", "none", None, False),
        ("aqua", "The answer is (c).", "C", True),
        ("boolq", "True", "true", True),
        ("boolq", "The answer is false. No, true", "false", False),
        ("boolq", "true\n\n### Response:\nfalse", "true", True),  # what follows another heading is not read
        ("boolq", "### Response: true", None, False),
        ("gsm8k", "72\n\n### Response:\n5", "72", True),
        ("gsm8k", "72\n\n### Instruction:\nWhat is 5 + 4?", "4", False),  # as published: it should have ended
    ],
)
def test_marking(name, text, answer, right, tmp_path):
    one = task(name)
    item = one.items(settings(adapters_data(tmp_path)))[0]
    assert one.mark(item, text) == (answer, right)


def test_generation_is_as_published_and_the_prompt_is_alpacas(tmp_path):
    data = adapters_data(tmp_path / "data", ("boolq", "gsm8k"))
    subject = scripted("one", lambda prompt: "the correct answer is true")
    found = evaluate([subject], ["adapters:boolq"], tmp_path / "out", settings=settings(data), say=str)
    assert found.of("one", "adapters:boolq").metrics["accuracy"].value == 0.5
    model = scripted("two", str)
    evaluate([model], ["adapters:gsm8k"], tmp_path / "out", settings=settings(data, num_beams=2), say=str)
    model = scripted("three", str)
    evaluate([model], ["adapters:gsm8k"], tmp_path / "out", settings=settings(data, new_tokens=512), say=str)
    for name, beams, new in (("one", 4, 32), ("two", 2, 256), ("three", 4, 512)):
        stored = json.loads((tmp_path / "out" / name).glob("*.json").__next__().read_text())["settings"]
        assert (stored["beams"], stored["new_tokens"], stored["prompt"]) == (beams, new, "alpaca")


def test_the_model_is_asked_with_beams_and_without_sampling(tmp_path):
    data = adapters_data(tmp_path / "data", ("boolq",))
    kept = scripted("one", lambda prompt: "false")
    model = kept.model
    one = task("boolq")
    from misa_engine.evaluation.store import Progress

    one.run(kept, settings(data), Progress(tmp_path / "r.jsonl", "k"))
    assert {name: model.options[name] for name in ("num_beams", "max_new_tokens", "do_sample")} == {
        "num_beams": 4,
        "max_new_tokens": 32,
        "do_sample": False,
    }
    assert sorted(model.asked) == sorted(ALPACA.format(record["instruction"]) for record in RECORDS["boolq"])


def test_plain_prompts_are_those_that_misa_train_writes(tmp_path):
    item = task("boolq").items(settings(adapters_data(tmp_path)))[0]
    asked = task("boolq").prompt(item, None, Settings(prompt="plain"))
    assert asked == instruction_to_prompt(RECORDS["boolq"][0])["prompt"] == PLAIN.format(item.question)


def test_missing_data_is_refused_with_the_command_that_gets_it(tmp_path):
    command = "git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters"
    with pytest.raises(UserError, match=f"{command} data/LLM-Adapters, then --data data"):
        task("boolq").items(Settings())
    with pytest.raises(UserError, match=f"dataset/social_i_qa/test.json.*{command} {tmp_path}/LLM-Adapters"):
        task("siqa").items(settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("boolq", '[{"instruction": "q", "answer": "maybe"}]', "record 1: .*one of true, false.*'maybe'"),
        ("gsm8k", '[{"instruction": "q", "answer": "many"}]', "record 1: .*a number"),
        ("aqua", '[{"instruction": "q", "answer": []}]', "record 1: .*a letter A to E"),
        ("boolq", '[{"question": "q", "answer": "true"}]', "'instruction' must be a text"),
        ("boolq", "{}", "no list of records"),
        ("boolq", "[{", "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_by_record(name, content, said, tmp_path):
    place = adapters_data(tmp_path, (name,))
    next(place.rglob("test.json")).write_text(content)
    with pytest.raises(UserError, match=said):
        task(name).items(settings(place))


def test_other_layouts_are_found(tmp_path):
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS["arc-e"]))
    assert len(task("arc-e").items(settings(tmp_path))) == 1

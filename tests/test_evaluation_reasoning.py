"""reasoning-gym's problems: made from a seed, marked by their number, the same for the bench and misa eval."""

from __future__ import annotations

import json

import pytest

from evaluation_cases import scripted
from misa_engine.bench import tasks as bench_tasks
from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.evaluation import Settings, evaluate, reasoning
from misa_engine.evaluation.reasoning import ReasoningTask
from misa_engine.evaluation.tasks import tasks_named

NEEDED = "needs reasoning-gym: pip install 'misa_engine[eval]'"


@pytest.fixture(scope="module", autouse=True)
def gym():
    pytest.importorskip("reasoning_gym", reason=NEEDED)


def test_problems_end_with_their_answer_and_held_out_ones_are_others():
    train, test = dict(reasoning.problems(0, 60)), dict(reasoning.problems(1, 30))
    assert len(train) > 50 and len(set(train) & set(test)) <= len(test) // 4
    for answer in train.values():
        assert answer.count("####") == 1 and reasoning.final_number(answer) is not None


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3*4=12\n#### 1,200", "1200"), ("it is 5, no, 7", "7"), ("#### -3.5 apples", "-3.5"), ("none", None)],
)
def test_the_number_that_counts_is_the_one_after_the_sign_or_the_last(text, number):
    assert reasoning.final_number(text) == number


def test_the_bench_uses_these_problems():
    assert bench_tasks.problems is reasoning.problems and bench_tasks.final_number is reasoning.final_number


def test_a_limit_takes_the_first_of_the_same_problems():
    few, many = (ReasoningTask("reasoning:mixed").items(Settings(limit=limit)) for limit in (7, 40))
    assert few == many[:7] and len(many) == 40 and len({item.question for item in many}) == 40


def test_right_answers_count_and_malformed_ones_do_not(tmp_path):
    task = ReasoningTask("reasoning:chain_sum")
    items = {item.question: item for item in task.items(Settings(limit=6))}
    spoiled = iter(["", "I cannot say", "#### none", "{}", "The sum is {}.", "#### {} apples"])

    def answer(prompt: str) -> str:
        question = prompt.removeprefix("<user>").removesuffix("<assistant>")
        return next(spoiled).format(reasoning.final_number(items[question].target))

    found = evaluate(
        [scripted("one", answer)], ["reasoning:chain_sum"], tmp_path, settings=Settings(limit=6, batch_size=1), say=str
    )
    assert found.results[0].metrics["accuracy"].value == 0.5
    assert found.results[0].settings["prompt"] == "chat template"


def test_words_are_compared_where_the_answer_is_no_number():
    task = ReasoningTask("reasoning:propositional_logic")
    item = type(task.items(Settings(limit=1))[0])("0", "q", "#### Yes, it is")
    assert task.mark(item, "well\n#### yes, it is.") == ("yes, it is", True)
    assert task.mark(item, "yes, it is\nor not") == ("or not", False)
    assert task.mark(item, "") == (None, False)


def test_an_unknown_family_is_refused_with_the_closest():
    with pytest.raises(UserError, match="Did you mean reasoning:chain_sum"):
        tasks_named(["reasoning:chainsum"])
    assert tasks_named(["reasoning:leg_counting"])[0].items(Settings(limit=2))


def test_a_model_without_a_chat_template_is_refused_unless_prompts_are_plain(tmp_path):
    bare = scripted("bare", lambda prompt: "#### 1", template=None)
    with pytest.raises(UserError, match="no chat template: say --prompt plain"):
        evaluate([bare], ["reasoning:mixed"], tmp_path / "out", settings=Settings(limit=2), say=str)
    assert not (tmp_path / "out").exists() and bare._model is None
    found = evaluate([bare], ["reasoning:mixed"], tmp_path / "out", settings=Settings(limit=2, prompt="plain"), say=str)
    assert found.results[0].settings["prompt"] == "plain question"


def test_training_problems_are_chats_of_which_none_is_evaluated(tmp_path, capsys):
    out = tmp_path / "new/train.jsonl"
    call = ["eval", "--tasks", "reasoning:mixed", "--training_problems", str(out), "--limit", "60"]
    assert main(call) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    records = [[*one["prompt"], *one["completion"]] for one in made]
    assert 30 <= len(records) <= 60
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in records)
    asked = {item.question for item in ReasoningTask("reasoning:mixed").items(Settings())}
    assert not asked & {turns[0]["content"] for turns in records}
    assert main(call) == 2 and "exists: name another file" in capsys.readouterr().err
    assert main(["eval", "--tasks", "forgetting", "--training_problems", str(tmp_path / "x")]) == 2
    assert "reasoning tasks only" in capsys.readouterr().err

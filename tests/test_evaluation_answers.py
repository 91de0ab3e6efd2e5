"""What is read off generated texts, malformed ones included."""

from __future__ import annotations

import re

import pytest

from misa_engine.evaluation import answers

ANSWERS = tuple(f"answer{place}" for place in range(1, 6))


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("the correct answer is true", ("true", "false"), "true"),
        ("the correct answer is True.", ("true", "false"), "true"),
        ("FALSE", ("true", "false"), "false"),
        ("false, not true", ("true", "false"), "false"),  # several: the first, as published
        ("that is untrue", ("true", "false"), None),
        ("the correct answer is answer3", ANSWERS, "answer3"),
        ("Answer2\n\n### Instruction: answer4", ANSWERS, "answer2"),
        ("answer12 or answer5", ANSWERS, "answer5"),
        ("answer 3", ANSWERS, None),
        ("answer6", ANSWERS, None),
        ("the correct answer is ending4</s>", tuple(f"ending{place}" for place in range(1, 5)), "ending4"),
        ("'solution1'", ("solution1", "solution2"), "solution1"),
        ("option2option1", ("option1", "option2"), None),
        ("", ANSWERS, None),
        ("\x00\ud83d 答案", ANSWERS, None),
    ],
)
def test_a_choice_is_the_first_whole_word_whatever_its_case(text, words, said):
    assert answers.choice(text, words) == said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 * 24 = 72", 72),
        ("The answer is 72.", 72),
        ("1,234.50 in all", 1234.5),
        ("10,000,000 people", 10_000_000),
        ("first 5, then 7", 7),
        ("1,2,3", 3),
        ("it costs $5", 5),
        ("a loss of -$5.", -5),
        ("a loss of $-5", -5),
        ("€ 1,200", 1200),
        ("50%", 50),
        ("12.5 %.", 12.5),
        ("x = -3", -3),
        ("x = \u22123", -3),
        ("5-3", 3),
        ("10 - 7", 7),
        ("3/4", 0.75),
        ("-1/2 of it", -0.5),
        ("4/0", None),
        (".5", 0.5),
        ("1.5.", 1.5),
        ("answer1", None),
        ("no number", None),
        ("", None),
        ("9" * 400, None),  # beyond every float
    ],
)
def test_a_number_is_the_last_one_with_its_sign_and_without_its_ornaments(text, value):
    assert answers.number(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.1 * 50 = 5. The answer is (C).", "C"),
        ("The answer is B", "B"),
        ("Answer: D.", "D"),
        ("the answer is c.", "C"),
        ("Not (A). So the answer is (E).", "E"),
        ("A man has B apples", "B"),
        ("A", "A"),
        ("b)", "B"),
        ("#### D", "D"),
        ("A bag of nuts", None),
        ("The answer is a large number", None),
        ("I'd say 5", None),
        ("F", None),
        ("", None),
    ],
)
def test_a_letter_is_the_declared_one_or_the_last_that_stands_alone(text, said):
    assert answers.letter(text) == said


# ---- beside the published rules, stated once more ----

#: Solutions as models write them, whole and malformed.
SOLUTIONS = (
    "She has 3 * 24 = 72 nuts.",
    "One costs $1,200 / 2 = $600. The answer is 600.",
    "50% of 30 is 15.0",
    "Rationale: 0.1 * 50 = 5, so it is (C). The answer is (C).",
    "But all of it is Bob's. The answer is (D).",
    "x = -3",
    "72 nuts</s></s>",
    "I do not know",
    "1. 2. 3. 4. 5. 5. 5. 5. 5.",
    "",
)
#: Where ours reads something else, and why.
DIFFERENT = {
    "3/4": (0.75, 4.0),  # a fraction
    "10-7": (7.0, -7.0),  # a minus after a digit subtracts
    "a loss of -$5": (-5.0, 5.0),
    "answer1": (None, 1.0),  # within a word
}


def published_number(text):
    """LLM-Adapters' evaluate.py and MISA's callbacks.py: the last one without commas."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


@pytest.mark.parametrize("text", SOLUTIONS)
def test_numbers_and_letters_are_those_of_the_published_rules(text):
    assert answers.number(text) == published_number(text)
    letters = re.findall("[ABCDE]", text)  # MISA's callbacks.py: the last capital
    if "(" in text:
        assert answers.letter(text) == letters[-1]


@pytest.mark.parametrize("text", DIFFERENT)
def test_where_a_number_is_read_otherwise_than_published_is_stated(text):
    assert (answers.number(text), published_number(text)) == DIFFERENT[text]

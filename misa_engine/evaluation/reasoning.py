"""Problems of reasoning-gym, made from a seed on every machine, with answers that are checked by their last number.

``misa bench learning`` trains on and measures the same problems: ``problems`` and ``final_number`` are its, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any, ClassVar

from misa_engine.errors import UserError
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.task import GenerationTask, Item, chat_prompt

PREFIX = "reasoning:"
#: All of FAMILIES in turn, as misa bench learning asks them.
MIXED = "mixed"
#: Families that a small model solves in part, and how each is asked. Others have reasoning-gym's own defaults.
FAMILIES: dict[str, dict[str, int]] = {
    "gsm_symbolic": {},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
}
TRAINING_SEED, TEST_SEED = 0, 1
#: Problems of an evaluation, where no limit is given.
PROBLEMS = 300
#: Tokens that an answer may have.
ANSWER_TOKENS = 96
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def missing() -> str | None:
    """What to install; None where everything is there."""
    return None if find_spec("reasoning_gym") else "missing: pip install reasoning-gym"


def problems(seed: int, count: int, families: Mapping[str, Mapping[str, Any]] = FAMILIES) -> Iterator[tuple[str, str]]:
    """Problems of all families in turn, none twice in a seed, with worked solutions where there are any.

    Args:
        seed: TRAINING_SEED or TEST_SEED.
        count: about how many; fewer where a family repeats itself.
        families: reasoning-gym's names and how each is asked.

    Yields:
        Question, and solution ending in ``#### answer``.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    if (why := missing()) is not None:
        raise UserError(f"reasoning problems: {why}")
    import reasoning_gym

    each = -(-count // len(families))
    made = [
        reasoning_gym.create_dataset(name, size=each, seed=10_000_019 * seed + 7, **options)
        for name, options in families.items()
    ]
    seen: set[str] = set()
    for entries in zip(*made, strict=True):
        for entry in entries:
            question = entry["question"].replace(" Give the result as your final answer. Do not include units.", "")
            if question not in seen:
                seen.add(question)
                work = str(entry["metadata"].get("answer_cot") or "").strip()
                work = re.sub(r"\s*(####|The answer is).*$", "", work, flags=re.DOTALL)
                yield question, f"{work}\n#### {entry['answer']}".strip()


def final_number(text: str) -> str | None:
    """The number after the last ####, or else the last number; None without one."""
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    return found[0 if "####" in text else -1].replace(",", "").rstrip(".") if found else None


def final_answer(text: str) -> str:
    """What stands after the last ####, or else the last line that is not empty: for answers that are no numbers."""
    lines = text.rpartition("####")[2].strip().splitlines() or [""]
    return (lines[0] if "####" in text else lines[-1]).strip().rstrip(".")


def family_names() -> list[str]:
    """All families, ours first.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    if (why := missing()) is not None:
        raise UserError(f"{PREFIX}… needs reasoning-gym. {why}")
    from reasoning_gym.factory import DATASETS

    return [MIXED, *FAMILIES, *sorted(set(DATASETS) - set(FAMILIES))]


def families_of(name: str) -> dict[str, dict[str, int]]:
    """The families of a task and how they are asked."""
    family = name.removeprefix(PREFIX)
    return dict(FAMILIES) if family == MIXED else {family: FAMILIES.get(family, {})}


def numeric(answer: str) -> bool:
    """Whether a solution's answer is one number, and nothing else."""
    return _NUMBER.fullmatch(answer.rpartition("####")[2].strip()) is not None


class ReasoningTask(GenerationTask):
    """``reasoning:FAMILY``: exact match after greedy generation."""

    protocol: ClassVar[str] = "reasoning"
    new_tokens = ANSWER_TOKENS

    def chat(self, settings: Settings) -> bool:
        """In chats, unless the user wants plain prompts."""
        return settings.prompt != "plain"

    def facts(self, settings: Settings) -> dict[str, Any]:
        """Families, seed and generation."""
        from importlib.metadata import version

        return {
            "prompt": "chat template" if self.chat(settings) else "plain question", "beams": 1,
            "new_tokens": self.new_tokens, "families": families_of(self.name), "seed": TEST_SEED,
            "problems": settings.limit or PROBLEMS, "reasoning_gym": version("reasoning_gym"),
        }  # fmt: skip

    def items(self, settings: Settings) -> list[Item]:
        """Held-out problems; the first of them whatever the limit, so that a smaller one asks the same."""
        count = settings.limit or PROBLEMS
        made = problems(TEST_SEED, max(2 * count, PROBLEMS), families_of(self.name))
        found = [Item(str(place), *pair) for place, pair in enumerate(islice(made, count))]
        if not found:
            raise UserError(f"{self.name} made no problems")
        return found

    def prompt(self, item: Item, tokenizer: Any, settings: Settings) -> str:
        """The question as the user's turn, or as plain text."""
        if self.chat(settings):
            return chat_prompt(tokenizer, item.question)
        return f"Question: {item.question}\nAnswer: "

    def mark(self, item: Item, text: str) -> tuple[str | None, bool]:
        """The final number, or the final words where the answer is none, and whether they are the target's."""
        if numeric(item.target):
            said = final_number(text)
            return said, said is not None and said == final_number(item.target)
        words = final_answer(text)
        return words or None, words.lower() == final_answer(item.target).lower()


def training_records(names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Chats to train on: problems of the tasks' families with their solutions, none of them evaluated.

    They are prompt and completion, so that the loss is the solution's.

    Args:
        names: tasks, ``reasoning:chain_sum``.
        count: problems of each task at most.
    """
    made = []
    for name in names:
        families = families_of(name)
        evaluated = {question for question, _ in problems(TEST_SEED, 10 * PROBLEMS, families)}
        for question, solution in islice(problems(TRAINING_SEED, count, families), count):
            if question not in evaluated:
                asked, solved = {"role": "user", "content": question}, {"role": "assistant", "content": solution}
                made.append({"prompt": [asked], "completion": [solved]})
    return made

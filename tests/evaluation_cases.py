"""What the evaluation tests share: models whose answers are written down, and data sets in the published shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from misa_engine.evaluation import Subject

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"

#: One record as LLM-Adapters' files have them, by task; the questions are ours.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {
            "instruction": "Please answer the following question with true or false, question: is water wet?\n\n"
            "Answer format: true/false",
            "input": "", "output": "the correct answer is true", "answer": "true",
        },
        {
            "instruction": "Please answer the following question with true or false, question: is ice hot?\n\n"
            "Answer format: true/false",
            "input": "", "output": "the correct answer is false", "answer": "false",
        },
    ],
    "piqa": [
        {
            "instruction": "Please choose the correct solution to the question: How do you open a jar?\n\n"
            "Solution1: Turn the lid.\n\nSolution2: Sing to it.\n\nAnswer format: solution1/solution2",
            "input": "", "output": "the correct answer is solution1", "answer": "solution1",
        }
    ],
    "siqa": [
        {
            "instruction": "Please choose the correct answer to the question: Kim gave Lee a book. How does Lee feel?"
            "\n\nAnswer1: angry\n\nAnswer2: glad\n\nAnswer3: tired\n\nAnswer format: answer1/answer2/answer3",
            "input": "", "output": "the correct answer is answer2", "answer": "answer2",
        }
    ],
    "hellaswag": [
        {
            "instruction": "Please choose the correct ending to complete the given sentence: Baking: She opens the "
            "oven and\n\nEnding1: swims.\n\nEnding2: flies.\n\nEnding3: takes out the bread.\n\nEnding4: sleeps.\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "input": "", "output": "the correct answer is ending3", "answer": "ending3",
        }
    ],
    "winogrande": [
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: The "
            "cup did not fit the box because _ was too large.\n\nOption1: the cup Option2: the box\n\n"
            "Answer format: option1/option2",
            "input": "", "output": "the correct answer is option1", "answer": "option1",
        }
    ],
    "arc-e": [
        {
            "instruction": "Please choose the correct answer to the question: Which is a gas at room temperature?\n\n"
            "Answer1: iron Answer2: oxygen Answer3: salt Answer4: ice\n\n"
            "Answer format: answer1/answer2/answer3/answer4",
            "input": "", "output": "the correct answer is answer2", "answer": "answer2",
        }
    ],
    "arc-c": [
        {
            "instruction": "Please choose the correct answer to the question: What does a falling ball gain?\n\n"
            "Answer1: mass Answer2: colour Answer3: kinetic energy Answer4: charge Answer5: age\n\n"
            "Answer format: answer1/answer2/answer3/answer4/answer5",
            "input": "", "output": "the correct answer is answer3", "answer": "answer3",
        }
    ],
    "obqa": [
        {
            "instruction": "Please choose the correct answer to the question: A plant grows towards\n\n"
            "Answer1: noise Answer2: the moon Answer3: salt Answer4: light\n\n"
            "Answer format: answer1/answer2/answer3/answer4",
            "input": "", "output": "the correct answer is answer4", "answer": "answer4",
        }
    ],
    "gsm8k": [
        {"instruction": "Ann has 3 bags of 24 nuts. How many nuts?", "input": "", "output": "3*24=72", "answer": "72"},
        {"instruction": "Bo pays $1,200 for 2 desks. What is one?", "input": "", "output": "600", "answer": "600.0"},
    ],
    "svamp": [{"instruction": "5 birds, 2 leave. How many?", "input": "", "output": "5-2=3", "answer": ["3.0"]}],
    "mawps": [{"instruction": "Half of 1.5?", "input": "", "output": "0.75", "answer": 0.75}],
    "aqua": [
        {
            "instruction": "What is 10% of 50? Answer Choices: (A) 1 (B) 2 (C) 5 (D) 10 (E) 50",
            "input": "", "output": "0.1 * 50 = 5. The answer is (C).", "answer": ["C"],
        }
    ],
}  # fmt: skip


class Scripted(nn.Module):
    """Answers prompts by a function of their text, in place of a causal language model that generates."""

    def __init__(self, tokenizer: Any, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer = tokenizer, answer
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="scripted"))
        self.asked: list[str] = []
        self.options: dict[str, Any] = {}
        self.batches: list[int] = []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        """The prompts with what follows, padded on the right."""
        self.options = options
        self.batches.append(len(input_ids))
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=False)
            self.asked.append(prompt)
            rows.append(list(self.tokenizer(self.answer(prompt), add_special_tokens=False)["input_ids"]))
        longest = max(map(len, rows), default=0)
        made = torch.tensor([row + [options["pad_token_id"]] * (longest - len(row)) for row in rows])
        return torch.cat((input_ids, made.long().reshape(len(rows), longest)), dim=1)


class Bytes:
    """A byte tokenizer with what evaluators ask of one."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, template: str | None = TEMPLATE) -> None:
        self.chat_template = template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [byte + 3 for byte in text.encode()]}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(int(one) - 3 for one in ids if 3 <= int(one) < 259).decode(errors="replace")

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def scripted(label: str, answer: Callable[[str], str], template: str | None = TEMPLATE) -> Subject:
    """A subject that answers by a function; ``subject.model`` is the Scripted."""
    tokenizer = Bytes(template)
    return Subject(label, f"/models/{label}", lambda: Scripted(tokenizer, answer), lambda: tokenizer, digest=label)


def adapters_data(folder: Path, names: tuple[str, ...] = tuple(RECORDS)) -> Path:
    """LLM-Adapters' data sets as its repository holds them; returns the ``--data`` folder."""
    from misa_engine.evaluation.adapters import ROWS

    for name in names:
        place = folder / "LLM-Adapters" / "dataset" / ROWS[name].folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "test.json").write_text(json.dumps(RECORDS[name], indent=4))
    return folder

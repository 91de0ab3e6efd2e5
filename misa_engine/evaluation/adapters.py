"""The LLM-Adapters protocol: the paper's commonsense and arithmetic tasks, answered in words and matched.

Written anew from the published scripts' behaviour (Hu et al. 2023, arXiv 2304.01933; github.com/AGI-Edgerunners/
LLM-Adapters at 8166572, commonsense_evaluate.py and evaluate.py). What is taken over: Alpaca's prompt, beam search over
4 beams without sampling (temperature 0.1, top_p 0.75 and top_k 40 are passed without do_sample and have no effect), 32
new tokens for commonsense and 256 for arithmetic, the response up to another "### Response:", its first choice word or
last number, numbers equal within 0.001. What is not: the blanks that their source's indentation puts before each line
of the prompt; the letter of AQuA, for which they take the first capital A to E of any word. MAWPS, which their
evaluate.py does not take, is marked as their other numbers are. ``answers`` says what is read more.

The published code of MISA (misa/callbacks.py) differs from theirs: 64 and 512 new tokens (``MISA_TOKENS``), no
indentation, choices whatever their case, the last capital A to E, MAWPS as a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from misa_engine.errors import UserError
from misa_engine.evaluation import answers
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.task import GenerationTask, Item, chat_prompt, limited, read_data
from misa_engine.trainer.manifest import file_digest

PREFIX = "adapters:"
REPOSITORY = "https://github.com/AGI-Edgerunners/LLM-Adapters"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
#: As ``misa train`` writes records of instruction and output.
PLAIN = "### Instruction:\n{}\n\n### Response:\n"
BEAMS = 4
NEW_TOKENS = {"choice": 32, "number": 256, "letter": 256}
#: The published code of MISA's, for comparisons with the paper.
MISA_TOKENS = {"choice": 64, "number": 512, "letter": 512}
#: What follows another of these in an answer is not read.
RESPONSE = "### Response:"
#: Numbers that differ by no more are equal.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """A data set of the protocol."""

    folder: str
    """Below the repository's ``dataset``."""
    kind: str
    """What an answer is: choice, number or letter."""
    words: tuple[str, ...] = ()
    """The choices."""


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{place}" for place in range(1, count + 1))


COMMONSENSE = {
    "boolq": Row("boolq", "choice", ("true", "false")),
    "piqa": Row("piqa", "choice", _numbered("solution", 2)),
    "siqa": Row("social_i_qa", "choice", _numbered("answer", 5)),
    "hellaswag": Row("hellaswag", "choice", _numbered("ending", 4)),
    "winogrande": Row("winogrande", "choice", _numbered("option", 2)),
    "arc-e": Row("ARC-Easy", "choice", _numbered("answer", 5)),
    "arc-c": Row("ARC-Challenge", "choice", _numbered("answer", 5)),
    "obqa": Row("openbookqa", "choice", _numbered("answer", 5)),
}
MATH = {
    "gsm8k": Row("gsm8k", "number"),
    "svamp": Row("SVAMP", "number"),
    "aqua": Row("AQuA", "letter"),
    "mawps": Row("mawps", "number"),
}
ROWS = COMMONSENSE | MATH
#: Names that stand for several.
GROUPS = {"commonsense": tuple(COMMONSENSE), "math": tuple(MATH)}


class AdaptersTask(GenerationTask):
    """``adapters:boolq`` and the others of ROWS."""

    protocol: ClassVar[str] = "adapters"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.row = ROWS[name.removeprefix(PREFIX)]
        self.new_tokens = NEW_TOKENS[self.row.kind]

    def beams(self, settings: Settings) -> int:
        """4 as published, or the user's."""
        return settings.num_beams or BEAMS

    def answer_tokens(self, settings: Settings) -> int:
        """32 or 256 as published, or the user's."""
        return settings.new_tokens or self.new_tokens

    def facts(self, settings: Settings) -> dict[str, Any]:
        """Prompt, generation and the data file's digest."""
        file = self.file(settings)
        return {
            "prompt": {"task": "alpaca", "plain": "plain headings", "chat": "chat template"}[settings.prompt],
            "beams": self.beams(settings), "new_tokens": self.answer_tokens(settings), "limit": settings.limit,
            "data": file.name, "data_sha256": file_digest(file),
        }  # fmt: skip

    def file(self, settings: Settings) -> Path:
        """The data file.

        Raises:
            UserError: it is not there; with the command that gets it.
        """
        data = settings.data or Path("data")
        command = f"git clone --depth 1 {REPOSITORY} {data / 'LLM-Adapters'}"
        if settings.data is None:
            raise UserError(f"{self.name} needs --data DIR, a folder with the data sets of LLM-Adapters. Where there "
                            f"is a network: {command}, then --data {data}")  # fmt: skip
        places = [data / above / self.row.folder for above in ("LLM-Adapters/dataset", "dataset", "")]
        for place in places:
            for name in ("test.json", "test.jsonl", "test.parquet"):
                if (place / name).is_file():
                    return place / name
        raise UserError(f"{self.name} needs {places[0] / 'test.json'}, which is not there. Where there is a network: "
                        f"{command}")  # fmt: skip

    def items(self, settings: Settings) -> list[Item]:
        """The file's records, checked."""
        return limited(_items(self.file(settings), self.row.kind, self.row.words), settings)

    def prompt(self, item: Item, tokenizer: Any, settings: Settings) -> str:
        """Alpaca's, unless the user wants another."""
        if settings.prompt == "chat":
            return chat_prompt(tokenizer, item.question)
        return (PLAIN if settings.prompt == "plain" else ALPACA).format(item.question)

    def mark(self, item: Item, text: str) -> tuple[str | None, bool]:
        """The choice, number or letter, and whether it is the target."""
        text = text.partition(RESPONSE)[0]
        if self.row.kind == "choice":
            said = answers.choice(text, self.row.words)
            return said, said == item.target
        if self.row.kind == "letter":
            said = answers.letter(text)
            return said, said == item.target
        value = answers.number(text)
        return None if value is None else f"{value:g}", value is not None and abs(
            value - float(item.target)
        ) <= TOLERANCE


def _items(file: Path, kind: str, words: Sequence[str]) -> list[Item]:
    made = []
    for place, record in enumerate(read_data(file)):
        question, answer = record.get("instruction"), record.get("answer")
        answer = answer[-1] if isinstance(answer, list) and answer else answer  # arithmetic sets give a list
        target = _target(answer, kind, words)
        if not isinstance(question, str) or target is None:
            needed = {"choice": f"one of {', '.join(words)}", "letter": "a letter A to E", "number": "a number"}[kind]
            raise UserError(f"{file}, record {place + 1}: 'instruction' must be a text and 'answer' {needed}; got "
                            f"{question!r:.60} and {record.get('answer')!r:.40}.")  # fmt: skip
        more = record.get("input")
        made.append(Item(str(place), f"{question}\n\n{more}" if more else question, target))
    return made


def _target(answer: Any, kind: str, words: Sequence[str]) -> str | None:
    if kind == "choice":
        return str(answer).strip().lower() if str(answer).strip().lower() in words else None
    if kind == "letter":
        return answers.letter(str(answer))
    value = answers.number(str(answer))
    return None if value is None else repr(value)

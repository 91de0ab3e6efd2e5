"""What every task is, and the tasks that generate answers: items, prompts, marking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from misa_engine.errors import UserError
from misa_engine.evaluation import generation
from misa_engine.evaluation.results import Record
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.subjects import Subject

if TYPE_CHECKING:
    from misa_engine.evaluation.store import Progress


@dataclass(frozen=True)
class Outcome:
    """What a run of a task gives beside its records."""

    batch_size: int
    """0 where nothing was left to do."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Found while it ran, beside ``Task.facts``."""
    metrics: Mapping[str, Any] | None = None
    """Name -> Estimate, where they are not the means of the records."""


class Task(ABC):
    """One task by its name."""

    protocol: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def check(self, subjects: Sequence[Subject], settings: Settings) -> None:
        """Refuse what cannot work: packages, data, chat templates. Loads no model and writes nothing.

        Raises:
            UserError: saying what to do.
        """

    @abstractmethod
    def facts(self, settings: Settings) -> dict[str, Any]:
        """What the numbers depend on beside the model: prompt, generation, data and its digest. Plain values."""

    @abstractmethod
    def run(self, subject: Subject, settings: Settings, progress: Progress) -> Outcome:
        """Evaluate; hand each finished record to ``progress``, which knows those of an interrupted run."""


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    question: str
    target: str


class GenerationTask(Task):
    """Questions that are answered by generated text, marked one by one."""

    new_tokens: int
    """Of an answer, at most."""

    @abstractmethod
    def items(self, settings: Settings) -> list[Item]:
        """The questions, in a fixed order."""

    @abstractmethod
    def prompt(self, item: Item, tokenizer: Any, settings: Settings) -> str:
        """The text that the answer follows."""

    @abstractmethod
    def mark(self, item: Item, text: str) -> tuple[str | None, bool]:
        """The answer that is read off a generation, None without one, and whether it is right."""

    def beams(self, settings: Settings) -> int:
        """Width of the beam search; 1 is greedy."""
        return 1

    def answer_tokens(self, settings: Settings) -> int:
        """Of an answer, at most."""
        return self.new_tokens

    def chat(self, settings: Settings) -> bool:
        """Whether prompts go through the model's chat template."""
        return settings.prompt == "chat"

    def check(self, subjects: Sequence[Subject], settings: Settings) -> None:
        """The items can be made, and every model has what prompts need."""
        self.items(settings)
        if self.chat(settings):
            check_chat_templates(self.name, subjects)

    def run(self, subject: Subject, settings: Settings, progress: Progress) -> Outcome:
        """Generate in batches of prompts of about one length, and mark."""
        tokenizer = subject.tokenizer
        chat = self.chat(settings)
        items = self.items(settings)
        left = [item for item in items if item.id not in progress.done]
        if not left:
            return Outcome(batch_size=0)
        progress.total = len(items)
        room, new_tokens = room_for(subject.model.config, self.answer_tokens(settings))
        prompts, cut = {}, set()
        for item in left:
            text = self.prompt(item, tokenizer, settings)
            # a chat template writes its special tokens itself
            ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
            while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; an answer follows this
                ids.pop()
            if len(ids) > room:
                cut.add(item.id)
            prompts[item.id] = ids[-room:]
        answered = generation.answers(
            subject, [prompts[item.id] for item in left], new_tokens=new_tokens, beams=self.beams(settings),
            batch_size=settings.batch_size,
        )  # fmt: skip
        for place, text in answered:
            item = left[place]
            answer, right = self.mark(item, text)
            detail: dict[str, Any] = {"question": item.question, "target": item.target}
            detail |= {"generated": text, "answer": answer}
            if item.id in cut:
                detail["prompt_cut"] = True
            progress.add(Record(item.id, {"accuracy": float(right)}, detail=detail))
        shortened = sum(bool(record.detail.get("prompt_cut")) for record in progress.done.values())
        return Outcome(answered.batch_size, {"prompts_cut": shortened, "new_tokens_made": new_tokens})


def room_for(config: Any, new_tokens: int) -> tuple[int, int]:
    """Tokens for a prompt and for its answer within a model's positions; a prompt that is longer loses its beginning.

    Args:
        config: of the model.
        new_tokens: wanted for the answer; no more than half of all positions are given.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    new_tokens = max(1, min(new_tokens, positions // 2))
    return max(1, positions - new_tokens), new_tokens


def check_chat_templates(task: str, subjects: Iterable[Subject]) -> None:
    """Refuse models whose tokenizer has no chat template.

    Raises:
        UserError: naming the model.
    """
    for subject in subjects:
        if getattr(subject.tokenizer, "chat_template", None) is None:
            raise UserError(
                f"{task} asks in chats, and {subject.path} has no chat template: say --prompt plain for prompts "
                "without one, or put a chat_template.jinja into the model's directory."
            )


def chat_prompt(tokenizer: Any, question: str) -> str:
    """A question as the user's turn, up to where the assistant's begins."""
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def limited(items: Sequence[Any], settings: Settings) -> list[Any]:
    """The first ``limit`` of them."""
    return list(items if settings.limit is None else items[: settings.limit])


def read_data(path: Path) -> list[dict[str, Any]]:
    """Records of a .json (a list), .jsonl or .parquet file.

    Raises:
        UserError: it cannot be read.
    """
    import json

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            found: Any = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            found = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else (
                json.loads(text))  # fmt: skip
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path} cannot be read: {error}. Restore the file.") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{path} is no list of records: a JSON list of objects, or one object a line, is needed.")
    return found

"""What an evaluation is asked to do, whichever task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from misa_engine.errors import UserError, did_you_mean

PROMPTS = ("task", "chat", "plain")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of ``evaluate`` and ``misa eval``."""

    data: Path | None = None
    """Folder of local data, in the layout of the hub's data sets (docs/guide/evaluation.md)."""
    limit: int | None = None
    """Items of a task at most, the first ones; None takes all (of problems that are made: 300)."""
    batch_size: int | None = None
    """None: the largest that the planner's arithmetic finds room for."""
    prompt: str = "task"
    """task: as each task's protocol says; chat: the model's chat template everywhere; plain: nowhere."""
    num_beams: int | None = None
    """Of the LLM-Adapters tasks; None is 4, as published."""
    new_tokens: int | None = None
    """Of an answer to the LLM-Adapters tasks, at most; None is 32 for a choice and 256 for a number, as published."""
    num_fewshot: int | None = None
    """Of lm-eval's tasks; None is each task's own number."""

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise UserError(f"prompt is one of {', '.join(PROMPTS)}; got {self.prompt!r}."
                            f"{did_you_mean(self.prompt, PROMPTS)}")  # fmt: skip
        for name, least in (("limit", 1), ("batch_size", 1), ("num_beams", 1), ("new_tokens", 1),
                            ("num_fewshot", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}; got {value}")

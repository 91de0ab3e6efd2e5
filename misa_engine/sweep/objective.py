"""What a sweep compares: the held-out loss at the end of a trial, or a task of ``misa eval``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from misa_engine.errors import UserError, did_you_mean

LOSS = "eval_loss"
#: Tasks of misa eval whose number falls.
LOSSES = ("forgetting",)


@dataclass(frozen=True)
class Objective:
    """What is compared, and in which direction."""

    task: str | None = None
    """Of ``misa eval``; None: the held-out loss."""
    data: str | None = None
    """Directory of the task's data, for ``misa eval --data``."""
    limit: int | None = None
    """Items of the task at most."""

    @property
    def name(self) -> str:
        """As given."""
        return LOSS if self.task is None else f"task:{self.task}"

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """As optuna says it: losses fall, accuracies rise."""
        return "minimize" if self.task in (None, *LOSSES) else "maximize"

    @property
    def needs_base(self) -> bool:
        """Whether the task compares with the model before training."""
        return self.task in LOSSES

    @property
    def words(self) -> list[str]:
        """Options of ``misa eval``."""
        data = ["--data", self.data] if self.data else []
        return ["--tasks", str(self.task), *data, *(["--limit", str(self.limit)] if self.limit else [])]

    def intermediate(self, loss: float) -> float:
        """A held-out loss on the way, so that pruning compares it in the study's direction."""
        return loss if self.direction == "minimize" else -loss

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {"name": self.name, "data": self.data, "limit": self.limit}


def parse_objective(text: str, data: str | None = None, limit: int | None = None) -> Objective:
    """From ``--objective``, ``--task_data`` and ``--task_limit``.

    Raises:
        UserError: it is neither, or tasks cannot be evaluated here.
    """
    if text == LOSS:
        if data or limit:
            raise UserError(f"--task_data and --task_limit belong to --objective task:NAME; it is {LOSS}.")
        return Objective()
    kind, sign, task = text.partition(":")
    if kind != "task" or not sign or not task:
        hint = did_you_mean(text, (LOSS, "task"))
        raise UserError(
            f"--objective {text}: {LOSS}, or task:NAME with a task of misa eval (task:adapters:gsm8k).{hint}"
        )
    if find_spec("misa_engine.evaluation") is None:
        raise UserError(
            f"--objective {text}: this misa_engine has no misa eval. Upgrade it, or compare held-out losses: "
            f"--objective {LOSS}."
        )
    from misa_engine.evaluation.tasks import tasks_named

    tasks_named([task])  # raises what is wrong with the name, closest ones included
    if data is not None and not Path(data).expanduser().is_dir():
        raise UserError(f"--task_data {data} is no directory; looked in {Path.cwd()}.")
    return Objective(task, data, limit)


def check_evaluable(objective: Objective, base: Mapping[str, Any]) -> None:
    """See that ``misa eval`` will take the task, before a trial has trained for it.

    Args:
        objective: of the study.
        base: options of misa train that all trials share; the model that they start from has the tokenizer.

    Raises:
        UserError: data, packages or a chat template are missing, or there is no model before training to compare with.
    """
    if objective.task is None:
        return
    if base.get("from_scratch"):
        if objective.needs_base:
            raise UserError(
                f"--objective {objective.name} compares with the model before training: not --from_scratch."
            )
        return
    from misa_engine.cli.evaluate import subjects_of
    from misa_engine.evaluation.settings import Settings
    from misa_engine.evaluation.tasks import tasks_named

    model = str(base["model_name_or_path"])
    subjects = subjects_of([model], options={model: "--model"}) * (2 if objective.needs_base else 1)
    settings = Settings(data=Path(objective.data).expanduser() if objective.data else None, limit=objective.limit)
    for task in tasks_named([objective.task]):
        task.check(subjects, settings)

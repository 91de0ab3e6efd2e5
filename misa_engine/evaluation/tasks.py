"""Names of tasks, and the tasks that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from misa_engine.errors import UserError, did_you_mean
from misa_engine.evaluation import adapters, harness, reasoning
from misa_engine.evaluation.adapters import AdaptersTask
from misa_engine.evaluation.forgetting import ForgettingTask
from misa_engine.evaluation.harness import HarnessTask
from misa_engine.evaluation.reasoning import ReasoningTask
from misa_engine.evaluation.task import Task

FORGETTING = "forgetting"


def tasks_named(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, groups of ours spelt out, none twice.

    Args:
        names: ``adapters:boolq``, ``adapters:commonsense``, ``adapters:math``, ``reasoning:chain_sum``,
            ``reasoning:mixed``, ``forgetting``, or a task, group or tag of lm-eval.

    Raises:
        UserError: a name is unknown (the closest is named), or its package is not installed.
    """
    if not names:
        raise UserError("no tasks: name some, e.g. adapters:boolq, reasoning:mixed, forgetting or arc_easy.")
    made: dict[str, Task] = {}
    for name in names:
        for task in _tasks(name):
            made.setdefault(task.name, task)
    return list(made.values())


def _tasks(name: str) -> list[Task]:
    if name.startswith(adapters.PREFIX):
        short = name.removeprefix(adapters.PREFIX)
        if short in adapters.GROUPS:
            return [AdaptersTask(adapters.PREFIX + one) for one in adapters.GROUPS[short]]
        if short in adapters.ROWS:
            return [AdaptersTask(name)]
        raise _unknown(name, [adapters.PREFIX + one for one in (*adapters.ROWS, *adapters.GROUPS)])
    if name.startswith(reasoning.PREFIX):
        known = reasoning.family_names()
        if name.removeprefix(reasoning.PREFIX) in known:
            return [ReasoningTask(name)]
        raise _unknown(name, [reasoning.PREFIX + one for one in known])
    if name == FORGETTING:
        return [ForgettingTask(name)]
    if not harness.installed():
        hint = did_you_mean(name, own_names())
        raise UserError(f"unknown task {name!r}.{hint} Tasks here: {', '.join(own_names())}; for lm-eval's, "
                        f"{harness.INSTALL}")  # fmt: skip
    if name in harness.manager().task_index:
        return [HarnessTask(one) for one in harness.members(name)]
    raise _unknown(name, [*own_names(), *harness.manager().all_tasks])


def own_names() -> list[str]:
    """Names of what needs no lm-eval, reasoning-gym's other families left out."""
    ours = [adapters.PREFIX + one for one in (*adapters.GROUPS, *adapters.ROWS)]
    return [*ours, *(reasoning.PREFIX + one for one in (reasoning.MIXED, *reasoning.FAMILIES)), FORGETTING]


def _unknown(name: str, known: Sequence[str]) -> UserError:
    hint = did_you_mean(name, known)
    shown = "" if hint else f" Known are {', '.join(known[:16])}{' and others' if len(known) > 16 else ''}."
    return UserError(f"unknown task {name!r}.{hint}{shown}")

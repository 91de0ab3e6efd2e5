"""Which options name evaluation data, and what they need of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from misa_engine.errors import UserError

#: Any of these gives a run evaluation data.
EVAL_DATA = ("eval_dataset", "eval_split", "eval_fraction")


def check_evaluation_data(given: Mapping[str, Any]) -> None:
    """Refuse options of an evaluation that has no data, or two kinds of it.

    Args:
        given: options that the user set.

    Raises:
        UserError: naming the options.
    """
    fraction = given.get("eval_fraction")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"--eval_fraction is the share held out for evaluation, between 0 and 1; got {fraction}")
    if given.get("max_eval_samples") is not None and given["max_eval_samples"] < 1:
        raise UserError(f"--max_eval_samples must be at least 1; got {given['max_eval_samples']}")
    if fraction is not None and (given.get("eval_dataset") or given.get("eval_split")):
        raise UserError("--eval_fraction and --eval_dataset or --eval_split both name the evaluation data: keep one.")
    if given.get("eval_strategy", "no") != "no" and not any(given.get(name) for name in EVAL_DATA):
        raise UserError("--eval_strategy needs evaluation data: --eval_dataset, --eval_split or --eval_fraction.")
    if given.get("max_eval_samples") and not any(given.get(name) for name in EVAL_DATA):
        raise UserError("--max_eval_samples needs evaluation data: --eval_dataset, --eval_split or --eval_fraction.")

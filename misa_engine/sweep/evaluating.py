"""A task of ``misa eval`` as the objective of a trial, in a process of its own like the training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from misa_engine.sweep import trial
from misa_engine.sweep.objective import Objective

#: In a trial's directory: what misa eval printed, and its results.
OUTPUT, RESULTS = "eval.txt", "eval"
#: In the names of metrics of which less is better.
FALLING = ("loss", "perplexity", "bits_per_byte")


def evaluate(
    model: Path,
    objective: Objective,
    folder: Path,
    launch: Sequence[str],
    stopped: Callable[[], bool] = lambda: False,
    *,
    base: str | None = None,
) -> float | str:
    """What a trained model reaches on a task.

    Args:
        model: directory of the model.
        objective: a task of misa eval.
        folder: of the trial; gets what was printed and the results.
        launch: the command to which ``eval MODEL ...`` is added.
        stopped: says whether the sweep has to end, and the evaluation with it.
        base: the model before training, for a task that compares with it.

    Returns:
        The mean over its tasks of the number that each is known by, or why there is none.
    """
    words = ["eval", str(model), *objective.words, "--output", str(folder / RESULTS)]
    words += ["--base", base] if base is not None and objective.needs_base else []
    with trial.running([*launch, *words], folder / OUTPUT) as child:
        while child.poll() is None:
            if stopped():
                return trial.STOPPED
            time.sleep(trial.EVERY)
    if child.returncode:
        lines = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()
        return f"misa eval ended with exit code {child.returncode}: {lines[-1] if lines else 'no output'}"
    file = folder / RESULTS / "results.json"
    try:
        return value_of(json.loads(file.read_text(encoding="utf-8")), objective)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        return f"misa eval wrote no result of {objective.task} to {file} ({type(error).__name__}: {error})"


def value_of(document: dict[str, Any], objective: Objective) -> float:
    """The mean over the tasks in a results document of misa eval, of the trained model's first metric of each.

    Raises:
        ValueError: there are no results, or the metric goes the other way.
    """
    values = []
    base = document["reference"] if len({result["model"] for result in document["results"]}) > 1 else None
    for result in document["results"]:
        if result["model"] == base:
            continue
        metric, found = next(iter(result["metrics"].items()))
        if any(word in metric for word in FALLING) != (objective.direction == "minimize"):
            raise ValueError(f"{metric} of {result['task']} does not go the way of {objective.name}")
        values.append(float(found["value"]))
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values {values}")
    return sum(values) / len(values)

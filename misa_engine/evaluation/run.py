"""Evaluates models on tasks: checks everything first, then goes model by model, and compares at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from misa_engine.errors import UserError
from misa_engine.evaluation.page import PAGE, page_of
from misa_engine.evaluation.results import Evaluation, Result, compared, summarised
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.store import Progress, slug, stored, what_changed
from misa_engine.evaluation.subjects import Subject
from misa_engine.evaluation.task import Task
from misa_engine.evaluation.tasks import tasks_named
from misa_engine.files import write_whole

RESULTS = "results.json"
PACKAGES = ("misa_engine", "torch", "transformers", "tokenizers", "lm_eval")


def evaluate(
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    output: str | Path,
    *,
    base: Subject | None = None,
    settings: Settings | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate models on tasks and compare them item by item.

    What is complete in ``output`` under the same settings, model files, data and versions is not made again; a task
    that was interrupted goes on behind its last record (lm-eval's tasks begin again).

    Args:
        subjects: the models, with labels that differ.
        tasks: names, see ``tasks_named``.
        output: folder of the results; made when the first record is there.
        base: the model before training: what the others are compared with.
        settings: data, limits, prompts.
        command: the call as the page shows it; empty shows none.
        say: gets a line for each model and task.

    Returns:
        Results and comparisons, also written to ``output/results.json`` and, to be looked at, ``output/index.html``.

    Raises:
        UserError: bad input, before any model is loaded and anything is written.
    """
    settings, output = settings or Settings(), Path(output)
    everyone = [*([base] if base is not None else []), *subjects]
    check(everyone, settings)
    made = tasks_named(tasks)
    for task in made:
        task.check(everyone, settings)
    facts = {task.name: task.facts(settings) for task in made}
    results = []
    for subject in everyone:
        for task in made:
            results.append(_one(subject, task, settings, facts[task.name], output, say))
        subject.release()
    reference = everyone[0].label
    evaluation = Evaluation(tuple(results), compared(results, reference), reference, output)
    for line in unpaired(evaluation):
        say(line)
    write_whole(output / RESULTS, json.dumps(evaluation.to_dict(), indent=2) + "\n")
    write_whole(output / PAGE, page_of(evaluation, command))
    return evaluation


def unpaired(evaluation: Evaluation) -> list[str]:
    """A line for each number that has no difference to the reference's, with the reason."""
    made = []
    for result in evaluation.results:
        for metric in result.metrics if result.model != evaluation.reference else ():
            if evaluation.against_reference(result.model, result.task, metric) is None:
                made.append(
                    f"{result.model}: {result.task} {metric} has no paired difference to {evaluation.reference}: other "
                    "items, another tokenizer, or no mean of single items"
                )
    return made


def check(everyone: Sequence[Subject], settings: Settings) -> None:
    """Refuse calls without models, labels that are not unique, and data that is no folder.

    Raises:
        UserError: saying which.
    """
    if not everyone:
        raise UserError("no model to evaluate: name at least one.")
    labels = [subject.label for subject in everyone]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"two models have the label {twice!r}: results are kept by it, so give each its own.")
    if settings.data is not None and not settings.data.is_dir():
        raise UserError(f"--data {settings.data} is no folder; it holds data sets in the hub's layout.")


def _one(
    subject: Subject, task: Task, settings: Settings, facts: dict[str, Any], output: Path, say: Callable[[str], None]
) -> Result:
    """One model on one task: from disk, or made."""
    place = output / subject.label / f"{slug(task.name)}.json"
    versions = package_versions()
    made_of = [task.name, facts, subject.identity(), subject.dtype, versions]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{subject.label}: {task.name}"
    before = stored(place)
    if before is not None and before.key == key:
        say(f"{name}: done before")
        return before
    progress = Progress(place.with_suffix(".jsonl"), key, lambda line: say(f"{name}: {line}"))
    if before is not None:
        say(f"{name}: made again, because {what_changed(before, facts, subject.identity(), versions)}")
    elif progress.done:
        say(f"{name}: goes on after {len(progress.done)} items")
    began = time.perf_counter()
    try:
        outcome = task.run(subject, settings, progress)
    finally:
        progress.close()
    records = progress.finish()
    metrics = outcome.metrics or summarised(records)
    result = Result(
        task=task.name, protocol=task.protocol, model=subject.label, path=subject.path,
        model_digest=subject.identity(), metrics=metrics, settings={**facts, **outcome.settings}, versions=versions,
        key=key, batch_size=outcome.batch_size, seconds=round(time.perf_counter() - began, 2), records=records,
        records_file=place.with_suffix(".jsonl").name,
    )  # fmt: skip
    write_whole(place, json.dumps(result.to_dict(), indent=2) + "\n")
    first, found = next(iter(metrics.items()))
    error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
    say(f"{name}: {first} {found.value:.4f}{error} of {found.n} in {result.seconds:.0f} s (batch {result.batch_size})")
    return result


def package_versions() -> dict[str, str]:
    """Versions of what the numbers depend on, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""From the runs of an experiment to its document: the table beside the paper's numbers, claims, provenance."""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from misa_engine.bench.measure import PACKAGES, environment
from misa_engine.bench.reproduce.cost import cost_of
from misa_engine.bench.reproduce.experiments import COMMONSENSE_TASKS, EXPERIMENTS, MATH_TASKS, Run
from misa_engine.bench.reproduce.hyperparameters import HYPERPARAMETERS, VARIANTS
from misa_engine.bench.reproduce.paper import ARXIV, CLAIMS, MISSING, TABLED, Claim, reported

Row = dict[str, Any]
#: In place of a number of the paper's.
NOT_TRANSCRIBED, NOT_THEIRS = "not transcribed", "not in the paper"
#: Metrics of which more is better; of all others less is.
HIGHER = frozenset(("average", *MATH_TASKS, *COMMONSENSE_TASKS, "mmlu", "mmlu_pro", "ifeval"))


def document_of(name: str, scale: str, variant: str, device: str, runs: Sequence[Run], rows: Sequence[Row]) -> Row:
    """Everything that the page shows.

    Args:
        name: of the experiment.
        scale: paper or tiny.
        variant: the recipe's first word.
        device: that the runs used.
        runs: all runs of the experiment, run or not.
        rows: of those that were run.
    """
    experiment = EXPERIMENTS[name]
    by_name = {row["case"]: row for row in rows}
    add_loss_at_time(runs, by_name)
    costs = [{"run": run.name, **vars(cost_of(run, variant))} for run in runs] if scale == "paper" or name == "memory" \
        else []  # fmt: skip
    planned = {cost["run"]: cost["vram_bytes"] for cost in costs} if name == "memory" else {}
    table = table_of(name, runs, by_name, planned)
    return {
        "kind": "reproduce", "experiment": name, "title": experiment.title, "summary": experiment.summary,
        "scale": scale, "variant": variant, "paper": ARXIV, "missing": MISSING[name],
        "metrics": list(experiment.metrics), "environment": environment(torch.device(device)), "packages": packages(),
        "table": table, "claims": [checked(claim, table, scale) for claim in CLAIMS if claim.experiment == name],
        "costs": costs, "hyperparameters": hyperparameters(experiment.recipe, variant),
        "runs": [_short(run, by_name.get(run.name)) for run in runs],
    }  # fmt: skip


def table_of(name: str, runs: Sequence[Run], rows: Mapping[str, Row], planned: Mapping[str, Any]) -> list[Row]:
    """A line for each model and label: medians over seeds with their range, and the paper's numbers."""
    lines: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        lines[run.model, run.entry.label].append(run)
    table = []
    for (model, label), own in lines.items():
        found = [rows[run.name] for run in own if run.name in rows]
        done = [row for row in found if row["status"] == "ok"]
        line: Row = {"model": model, "label": label, "seeds": len(done), "of": len(own), "cells": {}}
        line["status"] = "" if done else (found[0]["status"] if found else "not run")
        for metric in EXPERIMENTS[name].metrics:
            values = [value for row in done if (value := metric_of(row, metric)) is not None]
            if metric == "planned_bytes":
                values = [float(size) for run in own if (size := planned.get(run.name))]
            told = reported(name, model, label, metric)
            cell: Row = {"paper": told.value, "source": told.source} if told else {}
            if told is None and metric in TABLED.get(name, ()):
                cell["lacking"] = NOT_TRANSCRIBED if own[0].entry.of_the_paper else NOT_THEIRS
            if values:
                cell |= {"median": statistics.median(values), "least": min(values), "most": max(values)}
            line["cells"][metric] = cell
        table.append(line)
    return table


def metric_of(row: Row, metric: str) -> float | None:
    """A number of a run; None where it was not measured."""
    if row["kind"] == "steps":
        if metric == "held_bytes":
            return float(sum(row["optimizer_bytes"].values())) if row.get("optimizer_bytes") else None
        return row.get(metric)
    found = row.get("reproduce", {}).get("metrics", {}).get(metric)
    return None if found is None else float(found)


def add_loss_at_time(runs: Sequence[Run], rows: Mapping[str, Row]) -> None:
    """Give each run its loss at the moment when the fastest run of its model and seed has ended."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for run in runs:
        row = rows.get(run.name)
        if row is not None and row["status"] == "ok" and row["kind"] == "reproduce":
            groups[run.model, run.seed].append(row["reproduce"])
    for group in groups.values():
        end = min(ours["curve"][-1]["seconds"] for ours in group)
        for ours in group:
            ours["metrics"]["loss_at_time"] = loss_at(ours["curve"], end)


def loss_at(curve: Sequence[Mapping[str, float]], seconds: float) -> float:
    """Held-out loss at a time, straight between the curve's points."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after["seconds"] >= seconds:
            width = after["seconds"] - before["seconds"]
            share = (seconds - before["seconds"]) / width if width else 1.0
            return before["heldout_loss"] + share * (after["heldout_loss"] - before["heldout_loss"])
    return curve[-1]["heldout_loss"]


def checked(claim: Claim, table: Sequence[Row], scale: str) -> Row:
    """What became of a claim: for each model both numbers and whether they stand in the order that the paper states.

    At scale tiny nothing is judged: ``holds`` is None.
    """
    found = []
    models = dict.fromkeys(line["model"] for line in table)
    for model in [claim.model] if claim.model else models:
        cells = {line["label"]: line["cells"].get(claim.metric, {}) for line in table if line["model"] == model}
        ours, theirs = (cells.get(label, {}).get("median") for label in (claim.better, claim.worse))
        holds = None
        if ours is not None and theirs is not None and scale != "tiny":
            sign = -1 if claim.metric in HIGHER else 1
            holds = sign * ours < sign * theirs or (claim.close > 0 and abs(ours / theirs - 1) <= claim.close)
        found.append({"model": model, "better": ours, "worse": theirs, "holds": holds})
    said = f"{claim.better} {'close to or ' if claim.close else ''}better than {claim.worse}, {claim.metric}"
    return {"said": said, "source": claim.source, "found": found}


def hyperparameters(recipe: str, variant: str) -> list[Row]:
    """The recipe's settings with their sources."""
    return [vars(row) for row in (VARIANTS[variant], *HYPERPARAMETERS[recipe])]


def _short(run: Run, row: Row | None) -> Row:
    """What the page says of a single run."""
    found: Row = {"run": run.name, "model": run.model, "label": run.entry.label, "seed": run.seed}
    found["source"] = run.entry.source
    if row is None:
        return found | {"status": "not run"}
    ours = row.get("reproduce", {})
    names = ("curve", "metrics", "steps", "tokens", "base_digest", "data_digest", "trained_parameters", "notes")
    return found | {"status": row["status"], "case_s": row.get("case_s"), **{n: ours[n] for n in names if n in ours}}


def packages() -> dict[str, Row]:
    """Version of each package and SHA-256 of the list of its files' hashes (RECORD), the first 16 digits."""
    found: dict[str, Row] = {}
    for name in (*PACKAGES, "datasets", "tokenizers", "lm_eval"):
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        record = distribution.read_text("RECORD") or ""
        found[name] = {"version": distribution.version, "sha256": hashlib.sha256(record.encode()).hexdigest()[:16]}
    return found

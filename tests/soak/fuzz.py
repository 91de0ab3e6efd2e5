"""Fuzz cases by the number, each finding shrunk to what it needs."""

from __future__ import annotations

import hashlib
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from soak.cases import Case, draw
from soak.oracle import Finding
from soak.stepping import Run


def run_case(case: Case) -> Counter[str]:
    """Run one case; for one that reloads, also compare its bits with the same case left in peace.

    Raises:
        Finding: what differs, or what the engine raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = _guarded(lambda: Run(case))
        if run is None:
            return Counter({"refused at construction": 1})
        counts = _guarded(run.all_steps)
        assert counts is not None
        if case.reload:
            peace = Run(replace(case, reload=False))
            _guarded(peace.all_steps)
            if weights_digest(peace.model) != weights_digest(run.model):
                raise Finding("a run that went on from a checkpoint ended with other bits than one left in peace")
            counts["bitwise equal continuations"] += 1
    return counts


def _guarded(call: Callable[[], Any]) -> Any:
    """Call; None where the engine refuses the model or options by a ValueError that says so."""
    try:
        return call()
    except (Finding, KeyboardInterrupt):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        refusals = ("budget", "matches no parameter", "delta")
        if (
            isinstance(error, ValueError)
            and any(word in str(error) for word in refusals)
            and isinstance(call, type(lambda: 0))
        ):
            return None
        where = next(
            (f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(place) if "misa_engine" in f.filename), ""
        )
        raise Finding(
            f"{type(error).__name__} {where}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        ) from error


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kind_of(finding: object) -> str:
    """A finding without its numbers and names."""
    words = re.sub(r"[\w.]*(layers?|\bh|transformer|embed\w*|head|\d)\.[\w.]*", "NAME", str(finding))
    return re.sub(r"[-+]?\d[\d.e+-]*|nan|inf", "N", words)[:90]


def shrink(case: Case, finding: Finding) -> list[str]:
    """Fields and options that may be plain without this finding going away."""
    away: list[str] = []
    named = [f.name for f in fields(Case) if f.name not in ("seed", "family", "steps")]
    optional = [f"options.{name}" for name in case.options if name not in ("lr", "delta", "inner_steps", "seed")]
    for name in (*[n for n in named if n != "options"], *optional):
        try:
            if case.plain(*away, name) != case.plain(*away):
                run_case(case.plain(*away, name))
        except Finding as other:
            if kind_of(other) == kind_of(finding):
                away.append(name)
    return away


def reproduction(case: Case, away: list[str]) -> str:
    return f"python tests/soak fuzz --case {case.seed}" + (f" --plain {','.join(away)}" if away else "")


def fuzz(
    seeds: Any, keep_going: Callable[[], bool], report: Callable[[str], None]
) -> tuple[Counter[str], list[dict[str, str]]]:
    """Run cases until ``keep_going`` says no. Returns counts and findings, each with its reproduction."""
    counts, findings, kinds = Counter[str](), [], Counter[str]()
    for seed in seeds:
        if not keep_going():
            break
        case = draw(seed)
        counts["cases"] += 1
        try:
            counts += run_case(case)
        except Finding as finding:
            kinds[kind_of(finding)] += 1
            counts["cases with a finding"] += 1
            if kinds[kind_of(finding)] > 2:  # two of a kind are enough to read
                continue
            away = shrink(case, finding)
            findings.append(
                {"finding": str(finding), "reproduction": reproduction(case, away), "case": str(case.plain(*away))}
            )
            report(f"FINDING {finding}\n   {findings[-1]['reproduction']}\n   {findings[-1]['case']}")
    for kind, number in kinds.items():
        report(f"{number} x {kind}")
    return counts, findings

"""What a run did, as arrays: ``Digest.of`` reads a run's log once, the pictures and the table read only the digest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class LoggedUnit:
    """A unit as the log's "run" entry describes it."""

    name: str
    numel: int
    layer: int | None
    kind: str


@dataclass(frozen=True)
class Digest:
    """One run. R rounds, B units, in the order of the log."""

    units: tuple[LoggedUnit, ...]
    rounds: np.ndarray  # (R,) int, number of each round that was trained
    round_steps: np.ndarray  # (R,) int, optimizer steps made when it began
    active: np.ndarray  # (R, B) bool
    probabilities: np.ndarray  # (R, B) float, distribution that the round was drawn from
    visits: np.ndarray  # (B,) int, rounds in which the unit trained, over the whole run
    trained_steps: np.ndarray  # (B,) int, optimizer steps that the unit trained; rounds that the log lost count as T
    entropy: np.ndarray  # (R,) float, normalised entropy of the probabilities; nan where the log has none
    scores: np.ndarray  # (B,) float, latest G_u; nan where the log has none
    covered_at: int | None  # first round by whose end every unit had trained; None if that never happened
    loss: Curve
    heldout: Curve
    baselines: dict[str, dict[str, Any]]  # name -> the "baseline" entry's fields
    description: dict[str, Any]  # the "run" entry: model, units, options, versions
    end: dict[str, Any]  # empty while the run goes on
    last_step: int

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, Any]]) -> Digest:
        """Collect what the pictures and the table need from log entries (``RunLog.read``).

        The last switch draws units for a round that is never trained when the run ends with it; that draw is no visit.
        """
        description: dict[str, Any] = {}
        end: dict[str, Any] = {}
        for entry in entries:
            if entry["type"] == "run":
                description.update(entry)
            elif entry["type"] == "end":
                end = dict(entry)
        units = tuple(LoggedUnit(u["name"], u["numel"], u["layer"], u["kind"]) for u in description.get("units", ()))
        index = {unit.name: i for i, unit in enumerate(units)}
        last_step = max((entry["step"] for entry in entries), default=0)
        switches = [entry for entry in entries if entry["type"] == "switch"]
        trained = [entry for entry in switches if entry["step"] < last_step or not end]

        active = np.zeros((len(trained), len(units)), dtype=bool)
        probabilities = np.full((len(trained), len(units)), np.nan)
        for row, entry in enumerate(trained):
            active[row, [index[name] for name in entry["active"] if name in index]] = True
            probabilities[row] = _by_unit(entry.get("probabilities") or {}, units)

        visits = np.zeros(len(units), dtype=int)
        if switches:  # the counts reach back to before a log that lost its first rounds
            visits = np.nan_to_num(_by_unit(switches[-1].get("visits") or {}, units)).astype(int)
            for entry in switches[len(trained) :]:
                visits[[index[name] for name in entry["active"] if name in index]] -= 1
        steps = np.array([entry["step"] for entry in trained], dtype=int)
        lengths = np.diff(steps, append=last_step)
        round_length = (description.get("config") or {}).get("inner_steps", 1)
        lost = np.maximum(0, visits - active.sum(axis=0))
        seen = (
            np.logical_or.accumulate(active, axis=0).all(axis=1) if len(trained) and units else np.zeros(0, dtype=bool)
        )
        return cls(
            units=units,
            rounds=np.array([entry["round"] for entry in trained], dtype=int),
            round_steps=steps,
            active=active,
            probabilities=probabilities,
            visits=visits,
            trained_steps=lengths @ active + round_length * lost if len(trained) else round_length * lost,
            entropy=np.array([entry.get("entropy", np.nan) for entry in trained], dtype=float),
            scores=_by_unit(end.get("scores") or (switches[-1].get("scores") if switches else None) or {}, units),
            covered_at=int(trained[int(np.argmax(seen))]["round"]) if seen.any() else None,
            loss=_curve(entries, "loss"),
            heldout=_curve(entries, "eval_loss"),
            baselines={entry["name"]: dict(entry) for entry in entries if entry["type"] == "baseline"},
            description=description,
            end=end,
            last_step=last_step,
        )

    @property
    def label(self) -> str:
        """What the run was, in a few words, for titles."""
        config = self.description.get("config") or {}
        model = os.path.basename(str(self.description.get("model", "")).rstrip("/")) or "model"
        if self.description.get("optimizer") == "adamw":
            return f"{model}, AdamW"
        parts = [f"δ = {self.description['delta']:.3g}"] if "delta" in self.description else []
        parts += [f"T = {config['inner_steps']} steps"] if "inner_steps" in config else []
        parts += [f"η = {config['eta']:.3g}"] if "eta" in config else []
        parts += [f"{self.description['residents']['format']} residents"] if self.description.get("residents") else []
        return f"{model}, MISA ({', '.join(parts)})" if parts else f"{model}, MISA"


def _by_unit(values: Mapping[str, float | None], units: Sequence[LoggedUnit]) -> np.ndarray:
    return np.array([values.get(unit.name) for unit in units], dtype=float)  # None becomes nan


def _curve(entries: Sequence[Mapping[str, Any]], key: str) -> Curve:
    points = {entry["step"]: entry[key] for entry in entries if entry["type"] == "metrics" and key in entry}
    return [(step, float("nan") if value is None else float(value)) for step, value in sorted(points.items())]

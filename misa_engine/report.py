"""What a run did, from its log alone: pictures, and the table that is printed at the end.

``digest`` turns log entries into arrays once; the pictures (``pictures.py``) and the table read only those.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_engine.runlog import RunLog, log_path

if TYPE_CHECKING:
    from rich.table import Table

#: Up to this many units each gets its own row in the table; above it, layers are grouped by thirds of the depth.
_SINGLE_ROWS = 32

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
    scores: np.ndarray  # (B,) float, latest G_u; nan where the log has none
    covered_at: int | None  # first round by whose end every unit had trained; None if that never happened
    loss: Curve
    heldout: Curve
    baselines: dict[str, dict[str, Any]]  # name -> the "baseline" entry's fields
    run: dict[str, Any]
    end: dict[str, Any]  # empty while the run goes on
    last_step: int

    @property
    def label(self) -> str:
        """What the run was, in a few words, for titles."""
        config = self.run.get("config") or {}
        model = os.path.basename(str(self.run.get("model", "")).rstrip("/")) or "model"
        if self.run.get("optimizer") == "adamw":
            return f"{model}, AdamW"
        parts = [f"δ = {self.run['delta']:.3g}"] if "delta" in self.run else []
        parts += [f"T = {config['inner_steps']} steps"] if "inner_steps" in config else []
        parts += [f"η = {config['eta']:.3g}"] if "eta" in config else []
        return f"{model}, MISA ({', '.join(parts)})" if parts else f"{model}, MISA"


def digest(entries: Sequence[Mapping[str, Any]]) -> Digest:
    """Collect what the pictures and the table need from log entries (``RunLog.read``).

    The last switch draws units for a round that is never trained when the run ends with it; such a draw is no visit.
    """
    run: dict[str, Any] = {}
    end: dict[str, Any] = {}
    for entry in entries:
        if entry["type"] == "run":
            run.update(entry)
        elif entry["type"] == "end":
            end = dict(entry)
    units = tuple(LoggedUnit(u["name"], u["numel"], u["layer"], u["kind"]) for u in run.get("units", ()))
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
    seen = np.logical_or.accumulate(active, axis=0).all(axis=1) if len(trained) and units else np.zeros(0, dtype=bool)
    return Digest(
        units=units,
        rounds=np.array([entry["round"] for entry in trained], dtype=int),
        round_steps=np.array([entry["step"] for entry in trained], dtype=int),
        active=active,
        probabilities=probabilities,
        visits=visits,
        scores=_by_unit(end.get("scores") or (switches[-1].get("scores") if switches else None) or {}, units),
        covered_at=int(trained[int(np.argmax(seen))]["round"]) if seen.any() else None,
        loss=_curve(entries, "loss"),
        heldout=_curve(entries, "eval_loss"),
        baselines={entry["name"]: dict(entry) for entry in entries if entry["type"] == "baseline"},
        run=run,
        end=end,
        last_step=last_step,
    )


def make_report(out_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw the pictures of the run in ``out_dir`` from its log, next to the log.

    Returns:
        The files written: ``importance_map.png`` and ``visits.png`` (runs that draw units), ``loss.png``.

    Raises:
        ValueError: there is no log, it is damaged, or it holds nothing to draw yet.
        ImportError: matplotlib is not installed.
    """
    path = log_path(out_dir)
    if not path.is_file():
        raise ValueError(
            f"no run log ({path.name}) in {path.parent}. Give the --output_dir of a run of 'misa train'; the log is "
            "there from the first step on."
        )
    found = digest(RunLog.read(path))
    from misa_engine import pictures

    wanted = {
        "importance_map.png": pictures.importance_map if len(found.rounds) and found.units else None,
        "loss.png": pictures.loss_curves if found.loss or found.heldout else None,
        "visits.png": pictures.visit_counts if len(found.rounds) and found.units else None,
    }
    if not any(wanted.values()):
        raise ValueError(f"{path} holds neither a loss nor a round yet: nothing to draw. Try again after a few steps.")
    return [pictures.save(draw(found), path.parent / name) for name, draw in wanted.items() if draw is not None]


def summary_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """What trained, how often, and how far it moved: one row a unit, or a third of the layers for each kind.

    Args:
        entries: the run log's, up to and including its "end" entry.

    Returns:
        A table for ``rich.print``. "visits" is the number of rounds in which a matrix trained (least–most in the row),
        "rounds" the same as a share, "change" the mean of ‖θ_end − θ_start‖ / ‖θ_start‖. The last rows are the
        parameters that are always trained and those that are frozen.
    """
    from rich import box
    from rich.table import Table

    found = digest(entries)
    changes = found.end.get("relative_change") or {}
    unit_of = {name: _unit_of(name, {unit.name: i for i, unit in enumerate(found.units)}) for name in changes}
    rounds = len(found.rounds)
    title = f"What trained: {rounds} rounds, {found.last_step} steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("matrix", no_wrap=True)  # the widest row fits 80 columns
    table.add_column("layers", no_wrap=True)
    for column in ("units", "visits", "rounds", "score G", "G/mean", "change"):
        table.add_column(column, justify="right", no_wrap=True)

    mean_score = np.nanmean(found.scores) if np.isfinite(found.scores).any() else np.nan
    previous = None
    for kind, layers, members in _groups(found.units):
        if previous not in (None, kind):
            table.add_section()
        previous = kind
        visits = found.visits[members]
        scores = found.scores[members]
        score = np.nanmean(scores) if np.isfinite(scores).any() else np.nan
        moved = [value for name, value in changes.items() if value is not None and unit_of[name] in set(members)]
        spread = f"{visits.min()}–{visits.max()}" if visits.min() != visits.max() else f"{visits.max()}"
        table.add_row(
            kind,
            layers,
            str(len(members)),
            spread,
            f"{visits.mean() / rounds:.0%}" if rounds else "–",
            f"{score:.2e}" if np.isfinite(score) else "–",
            f"{score / mean_score:.2f}" if np.isfinite(score) and mean_score > 0 else "–",
            f"{np.mean(moved):.2%}" if moved else "–",
        )
    always = [value for name, value in changes.items() if unit_of[name] is None and value not in (None, 0.0)]
    if always:
        table.add_section()
        table.add_row("always on", "–", str(len(always)), "–", "100%", "–", "–", f"{np.mean(always):.2%}")
    frozen, unchanged = found.end.get("frozen"), found.end.get("unchanged_frozen")
    if frozen or unchanged:
        unchanged = unchanged or 0
        frozen = unchanged if frozen is None else frozen
        state = "none" if unchanged == frozen else f"{frozen - unchanged} CHANGED"  # compared bit for bit
        table.add_section()
        table.add_row("frozen", "–", str(frozen), "0", "0%", "–", "–", state)
    return table


def _groups(units: Sequence[LoggedUnit]) -> list[tuple[str, str, list[int]]]:
    """(kind, layers in words, indices of the units), in the order in which the kinds appear, outside units last."""
    rows = []
    for kind in dict.fromkeys(unit.kind for unit in units if unit.layer is not None):
        members = [i for i, unit in enumerate(units) if unit.kind == kind and unit.layer is not None]
        layers = sorted({units[i].layer or 0 for i in members})
        parts = len(layers) if len(units) <= _SINGLE_ROWS else min(3, (len(layers) + 1) // 2)
        for part in np.array_split(np.array(layers), parts):
            words = f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}"
            rows.append((kind, words, [i for i in members if units[i].layer in part]))
    rows += [(unit.kind, "outside", [i]) for i, unit in enumerate(units) if unit.layer is None]
    return rows


def _by_unit(values: Mapping[str, float | None], units: Sequence[LoggedUnit]) -> np.ndarray:
    return np.array([values.get(unit.name) for unit in units], dtype=float)  # None becomes nan


def _unit_of(parameter: str, index: Mapping[str, int]) -> int | None:
    """The unit that holds a parameter: its own name, or the longest prefix that names a unit."""
    prefix = parameter
    while prefix:
        if prefix in index:
            return index[prefix]
        prefix = prefix.rpartition(".")[0]
    return None


def _curve(entries: Sequence[Mapping[str, Any]], key: str) -> Curve:
    points = {entry["step"]: entry[key] for entry in entries if entry["type"] == "metrics" and key in entry}
    return [(step, float("nan") if value is None else float(value)) for step, value in sorted(points.items())]

"""The table that a run prints at its end, from its log alone: what trained, how often, how far it moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_engine.report.digest import Digest, LoggedUnit

if TYPE_CHECKING:
    from rich.table import Table

#: Up to this many units each gets its own row in the table; above it, layers are grouped by thirds of the depth.
_SINGLE_ROWS = 32


def summary_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """What trained, how often, and how far it moved: one row a unit, or a third of the layers for each kind.

    Args:
        entries: the run log's, up to and including its "end" entry.

    Returns:
        A table for ``rich.print``. "visits" is the number of rounds in which a matrix trained (least–most in the row),
        "rounds" the same as a share, "change" the mean of ‖θ_end − θ_start‖ / ‖θ_start‖. The last rows are the
        parameters that are always trained and those that are frozen. Below it stands how visits are distributed over
        the weights (``coverage_lines``).
    """
    from rich import box
    from rich.table import Table

    digest = Digest.of(entries)
    changes = digest.end.get("relative_change") or {}
    unit_of = {name: _unit_of(name, {unit.name: i for i, unit in enumerate(digest.units)}) for name in changes}
    rounds = len(digest.rounds)
    title = f"What trained: {rounds} rounds, {digest.last_step} steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("matrix", no_wrap=True)  # the widest row fits 80 columns
    table.add_column("layers", no_wrap=True)
    for column in ("units", "visits", "rounds", "score G", "G/mean", "change"):
        table.add_column(column, justify="right", no_wrap=True)

    mean_score = np.nanmean(digest.scores) if np.isfinite(digest.scores).any() else np.nan
    previous = None
    for kind, layers, members in _groups(digest.units):
        if previous not in (None, kind):
            table.add_section()
        previous = kind
        visits = digest.visits[members]
        scores = digest.scores[members]
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
    frozen, unchanged = digest.end.get("frozen"), digest.end.get("unchanged_frozen")
    if frozen or unchanged:
        unchanged = unchanged or 0
        frozen = unchanged if frozen is None else frozen
        state = "none" if unchanged == frozen else f"{frozen - unchanged} CHANGED"  # compared bit for bit
        table.add_section()
        table.add_row("frozen", "–", str(frozen), "0", "0%", "–", "–", state)
    table.caption, table.caption_justify, table.caption_style = "\n".join(coverage_lines(digest)), "left", ""
    return table


def coverage_lines(digest: Digest) -> list[str]:
    """How the run's visits are distributed over the weights that can be drawn, and how even the draws were.

    A weight's visits are the steps that it trained, divided by T: one-step rounds of the cold start count as 1/T.
    """
    config = digest.description.get("config") or {}
    lines = _resident_lines(digest.description.get("residents") or {})
    sizes = np.array([unit.numel for unit in digest.units], dtype=float)
    if not len(sizes) or "inner_steps" not in config:
        return lines
    visits = digest.trained_steps / config["inner_steps"]
    order = np.argsort(visits, kind="stable")
    middle = visits[order][np.searchsorted(np.cumsum(sizes[order]), sizes.sum() / 2)]
    never = sizes[digest.trained_steps == 0].sum() / sizes.sum()
    rest = config.get("rest", "none")
    moved = "" if rest == "none" else f"; the others moved by {rest}"
    lines += [
        f"visits (steps/T): min {visits.min():.2f}, median {middle:.2f}, "
        f"mean {visits @ sizes / sizes.sum():.2f}, max {visits.max():.2f}",
        f"never trained: {never:.1%} of what can be drawn{moved}",
    ]
    drawn = digest.entropy[np.isfinite(digest.entropy)]
    if len(drawn):
        lines.append(f"entropy of draws (1 is uniform): median {np.median(drawn):.2f}, lowest {drawn.min():.2f}")
    return lines


def _resident_lines(residents: Mapping[str, Any]) -> list[str]:
    """How what was not drawn rested."""
    if not residents:
        return []
    loss = ""
    if "loss" in residents:
        loss = f"; loss before training {residents['loss']:.4f}, {residents['exact_loss']:.4f} with exact weights"
    return [f"{residents['format']} residents: {residents['matrices']} matrices rest in 8 bits{loss}"]


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


def _unit_of(parameter: str, index: Mapping[str, int]) -> int | None:
    """The unit that holds a parameter: its own name, or the longest prefix that names a unit."""
    prefix = parameter
    while prefix:
        if prefix in index:
            return index[prefix]
        prefix = prefix.rpartition(".")[0]
    return None

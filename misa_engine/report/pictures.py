"""The report's pictures: from a run's log to PNG files. Each picture is a function of the run's ``Digest``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_engine.report.digest import Curve, Digest
from misa_engine.report.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    mean_of_known,
    new_figure,
    save,
    short_name,
    whole_numbers,
    write_titles,
)
from misa_engine.report.importance_map import importance_map
from misa_engine.report.log import RunLog, log_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    digest = Digest.of(RunLog.read(path))

    wanted = {
        "importance_map.png": importance_map if len(digest.rounds) and digest.units else None,
        "loss.png": loss_curves if digest.loss or digest.heldout else None,
        "visits.png": visit_counts if len(digest.rounds) and digest.units else None,
    }
    if not any(wanted.values()):
        raise ValueError(f"{path} holds neither a loss nor a round yet: nothing to draw. Try again after a few steps.")
    return [save(picture(digest), path.parent / name) for name, picture in wanted.items() if picture is not None]


# ---- loss ----


def loss_curves(digest: Digest) -> Figure:
    """Training and held-out loss against optimizer steps, with those of the baselines in the log."""
    figure = new_figure(9, 5.2)
    axes = figure.add_axes((0.085, 0.12, 0.885, 0.7))
    own = "AdamW" if digest.description.get("optimizer") == "adamw" else "MISA"
    _loss_pair(axes, own, BLUE, "o", "-", digest.loss, digest.heldout)
    for (name, entry), colour in zip(digest.baselines.items(), (ORANGE, GREEN, PINK), strict=False):
        _loss_pair(axes, name, colour, "s", "--", entry.get("loss") or [], entry.get("eval_loss") or [])
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9.5)
    whole_numbers(axes.xaxis)
    heldout = digest.heldout or any(entry.get("eval_loss") for entry in digest.baselines.values())
    title = "Training loss" if not heldout else "Training and held-out loss" if digest.loss else "Held-out loss"
    write_titles(figure, 0.085 * 9, title, f"{digest.label}, {digest.last_step} steps")
    return figure


def _loss_pair(axes: Axes, name: str, colour: str, marker: str, line: str, loss: Curve, heldout: Curve) -> None:
    if loss:
        steps, values = zip(*loss, strict=True)
        noisy = len(values) > 25
        axes.plot(
            steps,
            values,
            color=colour,
            linewidth=0.9,
            alpha=0.3 if noisy else 0.55,
            linestyle=line,
            label=None if noisy else f"{name}, training",
        )
        if noisy:
            axes.plot(
                steps,
                _smooth(values),
                color=colour,
                linewidth=1.3,
                alpha=0.75,
                linestyle=line,
                label=f"{name}, training (running mean)",
            )
    if heldout:
        steps, values = zip(*heldout, strict=True)
        ends = f": {values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f": {values[0]:.3f}"
        axes.plot(
            steps,
            values,
            color=colour,
            linewidth=2.0,
            linestyle=line,
            marker=marker,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=f"{name}, held out{ends}",
        )


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over about a twentieth of the curve, symmetric around each point, so narrower towards the ends."""
    series = np.asarray(values, dtype=float)
    widest, last = max(2, len(series) // 40), len(series) - 1
    half = [min(i, last - i, widest) for i in range(len(series))]
    return np.array([mean_of_known(series[i - h : i + h + 1]) for i, h in enumerate(half)])


# ---- visits ----


def visit_counts(digest: Digest) -> Figure:
    """Layer x kind table in colour: in how many rounds each matrix trained."""
    kinds = list(dict.fromkeys(unit.kind for unit in digest.units if unit.layer is not None))
    outside = [i for i, unit in enumerate(digest.units) if unit.layer is None]
    layers = sorted({unit.layer for unit in digest.units if unit.layer is not None})
    table = np.full((len(layers), len(kinds)), np.nan)
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            members = [i for i, unit in enumerate(digest.units) if unit.layer == layer and unit.kind == kind]
            if members:
                table[row, column] = digest.visits[members].mean()
    cell = 0.27
    width = max(6.4, 0.95 * len(kinds) + 2.6)
    strip = 0.85 if outside and kinds else 0.0
    body = max(1.3, cell * len(layers)) if kinds else 0.6
    head, foot = 1.25, 0.75
    height = head + body + strip + foot
    figure = new_figure(width, height)
    left, right = 0.75 / width, 1 - 1.35 / width
    limit = max(1.0, float(digest.visits.max()))
    image: Any = None
    if kinds:
        axes = figure.add_axes((left, (foot + strip) / height, right - left, body / height))
        image = _numbers(axes, table, limit)
        _layer_axis_all(axes, layers)
        axes.set_xticks(range(len(kinds)), kinds, fontsize=9)
        axes.set_xlabel("matrix")
    if outside:
        low = foot / height if kinds else (foot + strip) / height
        axes = figure.add_axes((left, low - (0.12 / height if kinds else 0), right - left, 0.3 / height))
        image = _numbers(axes, digest.visits[outside][None, :].astype(float), limit)
        axes.set_yticks([0], ["outside"], fontsize=8)
        axes.set_xticks(range(len(outside)), [short_name(digest.units[i]) for i in outside], fontsize=8)
    bar_height = min(3.5, max(body, 1.2))
    bar_axes = figure.add_axes(
        (right + 0.25 / width, 1 - (head + bar_height) / height, 0.15 / width, bar_height / height)
    )
    figure.colorbar(image, cax=bar_axes).set_label("rounds", fontsize=9)
    bar_axes.tick_params(labelsize=8)
    whole_numbers(bar_axes.yaxis, most=4)  # they crowd at the top of a square-root scale
    never = int((digest.visits == 0).sum())
    words = (
        "every matrix trained at least once" if not never else f"{never} of {len(digest.units)} matrices never trained"
    )
    write_titles(
        figure,
        left * width,
        "How often each matrix trained",
        digest.label,
        f"Number = rounds out of {len(digest.rounds)}; {words}",
    )
    return figure


def _numbers(axes: Axes, table: np.ndarray, limit: float) -> Any:
    """A heat map from 0 to ``limit`` with each cell's number written in it; a cell that does not exist stays grey."""
    from matplotlib.colors import PowerNorm

    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(
        table,
        cmap="YlGnBu",
        norm=PowerNorm(0.5, vmin=0, vmax=limit),  # a few favourites must not flatten all other colours
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            text = f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
            colour = "white" if value > 0.36 * limit else "black" if value else ORANGE
            weight = "normal" if value else "bold"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour, weight=weight)
    axes.set_xticks(np.arange(-0.5, table.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, table.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    return image


def _layer_axis_all(axes: Axes, layers: Sequence[int]) -> None:
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_ylabel("layer")

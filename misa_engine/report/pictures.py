"""The report's pictures. Each function takes a run's ``Digest`` and returns a matplotlib figure.

Colours are told apart by colour-blind readers: Okabe-Ito for lines, PuOr and YlGnBu for maps. Figures are drawn on
matplotlib's Agg canvas without pyplot, so no display is needed and no global state is touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_engine.report.digest import Curve, Digest, LoggedUnit, digest
from misa_engine.report.log import RunLog, log_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
#: Pixels an inch of every picture.
DPI = 150
#: More rounds than this are averaged in groups: at 4 inches a panel, a column narrower than two pixels hides marks.
_MOST_COLUMNS = 300

#: What a matrix kind is called in a title.
KIND_TITLES = {
    "q": "attention: query (q)",
    "k": "attention: key (k)",
    "v": "attention: value (v)",
    "o": "attention: output (o)",
    "qkv": "attention: query, key, value (qkv)",
    "gate": "MLP: gate",
    "up": "MLP: up",
    "down": "MLP: down",
    "gate_up": "MLP: gate and up",
    "fc_in": "MLP: in (fc_in)",
    "fc_out": "MLP: out (fc_out)",
    "experts_gate_up": "experts: gate and up",
    "experts_down": "experts: down",
    "router": "experts: router",
    "attention": "attention block",
    "mlp": "MLP block",
    "layer": "whole layer",
}


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

    wanted = {
        "importance_map.png": importance_map if len(found.rounds) and found.units else None,
        "loss.png": loss_curves if found.loss or found.heldout else None,
        "visits.png": visit_counts if len(found.rounds) and found.units else None,
    }
    if not any(wanted.values()):
        raise ValueError(f"{path} holds neither a loss nor a round yet: nothing to draw. Try again after a few steps.")
    return [save(draw(found), path.parent / name) for name, draw in wanted.items() if draw is not None]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


# ---- layer x kind x round ----


def importance_map(run: Digest) -> Figure:
    """One panel a matrix kind: rounds to the right, layers upwards, colour = how likely the sampler drew the matrix.

    The colour is probability over uniform probability on a logarithmic scale, so 1 (white) is blind chance. A black
    bar marks the rounds in which the matrix trained.
    """
    kinds = list(dict.fromkeys(unit.kind for unit in run.units if unit.layer is not None))
    outside = [i for i, unit in enumerate(run.units) if unit.layer is None]
    layers = sorted({unit.layer for unit in run.units if unit.layer is not None})
    panels = len(kinds) + bool(outside)
    columns = min(4, panels) if panels > 2 else 1
    rows = math.ceil(panels / columns)
    most = min(len(run.rounds), _MOST_COLUMNS)
    panel_width = 7.0 if columns == 1 else float(np.clip(2 * most / DPI, 2.9, 4.0))
    panel_height = min(4.0, max(1.5, 0.105 * len(layers) + 0.5))
    left, right, head, foot = 0.6, 1.35, 1.15, 1.05  # inches around the panels; head has the titles, foot the legend
    gap_x, gap_y = 0.38, 0.62
    width = left + columns * (panel_width + gap_x) - gap_x + right
    height = head + rows * (panel_height + gap_y) - gap_y + foot
    figure = _figure(width, height)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=1 - right / width,
        top=1 - head / height,
        bottom=foot / height,
        wspace=gap_x / panel_width,
        hspace=gap_y / panel_height,
    )
    relative = np.log2(np.maximum(run.probabilities * len(run.units), 2.0**-20))
    scale = _colour_limit(relative)
    image: Any = None
    for panel in range(panels):
        axes = figure.add_subplot(grid[panel // columns, panel % columns])
        if panel < len(kinds):
            members = [[i for i, u in enumerate(run.units) if u.kind == kinds[panel] and u.layer == n] for n in layers]
            image = _map_panel(axes, run, relative, members, scale)
            _layer_axis(axes, layers, "layer" if panel % columns == 0 else "")
            axes.set_title(KIND_TITLES.get(kinds[panel], kinds[panel]), loc="left", fontsize=10)
        else:
            image = _map_panel(axes, run, relative, [[i] for i in outside], scale)
            _outside_axis(axes, [run.units[i] for i in outside], height)
        if panel + columns >= panels:
            axes.set_xlabel("round")
    _titles(figure, left, "Which matrices the sampler trained", _map_subtitle(run))
    bar_height = min(4.0, height - head - foot)
    bar_axes = figure.add_axes(
        ((width - 1.1) / width, (height - head - bar_height) / height, 0.16 / width, bar_height / height)
    )
    _ratio_bar(figure, image, bar_axes, scale)
    _map_legend(figure, run, left / width, 0.2 / height)
    return figure


def _map_panel(axes: Axes, run: Digest, relative: np.ndarray, members: Sequence[Sequence[int]], scale: float) -> Any:
    """Draw one row for each list of units; several units of one kind in a layer are averaged."""
    colour = np.full((len(members), len(run.rounds)), np.nan)
    trained = np.zeros_like(colour)
    for row, units in enumerate(members):
        if units:
            colour[row] = relative[:, list(units)].mean(axis=1)
            trained[row] = run.active[:, list(units)].mean(axis=1)
    group = math.ceil(len(run.rounds) / _MOST_COLUMNS)
    colour, trained = _binned(colour, group), _binned(trained, group)
    first = int(run.rounds[0])
    extent = (first - 0.5, first - 0.5 + colour.shape[1] * group, -0.5, len(members) - 0.5)
    axes.set_facecolor("#DDDDDD")  # no such matrix in this layer
    image = axes.imshow(
        np.clip(colour, -scale, scale),
        cmap=_ratio_colours(),
        vmin=-scale,
        vmax=scale,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=extent,
    )
    marks = np.zeros((3 * len(members), colour.shape[1], 4))
    marks[1::3, :, 3] = np.where(trained > 0, np.maximum(trained, 0.35), 0.0)  # the middle third of each row
    axes.imshow(marks, aspect="auto", origin="lower", interpolation="nearest", extent=extent)
    if run.covered_at is not None and len(run.rounds) > 2:
        axes.axvline(run.covered_at + 0.5, color=GREEN, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.set_xlim(first - 0.5, int(run.rounds[-1]) + 0.5)
    axes.set_ylim(-0.5, len(members) - 0.5)
    axes.tick_params(labelsize=8)
    _whole_numbers(axes.xaxis)
    return image


def _layer_axis(axes: Axes, layers: Sequence[int], label: str) -> None:
    step = max(1, math.ceil(len(layers) / 9))
    step = next(nice for nice in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, 10**6) if nice >= step)
    axes.set_yticks(range(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])
    axes.set_ylabel(label)


def _outside_axis(axes: Axes, units: Sequence[LoggedUnit], figure_height: float) -> None:
    """Names inside the rows, which are half an inch high at most: names beside them would run into the next panel."""
    axes.set_title("outside the layers", loc="left", fontsize=10)
    axes.set_yticks([])
    for row, unit in enumerate(units):
        axes.annotate(
            _short(unit),
            (0.015, row + 0.44),
            xycoords=axes.get_yaxis_transform(),
            va="top",
            fontsize=8,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )
    box = axes.get_position()
    high = min(box.height, 0.5 * len(units) / figure_height)
    axes.set_position((box.x0, box.y1 - high, box.width, high))


def _map_subtitle(run: Digest) -> str:
    per_round = run.active.sum(axis=1).mean()
    return (
        f"{run.label}.  {len(run.rounds)} rounds, {run.last_step} steps; "
        f"{per_round:.1f} of {len(run.units)} matrices at a time"
    )


def _map_legend(figure: Figure, run: Digest, left: float, bottom: float) -> None:
    from matplotlib.lines import Line2D

    group = math.ceil(len(run.rounds) / _MOST_COLUMNS)
    bar = "trained in this round" if group == 1 else f"trained (columns of {group} rounds; darker = in more of them)"
    handles = [Line2D([], [], color="black", linewidth=4, label=bar)]
    if run.covered_at is not None:
        words = "by here every matrix has trained at least once"
        handles.append(Line2D([], [], color=GREEN, linewidth=1.4, linestyle=(0, (4, 2)), label=words))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(left, bottom),
        ncols=2,
        frameon=False,
        fontsize=10,
        borderaxespad=0,
        handlelength=2.4,
        columnspacing=3,
    )


def _ratio_colours() -> Any:
    """Purple (less likely than chance), white, orange (more likely); the darkest ends cut off so that bars show."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["PuOr_r"](np.linspace(0.12, 0.88, 255)))


def _colour_limit(relative: np.ndarray) -> float:
    """Half the width of the colour scale in powers of two: all but the outermost 1%, within 2x … 64x."""
    known = np.abs(relative[np.isfinite(relative)])
    return float(np.clip(np.ceil(np.percentile(known, 99)), 1, 6)) if known.size else 1.0


def _ratio_bar(figure: Figure, image: Any, axes: Axes, scale: float) -> None:
    ticks = np.arange(-scale, scale + 1) if scale <= 4 else np.arange(-scale, scale + 1, 2)
    bar = figure.colorbar(image, cax=axes, ticks=ticks, extend="both", extendfrac=0.03)
    bar.ax.set_yticklabels([f"{2**t:.0f}×" if t >= 0 else f"1/{2**-t:.0f}×" for t in ticks], fontsize=8)
    bar.set_label("probability of being drawn\n(1× = uniform)", fontsize=9)


# ---- loss ----


def loss_curves(run: Digest) -> Figure:
    """Training and held-out loss against optimizer steps, with those of the baselines in the log."""
    figure = _figure(9, 5.2)
    axes = figure.add_axes((0.085, 0.12, 0.885, 0.7))
    own = "AdamW" if run.run.get("optimizer") == "adamw" else "MISA"
    _loss_pair(axes, own, BLUE, "o", "-", run.loss, run.heldout)
    for (name, entry), colour in zip(run.baselines.items(), (ORANGE, GREEN, PINK), strict=False):
        _loss_pair(axes, name, colour, "s", "--", entry.get("loss") or [], entry.get("eval_loss") or [])
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9.5)
    _titles(figure, 0.085 * 9, "Training and held-out loss", f"{run.label}, {run.last_step} steps")
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
    return np.array([_mean(series[i - h : i + h + 1]) for i, h in enumerate(half)])


# ---- visits ----


def visit_counts(run: Digest) -> Figure:
    """Layer x kind table in colour: in how many rounds each matrix trained."""
    kinds = list(dict.fromkeys(unit.kind for unit in run.units if unit.layer is not None))
    outside = [i for i, unit in enumerate(run.units) if unit.layer is None]
    layers = sorted({unit.layer for unit in run.units if unit.layer is not None})
    table = np.full((len(layers), len(kinds)), np.nan)
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            members = [i for i, unit in enumerate(run.units) if unit.layer == layer and unit.kind == kind]
            if members:
                table[row, column] = run.visits[members].mean()
    cell = 0.27
    width = max(6.4, 0.95 * len(kinds) + 2.6)
    strip = 0.85 if outside and kinds else 0.0
    body = max(1.3, cell * len(layers)) if kinds else 0.6
    head, foot = 1.25, 0.75
    height = head + body + strip + foot
    figure = _figure(width, height)
    left, right = 0.75 / width, 1 - 1.35 / width
    limit = max(1.0, float(run.visits.max()))
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
        image = _numbers(axes, run.visits[outside][None, :].astype(float), limit)
        axes.set_yticks([0], ["outside"], fontsize=8)
        axes.set_xticks(range(len(outside)), [_short(run.units[i]) for i in outside], fontsize=8)
    bar_height = min(3.5, max(body, 1.2))
    bar_axes = figure.add_axes(
        (right + 0.25 / width, 1 - (head + bar_height) / height, 0.15 / width, bar_height / height)
    )
    figure.colorbar(image, cax=bar_axes).set_label("rounds", fontsize=9)
    bar_axes.tick_params(labelsize=8)
    _whole_numbers(bar_axes.yaxis, most=4)  # they crowd at the top of a square-root scale
    never = int((run.visits == 0).sum())
    words = "every matrix trained at least once" if not never else f"{never} of {len(run.units)} matrices never trained"
    _titles(
        figure,
        left * width,
        "How often each matrix trained",
        run.label,
        f"Number = rounds out of {len(run.rounds)}; {words}",
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


# ---- shared ----


def _titles(figure: Figure, left: float, title: str, *lines: str) -> None:
    """Title and lines below it, at ``left`` inches."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.42 / height, title, fontsize=15, weight="bold")
    for number, line in enumerate(lines):
        figure.text(left / width, 1 - (0.7 + 0.24 * number) / height, line, fontsize=10, color="#333333")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the report's pictures need matplotlib, which cannot be imported ({error}). "
            "Install it with: pip install 'misa_engine[train]'"
        ) from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _binned(table: np.ndarray, group: int) -> np.ndarray:
    """Means over ``group`` neighbouring columns."""
    if group == 1:
        return table
    return np.stack([table[:, i : i + group].mean(axis=1) for i in range(0, table.shape[1], group)], axis=1)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _short(unit: LoggedUnit) -> str:
    """Name without the ``.weight`` and the container it lies in, which every unit of a model shares."""
    parts = unit.name.removesuffix(".weight").split(".")
    return parts[-1]


def _whole_numbers(axis: Any, most: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True))

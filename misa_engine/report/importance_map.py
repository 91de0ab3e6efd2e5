"""The importance map: which matrices the sampler held for important, and which it trained, round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_engine.report.digest import Digest, LoggedUnit
from misa_engine.report.figures import DPI, GREEN, binned, new_figure, short_name, whole_numbers, write_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def importance_map(digest: Digest) -> Figure:
    """One panel a matrix kind: steps to the right, layers upwards, colour = how likely the sampler drew the matrix.

    A round is as wide as it is long, so that the one-step rounds of a cold start are slivers. The colour is probability
    over uniform probability on a logarithmic scale, so 1 (white) is blind chance. A black bar marks the rounds in which
    the matrix trained.
    """
    kinds = list(dict.fromkeys(unit.kind for unit in digest.units if unit.layer is not None))
    outside = [i for i, unit in enumerate(digest.units) if unit.layer is None]
    layers = sorted({unit.layer for unit in digest.units if unit.layer is not None})
    panels = len(kinds) + bool(outside)
    columns = min(4, panels) if panels > 2 else 1
    rows = math.ceil(panels / columns)
    most = min(len(digest.rounds), _MOST_COLUMNS)
    panel_width = 7.0 if columns == 1 else float(np.clip(2 * most / DPI, 2.9, 4.0))
    panel_height = min(4.0, max(1.5, 0.105 * len(layers) + 0.5))
    left, right, head, foot = 0.6, 1.35, 1.15, 1.05  # inches around the panels; head has the titles, foot the legend
    gap_x, gap_y = 0.38, 0.62
    width = left + columns * (panel_width + gap_x) - gap_x + right
    height = head + rows * (panel_height + gap_y) - gap_y + foot
    figure = new_figure(width, height)
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
    relative = np.log2(np.maximum(digest.probabilities * len(digest.units), 2.0**-20))
    scale = _colour_limit(relative)
    image: Any = None
    for panel in range(panels):
        axes = figure.add_subplot(grid[panel // columns, panel % columns])
        if panel < len(kinds):
            members = [
                [i for i, u in enumerate(digest.units) if u.kind == kinds[panel] and u.layer == n] for n in layers
            ]
            image = _map_panel(axes, digest, relative, members, scale)
            _layer_axis(axes, layers, "layer" if panel % columns == 0 else "")
            axes.set_title(KIND_TITLES.get(kinds[panel], kinds[panel]), loc="left", fontsize=10)
        else:
            image = _map_panel(axes, digest, relative, [[i] for i in outside], scale)
            _outside_axis(axes, [digest.units[i] for i in outside], height)
        if panel + columns >= panels:
            axes.set_xlabel("optimizer steps")
    write_titles(figure, left, "Which matrices the sampler trained", _map_subtitle(digest))
    bar_height = min(4.0, height - head - foot)
    bar_axes = figure.add_axes(
        ((width - 1.1) / width, (height - head - bar_height) / height, 0.16 / width, bar_height / height)
    )
    _ratio_bar(figure, image, bar_axes, scale)
    _map_legend(figure, digest, left / width, 0.2 / height)
    return figure


def _map_panel(axes: Axes, digest: Digest, relative: np.ndarray, members: Sequence[Sequence[int]], scale: float) -> Any:
    """Draw one row for each list of units; several units of one kind in a layer are averaged."""
    colour = np.full((len(members), len(digest.rounds)), np.nan)
    trained = np.zeros_like(colour)
    for row, units in enumerate(members):
        if units:
            colour[row] = relative[:, list(units)].mean(axis=1)
            trained[row] = digest.active[:, list(units)].mean(axis=1)
    group = math.ceil(len(digest.rounds) / _MOST_COLUMNS)
    colour, trained = binned(colour, group), binned(trained, group)
    begins = _round_edges(digest)
    edges = np.append(begins[:-1:group], begins[-1])
    axes.set_facecolor("#DDDDDD")  # no such matrix in this layer
    layers = np.arange(len(members) + 1) - 0.5
    values = np.ma.masked_invalid(np.clip(colour, -scale, scale))
    image = axes.pcolormesh(edges, layers, values, cmap=_ratio_colours(), vmin=-scale, vmax=scale)
    marks = np.zeros((3 * len(members), colour.shape[1], 4))
    marks[1::3, :, 3] = np.where(trained > 0, np.maximum(trained, 0.35), 0.0)  # the middle third of each row
    axes.pcolormesh(edges, np.arange(len(marks) + 1) / 3 - 0.5, marks)
    if digest.covered_at is not None and len(digest.rounds) > 2:
        covered = begins[list(digest.rounds).index(digest.covered_at) + 1]
        axes.axvline(covered, color=GREEN, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(-0.5, len(members) - 0.5)
    axes.tick_params(labelsize=8)
    whole_numbers(axes.xaxis)
    return image


def _round_edges(digest: Digest) -> np.ndarray:
    """Steps at which the rounds begin, and where the last one ends: (R + 1,) int, ascending."""
    end = max(digest.last_step, int(digest.round_steps[-1]) + 1)
    return np.append(digest.round_steps, end)


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
            short_name(unit),
            (0.015, row + 0.44),
            xycoords=axes.get_yaxis_transform(),
            va="top",
            fontsize=8,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )
    box = axes.get_position()
    high = min(box.height, 0.5 * len(units) / figure_height)
    axes.set_position((box.x0, box.y1 - high, box.width, high))


def _map_subtitle(digest: Digest) -> str:
    per_round = digest.active.sum(axis=1).mean()
    return (
        f"{digest.label}.  {len(digest.rounds)} rounds, {digest.last_step} steps; "
        f"{per_round:.1f} of {len(digest.units)} matrices at a time"
    )


def _map_legend(figure: Figure, digest: Digest, left: float, bottom: float) -> None:
    from matplotlib.lines import Line2D

    group = math.ceil(len(digest.rounds) / _MOST_COLUMNS)
    bar = "trained in this round" if group == 1 else f"trained (columns of {group} rounds; darker = in more of them)"
    handles = [Line2D([], [], color="black", linewidth=4, label=bar)]
    if digest.covered_at is not None:
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
    """Half the width of the colour scale in powers of two: all but the outermost 1%, within 2x … 1024x.

    A skewed sampler leaves most units far below chance; at a narrower limit they would all look alike.
    """
    known = np.abs(relative[np.isfinite(relative)])
    return float(np.clip(np.ceil(np.percentile(known, 99)), 1, 10)) if known.size else 1.0


def _ratio_bar(figure: Figure, image: Any, axes: Axes, scale: float) -> None:
    ticks = np.arange(-scale, scale + 1) if scale <= 4 else np.arange(-scale, scale + 1, 2)
    bar = figure.colorbar(image, cax=axes, ticks=ticks, extend="both", extendfrac=0.03)
    bar.ax.set_yticklabels([f"{2**t:.0f}×" if t >= 0 else f"1/{2**-t:.0f}×" for t in ticks], fontsize=8)
    bar.set_label("probability of being drawn\n(1× = uniform)", fontsize=9)

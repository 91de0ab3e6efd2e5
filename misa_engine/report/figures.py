"""What all pictures share: colours, canvas, titles, axes.

Colours are told apart by colour-blind readers: Okabe-Ito for lines, PuOr and YlGnBu for maps. Figures are drawn on
matplotlib's Agg canvas without pyplot, so no display is needed and no global state is touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_engine.report.digest import LoggedUnit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
#: Pixels an inch of every picture.
DPI = 150


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


def write_titles(figure: Figure, left: float, title: str, *lines: str) -> None:
    """Title and lines below it, at ``left`` inches."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.42 / height, title, fontsize=15, weight="bold")
    for number, line in enumerate(lines):
        figure.text(left / width, 1 - (0.7 + 0.24 * number) / height, line, fontsize=10, color="#333333")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches.

    Raises:
        ImportError: matplotlib cannot be imported; the message names the extra.
    """
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


def binned(table: np.ndarray, group: int) -> np.ndarray:
    """Means over ``group`` neighbouring columns."""
    if group == 1:
        return table
    return np.stack([table[:, i : i + group].mean(axis=1) for i in range(0, table.shape[1], group)], axis=1)


def mean_of_known(values: np.ndarray) -> float:
    """Mean of what is finite; nan when nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def short_name(unit: LoggedUnit) -> str:
    """Name without the ``.weight`` and the container it lies in, which every unit of a model shares."""
    parts = unit.name.removesuffix(".weight").split(".")
    return parts[-1]


def whole_numbers(axis: Any, most: int = 8) -> None:
    """Ticks at whole numbers, at most so many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True))

"""The pictures of an experiment's page: curves of the held-out loss, and bars of bytes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from misa_engine.bench.pictures import BLUE, CURVES, DASHES, ORANGE, SKY, new_figure
from misa_engine.bench.presets import CARD_GIB, GIB

Row = dict[str, Any]


def curves_figure(model: str, runs: Sequence[Row]) -> Figure:
    """Held-out loss of each label, the median of its seeds, over steps and over seconds of training steps."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    figure, (by_step, by_time) = new_figure(11, 2.6 + 0.2 * max(6, len(labels)), 2, f"Held-out loss: {model}",
        "line: median of the seeds")  # fmt: skip
    for number, label in enumerate(labels):
        curves = [run["curve"] for run in runs if run["label"] == label]
        shortest = min(map(len, curves))
        points = [[curve[place] for curve in curves] for place in range(shortest)]
        losses = [statistics.median(point["heldout_loss"] for point in at) for at in points]
        style: dict[str, Any] = {
            "color": CURVES[number % len(CURVES)], "linestyle": DASHES[number // len(CURVES) % len(DASHES)],
            "linewidth": 2.2 if label.startswith("MISA") else 1.3, "marker": "osv^D"[number % 5], "markersize": 3,
        }  # fmt: skip
        by_step.plot([at[0]["step"] for at in points], losses, label=f"{label} {losses[-1]:.3f}", **style)
        by_time.plot([statistics.median(point["seconds"] for point in at) for at in points], losses, **style)
    by_step.set_xlabel("optimizer steps")
    by_time.set_xlabel("seconds of training steps")
    by_step.set_ylabel("held-out loss")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def bytes_figure(model: str, lines: Sequence[Row]) -> Figure:
    """What was planned and what was measured, side by side."""
    figure, (axes,) = new_figure(9, 1.2 + 0.36 * len(lines), 1, f"Memory of a step: {model}",
        "planned for one RTX 4090; measured where this ran")  # fmt: skip
    places = list(range(len(lines)))
    for metric, colour, shift in (("planned_bytes", SKY, -0.2), ("peak_bytes", BLUE, 0.2)):
        sizes = [(line["cells"].get(metric, {}).get("median") or 0) / GIB for line in lines]
        axes.barh([place + shift for place in places], sizes, height=0.38, color=colour, label=metric.split("_")[0])
    axes.axvline(CARD_GIB, color=ORANGE, linewidth=1, linestyle="--", label="RTX 4090")
    axes.set_yticks(places, [line["label"] for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.legend(fontsize=8, frameon=False)
    return figure

"""Pictures of a learning matrix: loss against tokens and seconds, and memory against loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from misa_engine.bench.pictures import BLUE, CURVES, DASHES, GREY, ORANGE, Row, new_figure, save

MIB = 1 << 20


def pictures(document: Row, folder: Path) -> list[Path]:
    """Draw every task's two pictures; returns the files."""
    drawn: dict[str, Figure] = {}
    for task in dict.fromkeys(result["task"] for result in document["results"]):
        results = [one for one in document["results"] if one["task"] == task and one["loss"] is not None]
        if results:
            drawn[f"learning_{task}"] = _curves(results)
            drawn[f"memory_{task}"] = _pareto(results)
    return save(drawn, folder, document["environment"])


def _curves(results: Sequence[Row]) -> Figure:
    title = f"Learning: {results[0]['task']}"
    height = 1.4 + max(3.2, 0.2 * len(results))
    figure, (by_tokens, by_time) = new_figure(11, height, 2, title, "each method at its best learning rate")
    for number, result in enumerate(results):
        style: dict[str, Any] = {
            "color": CURVES[number % len(CURVES)],
            "linestyle": DASHES[number // len(CURVES) % len(DASHES)],
            "linewidth": 2.2 if result["method"].startswith("misa") else 1.3,
            "marker": "osv^D"[number % 5],
            "markersize": 3,
            "alpha": 0.85,
        }
        losses = [point["loss"] for point in result["curve"]]
        label = f"{result['method']} {result['loss']:.3f}"
        by_tokens.plot([point["tokens"] for point in result["curve"]], losses, label=label, **style)
        by_time.plot([point["seconds"] for point in result["curve"]], losses, **style)
    low = min(result["loss"] for result in results)
    start = results[0]["curve"][0]["loss"]
    for axes in (by_tokens, by_time):  # what diverged must not flatten all others
        axes.set_ylim(low - 0.05 * (start - low), start + 0.3 * abs(start - low))
    by_tokens.set_xlabel("tokens")
    by_time.set_xlabel("CPU s of training steps")
    by_tokens.set_ylabel("held-out loss, median of the seeds")
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    return figure


def _pareto(results: Sequence[Row]) -> Figure:
    """Held-out loss over held memory; the line joins what nothing beats in both."""
    figure, (axes,) = new_figure(9, 4.7, 1, f"Memory against loss: {results[0]['task']}")
    best = float("inf")
    front: list[Row] = []
    for result in sorted(results, key=lambda one: (one["total_held_bytes"], one["loss"])):
        if result["loss"] < best:
            best = result["loss"]
            front.append(result)
    axes.plot(
        [one["total_held_bytes"] / MIB for one in front], [one["loss"] for one in front], color=GREY, linewidth=1,
        linestyle="--", label="nothing beats these in both",
    )  # fmt: skip
    for result in results:
        ours = result["method"].startswith("misa")
        at, losses = result["total_held_bytes"] / MIB, list(result["losses"].values())
        colour = BLUE if ours else ORANGE
        axes.plot([at, at], [min(losses), max(losses)], color=colour, linewidth=1)
        axes.plot(at, result["loss"], "o" if ours else "s", color=colour, markersize=5)
        axes.annotate(result["method"], (at, result["loss"]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    start = results[0]["base_loss"]
    if start is not None:
        axes.set_ylim(top=start + 0.1 * abs(start - best))
    axes.set_xscale("log")
    axes.set_xlabel("MiB held by gradients, optimizer state and adapters")
    axes.set_ylabel("held-out loss (median; line: all seeds)")
    axes.legend(fontsize=7, frameon=False)
    return figure

"""The plan as a picture: stacked bars by category, against the card's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from misa_engine.planner.plan import CATEGORIES, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that colour-blind readers tell apart (Okabe-Ito and Tol), neighbours in the stack far apart.
COLOURS = {
    "weights": "#999999",
    "resident_codes": "#BBBBBB",
    "resident_steps": "#777777",
    "resident_workspace": "#332288",
    "active_weights": "#44AA99",
    "gradients": "#E69F00",
    "first_moment": "#0072B2",
    "second_moment": "#56B4E9",
    "moment_scales": "#F0E442",
    "residual_bits": "#009E73",
    "tables": "#000000",
    "rest": "#000000",
    "activations": "#D55E00",
    "cross_entropy": "#CC79A7",
    "temporaries": "#882255",
    "cuda_context": "#DDCC77",
    "slack": "#DDDDDD",
}
FITS, FITS_NOT = "#00694D", "#B22400"


def figure(result: Plan, variants: Mapping[str, Plan]) -> Figure:
    """One bar for each variant of the plan with its verdict, categories named beside the last, a line where the card
    ends.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9.5, 5.4))
    axes = picture.add_axes((0.075, 0.13, 0.9, 0.7))
    base = [0.0] * len(variants)
    last: list[tuple[float, str]] = []  # middle of each part of the last bar, and its name
    for category in CATEGORIES:
        heights = [plan.bytes.get(category, 0) / 2**30 for plan in variants.values()]
        if any(heights):
            axes.bar(range(len(variants)), heights, bottom=base, width=0.6, color=COLOURS[category])
            if heights[-1]:
                last.append((base[-1] + heights[-1] / 2, category))
            base = [low + height for low, height in zip(base, heights, strict=True)]
    room = result.card.total_bytes / 2**30 if result.card is not None else None
    top = 1.14 * max(*base, room or 0.0)
    for place, total in enumerate(base):
        fits = room is None or total <= room
        verdict = "" if room is None else "\nfits" if fits else "\ndoes not fit"
        axes.annotate(
            f"{total:.1f} GiB{verdict}", (place, total), ha="center", va="bottom", fontsize=9, weight="bold",
            color="black" if room is None else FITS if fits else FITS_NOT, textcoords="offset points", xytext=(0, 3),
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}, zorder=4,
        )  # fmt: skip
    _name_parts(axes, len(variants) - 1, last, top)
    axes.set_xlim(-1.3, len(variants) + 0.35)  # room for the limit's name on the left and the parts' on the right
    axes.set_ylim(0, top)
    if room is not None and result.card is not None:
        axes.axhline(room, color="black", linestyle="--", linewidth=1, zorder=3)
        name = "" if result.card.name.endswith("iB") else f"{result.card.name}\n"
        axes.annotate(
            f"{name}{room:.1f} GiB", (-1.28, room), va="bottom", fontsize=9, textcoords="offset points", xytext=(0, 3)
        )
    axes.set_xticks(range(len(variants)), list(variants), fontsize=9)
    axes.set_ylabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    micro_batch = result.micro_batch
    picture.text(0.075, 0.93, f"Planned memory of {result.model}", fontsize=15, weight="bold")
    picture.text(
        0.075, 0.885, f"delta {result.misa.delta:g}, {micro_batch.batch} x {micro_batch.length} tokens, "
        f"{micro_batch.loss} loss", fontsize=10, color="#333333",
    )  # fmt: skip
    return picture


def _name_parts(axes: Axes, place: int, parts: list[tuple[float, str]], top: float) -> None:
    """Write each part's name beside the bar at ``place``, moved apart where parts are thin."""
    for (middle, category), height in zip(
        parts, spread([m for m, _ in parts], 0.048 * top, low=0.024 * top), strict=True
    ):
        axes.plot([place + 0.3, place + 0.4], [middle, height], color=COLOURS[category], linewidth=1.5)
        axes.text(place + 0.43, height, category.replace("_", " "), fontsize=9, va="center")


def spread(wanted: list[float], gap: float, low: float = 0.0) -> list[float]:
    """Ascending places at least ``gap`` apart, none below ``low``, as near as can be to the ascending ones wanted.

    Neighbours that come too close form a group, which stands where its members want to be on average.
    """
    groups: list[list[float]] = []  # sum of the members' wishes less their offsets, number of members
    for number, place in enumerate(wanted):
        groups.append([place - number * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    starts = [total / count for total, count in groups for _ in range(int(count))]
    return [max(start, low) + number * gap for number, start in enumerate(starts)]


def save_picture(result: Plan, variants: Mapping[str, Plan], path: Path) -> None:
    """Write the picture.

    Raises:
        ValueError: the file cannot be written, or its name does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG; name a file that ends in .png, not {path}")
    try:
        figure(result, variants).savefig(path, dpi=150, facecolor="white")
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written: {error}") from error

"""The plan as a picture: stacked bars by category, against the card's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from misa_engine.planner.plan import CATEGORIES, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colours that colour-blind readers tell apart (Okabe-Ito and Tol), neighbours in the stack far apart.
COLOURS = {
    "weights": "#999999",
    "gradients": "#E69F00",
    "first_moment": "#0072B2",
    "second_moment": "#56B4E9",
    "moment_scales": "#F0E442",
    "residual_bits": "#009E73",
    "tables": "#000000",
    "activations": "#D55E00",
    "cross_entropy": "#CC79A7",
    "temporaries": "#882255",
    "cuda_context": "#DDCC77",
    "slack": "#DDDDDD",
}


def figure(result: Plan, variants: Mapping[str, Plan]) -> Figure:
    """One bar for each variant of the plan, and a line where the card ends."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8.5, 5), layout="constrained")
    axes = picture.subplots()
    base = [0.0] * len(variants)
    for category in CATEGORIES:
        heights = [plan.bytes.get(category, 0) / 2**30 for plan in variants.values()]
        if any(heights):
            axes.bar(list(variants), heights, bottom=base, color=COLOURS[category], label=category.replace("_", " "))
            base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, total in enumerate(base):
        axes.annotate(
            f"{total:.1f}", (place, total), ha="center", va="bottom", textcoords="offset points", xytext=(0, 2)
        )
    if result.card is not None:
        room = result.card.total_bytes / 2**30
        axes.axhline(room, color="black", linestyle="--", linewidth=1)
        name = "" if result.card.name.endswith("iB") else f"{result.card.name}: "
        axes.annotate(
            f"{name}{room:.1f} GiB", (1, room), xycoords=("axes fraction", "data"), backgroundcolor="#FFFFFFCC",
            ha="right", va="bottom", textcoords="offset points", xytext=(-4, 4),
        )  # fmt: skip
    micro_batch = result.micro_batch
    tokens = f"{micro_batch.batch} x {micro_batch.length} tokens"
    axes.set_title(f"Planned: {result.model}, delta {result.misa.delta:g}, {tokens}, {micro_batch.loss} loss")
    axes.set_ylabel("GiB")
    axes.margins(y=0.08)
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return picture


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

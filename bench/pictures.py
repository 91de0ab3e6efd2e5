"""Every picture of ``misa bench``, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from misa_engine.bench.checks import MOST_RESERVED_BYTES
from misa_engine.bench.named import file_name
from misa_engine.bench.tables import GIB, status, tokens
from misa_engine.report import figures
from misa_engine.report.figures import BLUE, GREEN, GREY, PINK, write_titles
from misa_engine.report.figures import ORANGE as RED

#: The rest of Okabe-Ito, whose darker orange is the reports'.
ORANGE, YELLOW, SKY = "#E69F00", "#F0E442", "#56B4E9"
PHASES = {"forward": SKY, "backward": ORANGE, "clip": GREEN, "step": RED, "switch": PINK}
CURVES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY, "#000000", "#8B6914")
#: Dashes that leave room for one another: curves that coincide are seen as alternating dashes.
DASHES = ("solid", (0, (5, 5)), (5, (5, 5)), (0, (2, 6)), (3, (2, 6)))
Row = Mapping[str, Any]


def pictures(document: Row, folder: Path) -> list[Path]:
    """Draw everything there is data for; returns the files."""
    steps = [row for row in document["results"] if row["kind"] in ("steps", "throughput")]
    shapes = list(dict.fromkeys(row["shape"] for row in steps))
    drawn: dict[str, Figure] = {}
    for shape in shapes:
        end = f"_{shape}" if len(shapes) > 1 else ""
        rows = [row for row in steps if row["shape"] == shape]
        if any(row["step_time_s"] for row in rows):
            drawn[f"time_and_memory{end}"] = _bars(rows)
        phased = [row for row in rows if row.get("phases_s")]
        if phased:
            drawn[f"phases{end}"] = _phases(phased)
    for row in steps:
        if row.get("timeline", {}).get("points"):
            drawn[file_name(f"timeline_{row['shape']}_{row['method']}", "")] = _timeline(row)
    return save(drawn, folder, document["environment"])


def save(drawn: Mapping[str, Figure], folder: Path, where: Row) -> list[Path]:
    """Write the figures with where and when their numbers were measured; returns the files."""
    for figure in drawn.values():
        footnote = f"{where['hardware']}, {where['date']}, commit {where['commit']}"
        figure.text(0.01, 0.01, footnote, fontsize=7, color=GREY)
    return [figures.save(figure, folder / f"{name}.png") for name, figure in drawn.items()]


def new_figure(width: float, height: float, panels: int, title: str, *lines: str) -> tuple[Figure, list[Any]]:
    """A figure of the house style: title and lines below it, empty panels side by side, in so many inches."""
    head = 0.65 + 0.24 * len(lines)
    height += head
    figure = figures.new_figure(width, height)
    foot = 0.25 / height  # the footnote
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, foot, 1, 1 - foot - head / height)))
    write_titles(figure, 0.12, title, *lines)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(rows: Sequence[Row]) -> Figure:
    """Step time, tokens per second beside it, and peak memory; what did not run says why."""
    mixed = len({tokens(row) for row in rows}) > 1
    where = f"{rows[0]['shape']}{'' if mixed else f', {tokens(rows[0])} tokens'}, {rows[0]['settings']['device']}"
    figure, (time, memory) = new_figure(10, 1.1 + 0.42 * len(rows), 2, "Time and memory of a step", where)
    places, names = range(len(rows)), [row["method"] + (f", {tokens(row)}" if mixed else "") for row in rows]
    colours = [BLUE if row["method"].startswith("misa") else "#BBBBBB" for row in rows]
    on_cpu = rows[0]["settings"]["device"] == "cpu"
    limit = rows[0]["settings"]["limit_bytes"]
    nothing = {"median": 0.0, "p20": 0.0, "p80": 0.0}
    spells = [row["step_time_s"] or nothing for row in rows]
    errors = [[s["median"] - s["p20"] for s in spells], [s["p80"] - s["median"] for s in spells]]
    time.barh(places, [s["median"] for s in spells], xerr=errors, color=colours, ecolor="#444444", capsize=2)
    ran = [row if row["step_time_s"] else None for row in rows]
    unit, name = (1 << 20, "MiB") if on_cpu and max(row["peak_bytes"] or 0 for row in rows) < GIB else (GIB, "GiB")
    memory.barh(places, [row["peak_bytes"] / unit if row else 0 for row in ran], color=colours)
    if not on_cpu:
        allocated = [row["peak_allocated_bytes"] / unit if row else 0 for row in ran]
        memory.barh(places, allocated, height=0.4, color=SKY, label="allocated")
        memory.axvline(MOST_RESERVED_BYTES / unit, color=ORANGE, linewidth=1, linestyle="--", label="goal 18.5")
    if limit:
        memory.axvline(limit / unit, color=GREY, linewidth=1, label=f"limit {limit / unit:.1f}")
    if not on_cpu or limit:
        memory.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    for place, row in zip(places, rows, strict=True):
        text = f"{row['tokens_per_s']:,.0f} tokens/s" if row["step_time_s"] else status(row)[:60]
        at = row["step_time_s"]["p80"] if row["step_time_s"] else 0
        time.text(at, place, f"  {text}", va="center", fontsize=7, color=GREY)
    time.set_xlim(0, 1.35 * max(s["p80"] for s in spells))
    time.set_yticks(places, names, fontsize=8)
    time.set_xlabel("s a step (median, p20 to p80)")
    memory.set_yticks([])
    memory.set_xlabel(f"peak {'resident' if on_cpu else 'reserved'} memory, {name}")
    for axes in (time, memory):
        axes.invert_yaxis()
    return figure


def _phases(rows: Sequence[Row]) -> Figure:
    where = f"{rows[0]['shape']}, {rows[0]['settings']['device']}"
    figure, (axes,) = new_figure(8.5, 0.4 * len(rows) + 1.1, 1, "Phases of a step", where)
    names, start = [row["method"] for row in rows], [0.0] * len(rows)
    for phase, colour in PHASES.items():
        # a switch is shown as it weighs on each step
        shares = [row["settings"]["inner_steps"] if phase == "switch" else 1 for row in rows]
        widths = [1e3 * row["phases_s"].get(phase, 0.0) / share for row, share in zip(rows, shares, strict=True)]
        axes.barh(names, widths, left=start, color=colour, label=phase)
        start = [begin + width for begin, width in zip(start, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step (a switch divided by the steps between two)")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _timeline(row: Row) -> Figure:
    """Bytes over two steps, stacked: weights, each optimizer buffer, activations and temporaries."""
    record, on_cpu = row["timeline"], row["settings"]["device"] == "cpu"
    where = f"{row['shape']}, {row['method']}, {tokens(row)} tokens"
    figure, (axes,) = new_figure(10, 4.4, 1, "Memory over two steps with a switch between them", where)
    unit, name = (1 << 20, "MiB") if on_cpu else (GIB, "GiB")
    times = [at * 1e3 for at, _ in record["points"]]
    held = [size / unit for _, size in record["points"]]
    base = {key: size / unit for key, size in record["base_bytes"].items() if size >= 0.002 * max(held) * unit}
    floor = 0.0
    if not on_cpu:  # resident memory has no such layers
        for (category, size), colour in zip(base.items(), (GREY, BLUE, GREEN, SKY, YELLOW, ORANGE), strict=False):
            axes.fill_between([times[0], times[-1]], floor, floor + size, color=colour, alpha=0.75, linewidth=0,
                              label=f"{category.replace('_', ' ')} {size:.2f}")  # fmt: skip
            floor += size
    label = "resident memory" if on_cpu else "activations, logits, temporaries"
    axes.fill_between(times, floor, [max(floor, s) for s in held], step="post", color=PINK, alpha=0.5, linewidth=0)
    axes.step(times, held, where="post", color="black", linewidth=0.7, label=f"{label}, peak {max(held):.2f}")
    top = max(held) * 1.02
    low = min(held) * 0.98 if on_cpu else 0.0
    for phase in record["phases"]:
        begin, end = phase["begin_s"] * 1e3, phase["end_s"] * 1e3
        axes.fill_between([begin, end], top, top + 0.04 * (top - low), color=PHASES[phase["phase"]], linewidth=0)
    for shown in dict.fromkeys(one["phase"] for one in record["phases"]):
        axes.plot([], [], color=PHASES[shown], linewidth=5, label=shown)
    axes.set_ylim(low, top + 0.05 * (top - low))
    axes.set_xlim(times[0], times[-1])
    axes.set_xlabel("milliseconds on the host")
    axes.set_ylabel(f"{'resident' if on_cpu else 'allocated'}, {name}")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure

"""Tables and pictures of a memory round, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from misa_engine.bench.checks import GIB, MOST_RESERVED_BYTES

#: Okabe-Ito, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#56B4E9", "#6B6B6B",
)  # fmt: skip
PHASE_COLOURS = {"forward": SKY, "backward": ORANGE, "clip": GREEN, "step": GREEN, "switch": PINK}
HEADINGS = (
    "case", "method", "batch x length x accumulation", "trainable", "step s (p20-p80)", "tokens/s", "allocated GiB",
    "reserved GiB", "process GiB", "status",
)  # fmt: skip


# ---- tables ----


def result_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the result table; a dash where nothing was measured."""
    settings, time = row["settings"], row["step_time_s"]
    status = row["status"] + (f" ({row['note']})" if row["note"] else "")
    tokens = f"{settings['batch']} x {settings['length']} x {settings['accumulation']}"
    if row["kind"] == "train" and settings["max_grad_norm"] is None:
        status += ", without clipping"
    if row["kind"] == "longest" and row.get("longest") is not None:
        status += f", {row['longest']} tokens" + (
            f", {row['longest_with_reserve']} with the plan's reserve" if "longest_with_reserve" in row else ""
        )
        tokens = "searched"
    if row["kind"] == "switches" and row.get("switches"):
        status += f", {row['switches']} switches"
    return [
        f"{row['shape']} {row['kind']}",
        row["method"],
        tokens,
        _si(row["trainable_parameters"]),
        f"{time['median']:.3f} ({time['p20']:.3f}-{time['p80']:.3f})" if time else "-",
        f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "-",
        _gib(row["peak_allocated_bytes"]),
        _gib(row["peak_reserved_bytes"] if row["peak_reserved_bytes"] is not None else row["peak_bytes"]),
        _gib(row["process_bytes"]),
        status,
    ]


def check_cells(check: Mapping[str, Any]) -> list[str]:
    """One row of the table of checks."""
    measured = check["measured"]
    if measured is None:
        text = "-"
    elif check["check"] == "reserved":
        text = f"{measured / GIB:.2f} GiB"
    elif check["check"].endswith("- 1"):
        text = f"{measured:+.1%}"
    elif check["check"] == "runs":
        text = "yes" if measured else "no"
    else:
        text = f"{measured:,} B"
    return [check["case"], check["check"], check["wanted"], text, check["verdict"]]


CHECK_HEADINGS = ("case", "check", "wanted", "measured", "verdict")


def markdown(document: Mapping[str, Any], pictures: Sequence[Path] = ()) -> str:
    """The round as a page: where it ran, the checks, the results, the pictures."""
    where = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    lines = [
        "# Memory round",
        "",
        f"{where['hardware']}, {where['date']}, commit {where['commit']}.",
        f"Driver {where['driver'] or 'none'}; {versions}.",
        f"Allocator limit: {document['limit']['bytes'] / GIB:.2f} GiB ({document['limit']['what']}).",
        "",
        f"Command: `{where['command']}`.",
        "This page is generated: `python -m misa_engine.bench.memory_round --render FILE`.",
        "",
        "## Checks",
        "",
        *_table(CHECK_HEADINGS, [check_cells(check) for check in document["checks"]]),
        "",
        "## Results",
        "",
        "Reserved is the allocator's peak over the whole life of a process, model building included; on a CPU the",
        "column holds the process's largest resident memory.",
        "",
        *_table(HEADINGS, [result_cells(row) for row in document["results"]]),
        "",
    ]
    plans = [(name, plan) for name, plan in document["plans"].items() if plan["status"] != "ok"]
    lines += [f"- plan for {name}: {plan['status']}" for name, plan in plans]
    lines += [f"\n![{path.stem}]({path.name})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def print_tables(document: Mapping[str, Any]) -> None:
    """The same tables in the terminal; as Markdown where rich is not installed."""
    tables = (
        ("results", HEADINGS, [result_cells(row) for row in document["results"]]),
        ("checks", CHECK_HEADINGS, [check_cells(check) for check in document["checks"]]),
    )
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:  # a GPU machine without a network may lack it
        for _, headings, rows in tables:
            print("\n".join(_table(headings, rows)), end="\n\n")
        return
    console = Console()
    if not console.is_terminal:  # a log: rich would squeeze everything into 80 columns
        console = Console(width=200)
    for title, headings, rows in tables:
        table = Table(*headings, title=title)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *cells)]


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _si(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


# ---- pictures ----


def pictures(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw everything there is data for; returns the files."""
    where = document["environment"]
    footnote = f"{where['hardware']}, {where['date']}, commit {where['commit']}"
    written = []
    for shape in dict.fromkeys(row["shape"] for row in document["results"]):
        rows = [row for row in document["results"] if row["shape"] == shape and row["kind"] == "train"]
        if any(row["peak_bytes"] for row in rows):
            written.append(_save(_bars(rows, document["limit"]["bytes"], footnote), folder / f"memory_{shape}.png"))
        for row in rows:
            if row.get("timeline", {}).get("points"):
                figure = _timeline(row, footnote)
                written.append(_save(figure, folder / f"timeline_{shape}_{row['method']}.png"))
    return written


def _bars(rows: Sequence[Mapping[str, Any]], limit: int, footnote: str) -> Any:
    """Peak memory of each method beside its tokens per second; what did not run says why."""
    figure, (memory, speed) = _figure(10, 1.6 + 0.42 * len(rows), 2)
    names = [f"{row['method']}, {result_cells(row)[2]}" for row in rows]
    places = range(len(rows))
    on_cpu = any(row["note"] for row in rows)
    unit, name = (1 << 20, "MiB") if on_cpu else (GIB, "GiB")
    ran = [row if row["status"] == "ok" else None for row in rows]

    def peaks(key: str) -> list[float]:
        return [row[key] / unit if row else 0.0 for row in ran]

    if on_cpu:
        memory.barh(places, peaks("peak_bytes"), color=BLUE, label="resident")
    else:
        memory.barh(places, peaks("peak_reserved_bytes"), color=SKY, label="reserved")
        memory.barh(places, peaks("peak_allocated_bytes"), height=0.4, color=BLUE, label="allocated")
        memory.axvline(limit / unit, color=GREY, linewidth=1, label=f"limit {limit / unit:.1f}")
        memory.axvline(MOST_RESERVED_BYTES / unit, color=ORANGE, linewidth=1, linestyle="--", label="goal 18.5")
    for place, row in zip(places, rows, strict=True):
        if row["status"] != "ok":
            memory.text(0, place, f" {row['status'][:46]}", va="center", fontsize=8, color=GREY)
    memory.set_yticks(places, names, fontsize=8)
    memory.set_xlabel(f"peak memory, {name}")
    memory.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    rates = [row["tokens_per_s"] if row else 0 for row in ran]
    speed.barh(places, rates, color=GREEN)
    for place, rate in zip(places, rates, strict=True):
        if rate:
            speed.text(rate, place, f" {rate:,.0f}", va="center", fontsize=8)
    speed.set_yticks([])
    speed.set_xlim(0, 1.2 * max([*rates, 1]))
    speed.set_xlabel("tokens per second")
    for axes in (memory, speed):
        axes.invert_yaxis()
    figure.suptitle(f"{rows[0]['shape']}: memory and speed", fontsize=11)
    figure.text(0.01, 0.01, footnote, fontsize=7, color=GREY)
    return figure


def _timeline(row: Mapping[str, Any], footnote: str) -> Any:
    """Bytes over two steps, stacked: weights, each optimizer buffer, activations and temporaries."""
    record = row["timeline"]
    figure, (axes,) = _figure(10, 4.6, 1)
    unit, name = (1 << 20, "MiB") if row["note"] else (GIB, "GiB")
    times = [at * 1e3 for at, _ in record["points"]]
    held = [size / unit for _, size in record["points"]]
    base = {key: size / unit for key, size in record["base_bytes"].items() if size >= 0.002 * max(held) * unit}
    colours = [GREY, BLUE, GREEN, SKY, YELLOW, "#E69F00", "#999999"]
    floor = 0.0
    if not row["note"]:  # resident memory has no such layers
        for (category, size), colour in zip(base.items(), colours, strict=False):
            axes.fill_between([times[0], times[-1]], floor, floor + size, color=colour, alpha=0.75, linewidth=0,
                              label=f"{category.replace('_', ' ')} {size:.2f}")  # fmt: skip
            floor += size
    label = "resident memory" if row["note"] else "activations, logits, temporaries"
    axes.fill_between(
        times, floor, [max(floor, size) for size in held], step="post", color=PINK, alpha=0.5, linewidth=0
    )
    axes.step(times, held, where="post", color="black", linewidth=0.7, label=f"{label}, peak {max(held):.2f}")
    top = max(held) * 1.02
    low = min(held) * 0.98 if row["note"] else 0.0
    for phase in record["phases"]:
        begin, end = phase["begin_s"] * 1e3, phase["end_s"] * 1e3
        axes.fill_between([begin, end], top, top + 0.04 * (top - low), color=PHASE_COLOURS[phase["phase"]], linewidth=0)
    for phase, colour in PHASE_COLOURS.items():
        if phase != "clip" and any(one["phase"] == phase for one in record["phases"]):
            axes.plot([], [], color=colour, linewidth=5, label=phase)
    axes.set_ylim(low, top + 0.05 * (top - low))
    axes.set_xlim(times[0], times[-1])
    axes.set_xlabel("milliseconds on the host")
    axes.set_ylabel(f"{'resident' if row['note'] else 'allocated'}, {name}")
    settings = row["settings"]
    axes.set_title(
        f"{row['shape']}, {row['method']}, {settings['batch']} x {settings['length']} tokens, "
        f"{settings['accumulation']} micro-batches a step: two steps with a switch between them",
        fontsize=10,
    )
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.text(0.01, 0.01, footnote, fontsize=7, color=GREY)
    return figure


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    room = ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95))  # below it is the footnote
    figure = Figure(figsize=(width, height), layout=room)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, facecolor="white")
    return path

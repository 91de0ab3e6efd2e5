"""Tables and pictures of ``misa bench``, from its results.json alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 1 << 30
#: Okabe-Ito and two greys; ours are drawn thicker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#6B6B6B", "#000000")
PHASES = {"forward": "#56B4E9", "backward": "#E69F00", "clip": "#009E73", "step": "#D55E00", "switch": "#CC79A7"}
HEADINGS = (
    "method", "trainable", "step s (p20-p80)", "of adamw", "tokens/s", "peak GiB", "of adamw", "held-out loss", "lr",
    "status",
)  # fmt: skip
PHASE_HEADINGS = (
    "method", "forward ms", "backward ms", "clip ms", "step ms", "switch ms", "own part", "over the floor",
)  # fmt: skip


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """One line a method; a dash where nothing was measured."""
    reference = next((row for row in document["results"] if row["method"] == "adamw"), {})
    return [_cells(row, reference) for row in document["results"]]


def _cells(row: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    seconds, peak = row["step_time_s"], row["peak_bytes"]
    before, before_peak = reference.get("step_time_s"), reference.get("peak_bytes")
    spread = row.get("heldout_loss_spread")
    loss = f"{row['heldout_loss']:.3f}" if row["heldout_loss"] is not None else "-"
    if spread and spread[0] != spread[1]:
        loss += f" ({spread[0]:.3f}-{spread[1]:.3f})"
    status = row["status"]
    if row.get("loss_status", "ok") not in ("ok", status):
        status += f"; loss: {row['loss_status']}"
    return [
        row["method"],
        _si(row["trainable_parameters"]),
        f"{seconds['median']:.3f} ({seconds['p20']:.3f}-{seconds['p80']:.3f})" if seconds else "-",
        f"{seconds['median'] / before['median']:.2f}" if seconds and before else "-",
        f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "-",
        f"{peak / GIB:.2f}" if peak else "-",
        f"{peak / before_peak:.2f}" if peak and before_peak else "-",
        loss,
        f"{row['lr']:g}" if row.get("lr") else "-",
        status,
    ]


def phase_table(document: Mapping[str, Any]) -> list[list[str]]:
    """Milliseconds by phase, and for MISA the time over the same step without any optimizer."""
    lines = []
    for row in document["results"]:
        phases = row.get("phases_s")
        if phases:
            times = [f"{1e3 * phases[name]:,.1f}" if name in phases else "-" for name in PHASES]
            ledger = row.get("overhead")
            own = f"{sum(ledger['parts'].values()) / ledger['floor_s']:.1%}" if ledger else "-"
            over = f"{ledger['overhead_of_pairs']:+.1%}" if ledger else "-"
            lines.append([row["method"], *times, own, over])
    return lines


def markdown(document: Mapping[str, Any], pictures: Sequence[Path] = ()) -> str:
    """The comparison as a page."""
    where, settings = document["environment"], document["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    memory = (
        "reserved by PyTorch's allocator" if settings["device"] != "cpu" else "largest resident memory of the process"
    )
    limit = f", allocator limited to {settings['vram_gib']:.2f} GiB" if settings["vram_gib"] else ""
    lines = [
        "# MISA beside what you would use instead",
        "",
        f"{where['hardware']}, {where['threads']} threads, {where['date']}, commit {where['commit']}; {versions}.",
        f"Command: `{where['command']}`. Every method in a fresh process, same data, same order. This page is "
        "generated from results.json.",
        "",
        f"Time and memory: {settings['model']} (random weights), {settings['batch']} x {settings['length']} tokens x "
        f"{settings['accumulation']}, checkpointing {'on' if settings['checkpointing'] else 'off'}, δ "
        f"{settings['delta']:g}, a switch every {settings['inner_steps']} steps, {settings['steps']} timed "
        f"steps{limit}. Peak is the {memory}.",
        "",
        f"Held-out loss: {settings['loss_model']}, trained for {settings['base_steps']} steps on "
        f"{settings['data']}, then {settings['loss_steps']} steps on {settings['loss_data']} by each method (δ "
        f"{settings['loss_delta']:g}), at the best of the learning rates "
        f"{', '.join(f'{lr:g}' for lr in settings['lrs'])}; {settings['seeds']} seed(s). A small model's loss says "
        "nothing about an 8B model's.",
        "",
        *_lines(HEADINGS, table(document)),
    ]
    phases = phase_table(document)
    if phases:
        lines += [
            "",
            "Time by phase. *Own part*: the time inside MISA (arrival of gradients, norm, update, a step's share of a "
            "switch) as a share of the floor, which is the same forward and backward with the same active matrices and "
            "no optimizer. *Over the floor*: a whole MISA step against it, in turns, median of the pairs: on a machine "
            "whose steps differ by 10% it is good to some percent only.",
            "",
            *_lines(PHASE_HEADINGS, phases),
        ]
    lines += [""] + [f"![{path.stem}]({path.as_posix()})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


#: Between these lines of a Markdown file ``insert`` puts the page.
BEGIN, END = "<!-- misa bench: begin -->", "<!-- misa bench: end -->"


def insert(document: Mapping[str, Any], pictures: Sequence[Path], target: Path) -> None:
    """Replace what stands between the markers of ``target`` by the page, with pictures linked from there.

    Raises:
        ValueError: the file has no markers; nothing is written then.
    """
    text = target.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{target} has no lines {BEGIN} and {END}, between which the page goes")
    links = [Path(os.path.relpath(path, target.parent)) for path in pictures]
    body = markdown(document, links).partition("\n")[2].strip()
    target.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def print_tables(document: Mapping[str, Any]) -> None:
    """The same tables in a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    for title, headings, rows in (
        ("", HEADINGS, table(document)),
        ("time by phase", PHASE_HEADINGS, phase_table(document)),
    ):
        if rows:
            shown = Table(*headings, title=title or None)
            for row in rows:
                shown.add_row(*row)
            console.print(shown)


def pictures(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what was measured; returns the files."""
    drawn = []
    for name, draw in (("time_and_memory.png", _bars), ("phases.png", _phases), ("loss.png", _curves)):
        figure = draw(document)
        if figure is not None:
            figure.savefig(folder / name, dpi=150, facecolor="white")
            drawn.append(folder / name)
    return drawn


def _figure(width: float, height: float, columns: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _bars(document: Mapping[str, Any]) -> Figure | None:
    rows = [row for row in document["results"] if row["step_time_s"]]
    if not rows:
        return None
    figure, (left, right) = _figure(10, 0.4 * len(rows) + 1.4, 2)
    names = [row["method"] for row in rows][::-1]
    colours = ["#0072B2" if name.startswith("misa") else "#BBBBBB" for name in names]
    seconds = [row["step_time_s"] for row in rows][::-1]
    errors = [[s["median"] - s["p20"] for s in seconds], [s["p80"] - s["median"] for s in seconds]]
    left.barh(names, [s["median"] for s in seconds], xerr=errors, color=colours, ecolor="#444444", capsize=2)
    left.set_xlabel("s a step (median, p20 to p80)")
    right.barh(names, [row["peak_bytes"] / GIB for row in rows][::-1], color=colours)
    right.set_xlabel("peak GiB")
    right.tick_params(labelleft=False)
    settings = document["settings"]
    figure.suptitle(f"{settings['model']}, {settings['batch']} x {settings['length']} tokens, {settings['device']}")
    return figure


def _phases(document: Mapping[str, Any]) -> Figure | None:
    rows = [row for row in document["results"] if row.get("phases_s")]
    if not rows:
        return None
    figure, (axes,) = _figure(8.5, 0.4 * len(rows) + 1.4, 1)
    names, start = [row["method"] for row in rows][::-1], [0.0] * len(rows)
    for phase, colour in PHASES.items():
        widths = [1e3 * row["phases_s"].get(phase, 0.0) for row in rows][::-1]
        if phase == "switch":  # shown as it weighs on each step
            widths = [width / document["settings"]["inner_steps"] for width in widths]
        axes.barh(names, widths, left=start, color=colour, label=phase)
        start = [begin + width for begin, width in zip(start, widths, strict=True)]
    axes.set_xlabel("ms a step (a switch divided by the steps between two)")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _curves(document: Mapping[str, Any]) -> Figure | None:
    rows = [row for row in document["results"] if row.get("curve")]
    if not rows:
        return None
    figure, (tokens, seconds) = _figure(11, 4.4, 2)
    for row, colour in zip(rows, COLOURS * 3, strict=False):
        ours = row["method"].startswith("misa")
        style: dict[str, Any] = {"color": colour, "linewidth": 2.4 if ours else 1.3, "label": row["method"]}
        losses = [point["heldout_loss"] for point in row["curve"]]
        tokens.plot([point["tokens"] for point in row["curve"]], losses, marker="o", markersize=2.5, **style)
        style.pop("label")
        seconds.plot([point["seconds"] for point in row["curve"]], losses, marker="o", markersize=2.5, **style)
    tokens.set_xlabel("tokens")
    seconds.set_xlabel("s of training steps")
    tokens.set_ylabel("held-out loss")
    settings = document["settings"]
    figure.suptitle(f"{settings['loss_model']} on {settings['loss_data']}, each method at its best learning rate")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["-"] * len(headings), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _si(count: int | None) -> str:
    if count is None:
        return "-"
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)

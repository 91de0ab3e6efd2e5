"""Every table and page of the benchmarks, from stored JSON alone: comparisons, rounds, kernels, profiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa_engine.bench.checks import check_text

GIB = 1 << 30
PHASES = ("forward", "backward", "clip", "step", "switch")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def lines(self) -> list[str]:
        """As Markdown; columns of numbers stand at the right."""
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows]
        number = [all(row[i][:1] in "0123456789+-" for row in cells) for i in range(len(self.headings))]
        rules = ["--:" if right else "---" for right in number]
        return [f"| {' | '.join(row)} |" for row in (self.headings, rules, *cells)]

    def show(self) -> None:
        """In the terminal, columns aligned."""
        cells = [list(self.headings), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        print("\n".join([self.title, *(line.rstrip() for line in lines)]), end="\n\n")

    def without_empty(self, *also_if_equal: str) -> Table:
        """Without columns of dashes; those named are left out where all rows say the same, too."""
        columns = list(zip(*self.rows, strict=True))
        kept = [
            i
            for i, column in enumerate(columns)
            if set(column) != {"-"} and not (self.headings[i] in also_if_equal and len(set(column)) == 1)
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table([self.headings[i] for i in kept], rows, self.title)


# ---- cells ----


def gib(size: int | None) -> str:
    """Bytes as GiB."""
    return "-" if size is None else f"{size / GIB:.2f}"


def short(count: int | None) -> str:
    """1570000 -> 1.57M."""
    if count is None:
        return "-"
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def tokens(row: Row) -> str:
    """Sequences x tokens x micro-batches of a step."""
    settings = row["settings"]
    return "searched" if row["kind"] == "longest" else "{batch} x {length} x {accumulation}".format(**settings)


def status(row: Row) -> str:
    """What became of it, and what else a reader must know."""
    text = str(row["status"])
    if row.get("loss_status", "ok") not in ("ok", row["status"]):
        text += f"; loss: {row['loss_status']}"
    if row["kind"] == "steps" and row["settings"]["max_grad_norm"] is None:
        text += ", without clipping"
    if row.get("longest") is not None:
        text += f", {row['longest']} tokens"
    if row.get("longest_with_reserve") is not None:
        text += f", {row['longest_with_reserve']} with the plan's reserve"
    if row.get("switches"):
        text += f", {row['switches']} switches"
    return text


def _seconds(row: Row) -> str:
    one = row.get("step_time_s")
    return "{median:.3f} ({p20:.3f}-{p80:.3f})".format(**one) if one else "-"


def _loss(row: Row) -> str:
    spread = row.get("heldout_loss_spread")
    text = "-" if row.get("heldout_loss") is None else f"{row['heldout_loss']:.3f}"
    return text + (f" ({spread[0]:.3f}-{spread[1]:.3f})" if spread and spread[0] != spread[1] else "")


def _of(row: Row, reference: Row | None, value: Callable[[Row], float | None]) -> str:
    one, other = value(row), value(reference) if reference else None
    return f"{one / other:.2f}" if one and other else "-"


def _step(row: Row) -> float | None:
    return (row.get("step_time_s") or {}).get("median")


def _peak(row: Row) -> float | None:
    return row.get("peak_bytes")


# ---- comparisons and rounds ----


def results_table(document: Row) -> Table:
    """One line a result; AdamW's on the same shape and tokens is the reference."""
    limits = [row for row in document.get("cases", ()) if row["kind"] in ("longest", "switches")]
    rows = [*document["results"], *limits]
    reference = {(row["shape"], tokens(row)): row for row in rows if row["method"] == "adamw"}
    cells = []
    for row in rows:
        adamw, on_gpu = reference.get((row["shape"], tokens(row))), row["note"] is None
        cells.append(
            (
                row["shape"],
                row["method"],
                tokens(row),
                short(row["trainable_parameters"]),
                _seconds(row),
                _of(row, adamw, _step),
                f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "-",
                gib(row["peak_allocated_bytes"]),
                gib(row["peak_bytes"]),
                _of(row, adamw, _peak),
                gib(row["process_bytes"]) if on_gpu else "-",
                _loss(row),
                f"{row['lr']:g}" if row.get("lr") else "-",
                status(row),
            )
        )
    headings = (
        "shape", "method", "batch x length x accumulation", "trainable", "step s (p20-p80)", "of adamw", "tokens/s",
        "allocated GiB", "peak GiB", "of adamw", "process GiB", "held-out loss", "lr", "status",
    )  # fmt: skip
    return Table(headings, cells).without_empty("shape", "batch x length x accumulation")


def phase_table(document: Row) -> Table:
    """Milliseconds by phase, and for MISA the time over the same step without any optimizer."""
    cells = []
    for row in document["results"]:
        phases, ledger = row.get("phases_s"), row.get("overhead")
        if phases:
            times = [f"{1e3 * phases[name]:,.1f}" if name in phases else "-" for name in PHASES]
            own = f"{sum(ledger['parts'].values()) / ledger['floor_s']:.1%}" if ledger else "-"
            over = f"{ledger['overhead_of_pairs']:+.1%}" if ledger else "-"
            cells.append([row["shape"], row["method"], *times, own, over])
    headings = ["shape", "method", *(f"{name} ms" for name in PHASES), "own part", "over the floor"]
    return Table(headings, cells, "time by phase").without_empty("shape")


def sampler_table(document: Row) -> Table:
    """Held-out loss by setting of MISA's sampler or moments: median and spread of the seeds."""
    settings: dict[str, list[Row]] = {}
    for row in document["cases"]:
        if row["kind"] == "loss" and not row["settings"]["start_from"]:
            settings.setdefault(row["case"].rpartition(", seed")[0], []).append(row)
    cells = []
    for name, rows in settings.items():
        ran = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["heldout_loss"])
        if not ran:
            cells.append([name, "-", "-", "-", rows[0]["status"]])
            continue
        losses = [f"{row['heldout_loss']:.3f}" for row in ran]
        middle = ran[len(ran) // 2]
        spread = f"{losses[0]} to {losses[-1]}"
        cells.append([name, losses[len(ran) // 2], spread, f"{middle.get('entropy_median', 0):.2f}", "ok"])
    return Table(("setting", "held-out loss", "seeds", "entropy", "status"), cells, "settings of MISA")


def check_table(document: Row) -> Table:
    """What was promised and what came out."""
    cells = [
        [one["case"], one["check"], one["wanted"], check_text(one), one["verdict"]]
        for one in document.get("checks", ())
    ]
    return Table(("case", "check", "wanted", "measured", "verdict"), cells, "checks")


def command_table(document: Row) -> Table:
    """The other commands of a round."""
    rows = [row for row in document.get("cases", ()) if row["kind"] == "command"]
    cells = [[row["case"], f"{row['case_s']:.0f}", row["status"], row.get("last_lines", ["-"])[-1]] for row in rows]
    return Table(("command", "s", "status", "last line"), cells, "commands")


def tables(document: Row) -> list[Table]:
    """All that have a row."""
    makers = (command_table, check_table, results_table, phase_table, sampler_table)
    return [table for table in (make(document) for make in makers) if table.rows]


def origin(where: Row) -> str:
    """The machine, its software and the commit."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    driver = f"driver {where['driver']}, " if where.get("driver") else ""
    threads = f", {where['threads']} threads" if "threads" in where else ""
    return f"{where['hardware']}, {driver}{where['date']}, commit {where['commit']}{threads}; {versions}."


def page(document: Row, pictures: Sequence[Path] = ()) -> str:
    """A run as a page: where it ran, what was compared, every table, every picture."""
    where, settings = document["environment"], document["settings"]
    unfinished = [row for row in document.get("cases", ()) if row["status"].startswith(("not run", "interrupted"))]
    lines = [
        "# MISA beside what you would use instead",
        "",
        origin(where),
        f"Command: `{where['command']}`. Every case in a fresh process, same data, same order. This page is generated "
        "from results.json.",
    ]
    lines += [f"\n{len(unfinished)} cases were not run to their end: --resume runs them."] if unfinished else []
    lines += [text for text in (_steps_text(document, settings), _loss_text(document, settings)) if text]
    for table in tables(document):
        if table.title:
            lines += ["", f"**{table.title.capitalize()}**{PHASE_TEXT if table.title == 'time by phase' else ''}"]
        lines += ["", *table.lines()]
    plans = [(name, plan) for name, plan in document.get("plans", {}).items() if plan["status"] != "ok"]
    lines += ["", *(f"- plan for {name}: {plan['status']}" for name, plan in plans)] if plans else []
    lines += [""] + [f"![{path.stem}]({path.as_posix()})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


PHASE_TEXT = (
    ". *Own part*: the time inside MISA (arrival of gradients, norm, update, a step's share of a switch) as a share of "
    "the floor, which is the same forward and backward with the same active matrices and no optimizer. *Over the "
    "floor*: a whole MISA step against it, in turns, median of the pairs: on a machine whose steps differ by 10% it is "
    "good to some percent only."
)


def _steps_text(document: Row, settings: Row) -> str:
    if not any(row.get("step_time_s") for row in document["results"]):
        return ""
    on_gpu = settings["device"] != "cpu"
    peak = (
        "reserved by PyTorch's allocator; attention is pinned to torch's flash kernel"
        if on_gpu
        else "largest resident memory of the process"
    )
    limit = f", allocator limited to {settings['vram_gib']:.2f} GiB" if settings["vram_gib"] else ""
    if settings["suite"] == "round":
        return f"\nTime and memory: random weights, checkpointing, δ {settings['delta']:g}{limit}. Peak is the {peak}."
    return (
        f"\nTime and memory: {settings['model']} (random weights), {settings['batch']} x {settings['length']} tokens x "
        f"{settings['accumulation']}, checkpointing {'on' if settings['checkpointing'] else 'off'}, δ "
        f"{settings['delta']:g}, a switch every {settings['inner_steps']} steps, {settings['steps']} timed "
        f"steps{limit}. Peak is the {peak}."
    )


def _loss_text(document: Row, settings: Row) -> str:
    if not any(row.get("curve") for row in document["results"]):
        return ""
    return (
        f"\nHeld-out loss, a smoke test of learning: {settings['loss_model']}, trained for {settings['base_steps']} "
        f"steps on {settings['data']}, then {settings['loss_steps']} steps on {settings['loss_data']} by each method "
        f"(δ {settings['loss_delta']:g}), at the best of the learning rates "
        f"{', '.join(f'{lr:g}' for lr in settings['lrs'])}; {settings['seeds']} seed(s). A small model's loss says "
        "nothing about an 8B model's."
    )


#: Between these lines of a Markdown file ``insert`` puts the page.
BEGIN, END = "<!-- misa bench: begin -->", "<!-- misa bench: end -->"


def insert(document: Row, pictures: Sequence[Path], target: Path) -> None:
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
    body = page(document, links).partition("\n")[2].strip()
    target.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


# ---- kernels ----

#: What every row has; all else in ``extra_info`` gets a column of its own.
COMMON = {"bytes", "gb_per_s", "percent_of_copy", "timed_by", "seconds", "scheme"}


def kernel_page(results: Row) -> str:
    """One table for each group of kernel benchmarks, the fastest row first, and below them what did not run.

    Args:
        results: JSON of pytest-benchmark: ``benchmarks``; ``environment`` and ``not_run`` where they are known.
    """
    groups: dict[str, list[Row]] = {}
    for row in results["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    lines = []
    if "environment" in results:
        where = results["environment"]
        lines += ["# Kernel benchmarks", "", origin(where), "", f"`{where['command']}`", ""]
    for group, rows in groups.items():
        lines += [f"### {group}", "", *_kernels(rows).lines(), ""]
    if results.get("not_run"):
        lines += ["### Not run", ""]
        reasons: dict[str, list[str]] = {}
        for skipped in results["not_run"]:
            reasons.setdefault(skipped["reason"], []).append(f"`{skipped['name']}`")
        lines += [f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def _kernels(rows: Sequence[Row]) -> Table:
    facts = sorted({name for row in rows for name in row["extra_info"]} - COMMON)
    cells = []
    for row in sorted(rows, key=lambda row: row["stats"]["median"]):
        info, stats = row["extra_info"], row["stats"]
        by_events = info["timed_by"] == "events"  # GB/s then belongs to these times
        cells.append(
            [
                f"`{info['scheme']}`",
                f"{1e3 * stats['median']:.3f}",
                f"{1e3 * stats['iqr']:.3f}",
                f"{1e3 * info['seconds']:.3f}" if by_events else "-",
                f"{info['bytes'] / 1e6:,.1f}",
                f"{info['gb_per_s']:,.2f}",
                f"{info['percent_of_copy']:.0f}",
                *(_number(info.get(name)) for name in facts),
            ]
        )
    headings = ["", "median ms", "IQR ms", "device ms", "MB moved", "GB/s", "% of copy"]
    return Table([*headings, *(name.replace("_", " ") for name in facts)], cells).without_empty()


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"

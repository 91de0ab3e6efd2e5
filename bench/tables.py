"""Every table and page of the benchmarks, from stored JSON alone: comparisons, rounds, kernels, profiles."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
PHASES = ("forward", "backward", "clip", "step", "switch")
Row = Mapping[str, Any]
#: Heading, value of a row (None is shown as a dash), format of the value.
Column = tuple[str, Callable[[Row], Any], str]


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    @classmethod
    def of(cls, rows: Iterable[Row], columns: Sequence[Column], title: str = "") -> Table:
        """A line for each row."""
        values = ([(value(row), spec) for _, value, spec in columns] for row in rows)
        cells = [["-" if value is None else format(value, spec) for value, spec in line] for line in values]
        return cls([heading for heading, *_ in columns], cells, title)

    def lines(self) -> list[str]:
        """As Markdown; columns of numbers stand at the right."""
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows]
        number = [all(row[i][:1] in "0123456789+-" for row in cells) for i in range(len(self.headings))]
        rules = ["--:" if right else "---" for right in number]
        return [f"| {' | '.join(row)} |" for row in (self.headings, rules, *cells)]

    def show(self) -> None:
        """In the terminal, columns aligned."""
        columns = zip(self.headings, *self.rows, strict=True)
        padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
        print("\n".join([self.title, *("  ".join(line).rstrip() for line in zip(*padded, strict=True)), ""]))

    def without_empty(self, *also_if_equal: str) -> Table:
        """Without columns of dashes; those named are left out where all rows say the same, too."""
        kept = [
            (heading, *column)
            for heading, *column in zip(self.headings, *self.rows, strict=True)
            if set(column) != {"-"} and not (heading in also_if_equal and len(set(column)) == 1)
        ]
        headings, *rows = zip(*kept, strict=True)
        return Table(headings, rows, self.title)


# ---- values ----


def field(*path: str, scale: float = 1.0) -> Callable[[Row], Any]:
    """What a row has at ``path``, times ``scale``; None where something on the way is missing."""

    def value(row: Row) -> Any:
        found: Any = row
        for name in path:
            found = (found or {}).get(name)
        return found if scale == 1.0 or found is None else found * scale

    return value


def short(count: int | None) -> str | None:
    """1570000 -> 1.57M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count is not None and count >= size:
            return f"{count / size:.3g}{unit}"
    return None if count is None else str(count)


def tokens(row: Row) -> str:
    """Sequences x tokens x micro-batches of a step."""
    return "searched" if row["kind"] == "longest" else "{batch} x {length} x {accumulation}".format(**row["settings"])


def status(row: Row) -> str:
    """What became of it, and what else a reader must know."""
    text = str(row["status"])
    if row["kind"] == "steps" and row["settings"]["max_grad_norm"] is None:
        text += ", without clipping"
    return text


def _held(row: Row) -> float | None:
    """MiB of gradients, optimizer state and tables on the device."""
    held = row.get("optimizer_bytes")
    return sum(size for name, size in held.items() if not name.startswith("host_")) / MIB if held else None


def _seconds(row: Row) -> str | None:
    one = row.get("step_time_s")
    return "{median:.3f} ({p20:.3f}-{p80:.3f})".format(**one) if one else None


# ---- comparisons and rounds ----


def results_table(document: Row) -> Table:
    """One line a result; AdamW's on the same shape and tokens is the reference."""
    limits = [row for row in document.get("cases", ()) if row["kind"] in ("longest", "switches")]
    rows = [*document["results"], *limits]
    reference = {(row["shape"], tokens(row)): row for row in rows if row["method"] == "adamw"}

    def of_adamw(value: Callable[[Row], Any]) -> Callable[[Row], float | None]:
        def ratio(row: Row) -> float | None:
            other = value(reference.get((row["shape"], tokens(row)), {}))
            return value(row) / other if value(row) and other else None

        return ratio

    step, peak = field("step_time_s", "median"), field("peak_bytes", scale=1 / GIB)
    columns: list[Column] = [
        ("shape", field("shape"), ""),
        ("method", field("method"), ""),
        ("batch x length x accumulation", tokens, ""),
        ("trainable", lambda row: short(row["trainable_parameters"]), ""),
        ("step s (p20-p80)", _seconds, ""),
        ("of adamw", of_adamw(step), ".2f"),
        ("tokens/s", field("tokens_per_s"), ",.0f"),
        ("held MiB", _held, ",.1f"),
        ("allocated GiB", field("peak_allocated_bytes", scale=1 / GIB), ".2f"),
        ("peak GiB", peak, ".2f"),
        ("of adamw", of_adamw(peak), ".2f"),
        (
            "process GiB",
            lambda row: row["process_bytes"] / GIB if not row["note"] and row["process_bytes"] else None,
            ".2f",
        ),
        ("longest", field("longest"), ","),
        ("with the plan's reserve", field("longest_with_reserve"), ","),
        ("switches", field("switches"), ""),
        ("status", status, ""),
    ]
    return Table.of(rows, columns).without_empty("shape", "batch x length x accumulation")


def phase_table(document: Row) -> Table:
    """Milliseconds by phase, and for MISA the time over the same step without any optimizer."""

    def own_part(row: Row) -> float | None:
        ledger = row.get("overhead")
        return sum(ledger["parts"].values()) / ledger["floor_s"] if ledger else None

    columns: list[Column] = [
        ("shape", field("shape"), ""),
        ("method", field("method"), ""),
        *((f"{name} ms", field("phases_s", name, scale=1e3), ",.1f") for name in PHASES),
        ("own part", own_part, ".1%"),
        ("over the floor", field("overhead", "overhead_of_pairs"), "+.1%"),
    ]
    rows = [row for row in document["results"] if row.get("phases_s")]
    return Table.of(rows, columns, "time by phase").without_empty("shape") if rows else Table((), ())


#: A profile by phase, means of a step.
PROFILE_COLUMNS: tuple[Column, ...] = (
    ("phase", field("phase"), ""),
    ("ms a step", field("time_s", scale=1e3), ".3f"),
    ("share", field("share"), ".1%"),
    ("allocated MiB a step", field("allocated_bytes", scale=1 / MIB), ".1f"),
    ("peak MiB", field("peak_bytes", scale=1 / MIB), ".1f"),
    ("launches a step", field("launches"), ".0f"),
    ("reads a step", field("host_reads"), ".1f"),
)


def profile_tables(document: Row) -> list[Table]:
    """For each profiled method its phases, then all methods' numbers of a whole step."""
    rows = [row for row in document["results"] if row.get("profile")]
    found = [Table.of(row["profile"], PROFILE_COLUMNS, f"profile of {row['method']}, {tokens(row)}") for row in rows]
    names = rows[0]["profile_summary"] if rows else ()
    numbers: list[Column] = [(name.replace("_", " "), field("profile_summary", name), ",.4g") for name in names]
    return [*found, Table.of(rows, [("method", field("method"), ""), *numbers], "profiles, a whole step")]


#: What was promised and what came out.
CHECK_COLUMNS: tuple[Column, ...] = (
    *((name, field(name), "") for name in ("case", "check", "wanted")),
    ("measured", field("text"), ""),
    ("verdict", field("verdict"), ""),
)
#: The other commands of a round.
COMMAND_COLUMNS: tuple[Column, ...] = (
    ("command", field("case"), ""),
    ("s", field("case_s"), ".0f"),
    ("status", field("status"), ""),
    ("last line", lambda row: row.get("last_lines", ["-"])[-1], ""),
)


def tables(document: Row) -> list[Table]:
    """All that have a row."""
    commands = [row for row in document.get("cases", ()) if row["kind"] == "command"]
    every = (
        Table.of(commands, COMMAND_COLUMNS, "commands"),
        Table.of(document.get("checks", ()), CHECK_COLUMNS, "checks"),
        *((results_table(document), phase_table(document)) if document["results"] else ()),
        *profile_tables(document),
    )
    return [table for table in every if table.rows]


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
    shown = (f"{name} {','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in settings.items())
    lines += ["", f"Settings: {'; '.join(shown)}. Weights are random."]
    if any(row.get("step_time_s") for row in document["results"]):
        lines += ["", PEAK_TEXT[settings["device"].partition(":")[0]]]
    for table in tables(document):
        if table.title:
            lines += ["", f"**{table.title.capitalize()}**{PHASE_TEXT if table.title == 'time by phase' else ''}"]
        lines += ["", *table.lines()]
    plans = [(name, plan) for name, plan in document.get("plans", {}).items() if plan["status"] != "ok"]
    lines += ["", *(f"- plan for {name}: {plan['status']}" for name, plan in plans)] if plans else []
    lines += [""] + [f"![{path.stem}]({path.as_posix()})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


PEAK_TEXT = {
    "cpu": "Peak is the largest resident memory of the process.",
    "cuda": "Peak is what PyTorch's allocator reserved; attention is pinned to torch's flash kernel.",
}
PHASE_TEXT = (
    ". *Own part*: the time inside MISA (arrival of gradients, norm, update, a step's share of a switch) as a share of "
    "the floor, which is the same forward and backward with the same active matrices and no optimizer. *Over the "
    "floor*: a whole MISA step against it, in turns, median of the pairs: on a machine whose steps differ by 10% it is "
    "good to some percent only."
)


def insert(made: Callable[[Sequence[Path]], str], pictures: Sequence[Path], target: Path, names: Sequence[str]) -> None:
    """Replace what stands between the markers of ``target`` by a page, with pictures linked from there.

    Args:
        made: the page with these pictures; its first line is a title and left out.
        pictures: where they are.
        target: a Markdown file.
        names: of the markers; the first that the file has.

    Raises:
        ValueError: the file has no markers; nothing is written then.
    """
    text = target.read_text(encoding="utf-8")
    name = next((name for name in names if f"<!-- {name}: begin -->" in text), names[-1])
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    links = [Path(os.path.relpath(path, target.parent)) for path in pictures]
    body = made(links).partition("\n")[2].strip()
    text, found = re.subn(f"{begin}.*?{end}", lambda old: f"{begin}\n\n{body}\n\n{end}", text, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{target} has no lines {begin} and {end}, between which the page goes")
    target.write_text(text, encoding="utf-8")


# ---- kernels ----


def _device_ms(row: Row) -> float | None:
    """What GB/s belong to, where it is not the time of the clock."""
    info = row["extra_info"]
    return 1e3 * info["seconds"] if info["timed_by"] == "events" else None


#: What every row of the kernel benchmarks has; all else in ``extra_info`` gets a column of its own.
KERNEL_COLUMNS: tuple[Column, ...] = (
    ("", lambda row: f"`{row['extra_info']['scheme']}`", ""),
    ("median ms", field("stats", "median", scale=1e3), ".3f"),
    ("IQR ms", field("stats", "iqr", scale=1e3), ".3f"),
    ("device ms", _device_ms, ".3f"),
    ("MB moved", field("extra_info", "bytes", scale=1e-6), ",.1f"),
    ("GB/s", field("extra_info", "gb_per_s"), ",.2f"),
    ("% of copy", field("extra_info", "percent_of_copy"), ".0f"),
)
COMMON = ("bytes", "gb_per_s", "percent_of_copy", "timed_by", "seconds", "scheme")


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
    facts = sorted({name for row in rows for name in row["extra_info"]} - set(COMMON))
    columns = [*KERNEL_COLUMNS, *((name.replace("_", " "), field("extra_info", name), ",.3g") for name in facts)]
    return Table.of(sorted(rows, key=lambda row: row["stats"]["median"]), columns).without_empty()

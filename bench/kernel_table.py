"""Markdown tables of kernel benchmarks, from the JSON that ``pytest bench/ --benchmark-json`` writes.

python -m misa_engine.bench.kernel_table bench/results/kernels_cpu.json     writes kernels_cpu.md beside it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADINGS = ("", "median ms", "IQR ms", "MB moved", "GB/s", "% of copy")
#: What every row has; all else in ``extra_info`` gets a column of its own.
COMMON = {"bytes", "gb_per_s", "percent_of_copy", "timed_by", "seconds", "scheme"}


def markdown(results: Mapping[str, Any]) -> str:
    """One table for each group, the fastest row first, and below them what did not run.

    Args:
        results: ``benchmarks``; ``environment`` and ``not_run`` where they are known.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    lines = list(_environment(results["environment"])) if "environment" in results else []
    for group, rows in groups.items():
        lines += [f"### {group}", "", *_table(rows), ""]
    if results.get("not_run"):
        lines += ["### Not run", ""]
        reasons: dict[str, list[str]] = {}
        for skipped in results["not_run"]:
            reasons.setdefault(skipped["reason"], []).append(f"`{skipped['name']}`")
        lines += [f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def _environment(facts: Mapping[str, Any]) -> Sequence[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return (
        "# Kernel benchmarks",
        "",
        f"{facts['hardware']}, {facts['threads']} threads; {versions}; {facts['date']}, commit {facts['commit']}.",
        "",
        f"`{facts['command']}`",
        "",
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    ordered = sorted(rows, key=lambda row: row["stats"]["median"])
    events = any(row["extra_info"]["timed_by"] == "events" for row in rows)  # GB/s then belongs to these times
    facts = sorted({name for row in rows for name in row["extra_info"]} - COMMON)
    headings = (
        *HEADINGS[:3],
        *(["device ms"] if events else []),
        *HEADINGS[3:],
        *(name.replace("_", " ") for name in facts),
    )
    lines = [_line(headings), "|---|" + "--:|" * (len(headings) - 1)]
    for row in ordered:
        info, stats = row["extra_info"], row["stats"]
        cells = [
            f"`{info['scheme']}`",
            f"{1e3 * stats['median']:.3f}",
            f"{1e3 * stats['iqr']:.3f}",
            *([f"{1e3 * info['seconds']:.3f}"] if events else []),
            f"{info['bytes'] / 1e6:,.1f}",
            f"{info['gb_per_s']:,.2f}",
            f"{info['percent_of_copy']:.0f}",
            *(_number(info.get(name)) for name in facts),
        ]
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"


def main() -> None:
    """Write the tables beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of pytest bench/ --benchmark-json")
    arguments = parser.parse_args()
    target = arguments.results.with_suffix(".md")
    target.write_text(markdown(json.loads(arguments.results.read_text())))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()

"""``misa report OUT``: the end table and the pictures of a run, from its log alone."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from misa_engine.errors import DONE, UserError, bad_input
from misa_engine.report.log import RunLog

USAGE = "usage: misa report OUT\n\nPrints the table of a run and draws its pictures from OUT/misa_log.jsonl."


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return DONE
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError(f"misa report takes one thing, the output directory of a run; got {' '.join(words) or 'none'}")
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed: pip install 'misa_engine[train]'")
    out = Path(words[0]).expanduser()
    if not out.exists():
        raise UserError(f"{out} does not exist; name the --output_dir of a run.")
    with bad_input():
        entries = RunLog.read(out)
        if any(entry["type"] == "switch" for entry in entries):
            show_table(entries)
        write_pictures(out)
    return DONE


def show_table(entries: list[dict[str, Any]]) -> None:
    """Print a run's end table; wide enough for its names where no terminal sets the width."""
    from rich.console import Console

    from misa_engine.report.summary import summary_table

    Console(width=None if sys.stdout.isatty() else 120).print(summary_table(entries))


def write_pictures(out: Path) -> None:
    """Make the pictures, or say what is needed for them."""
    if find_spec("matplotlib") is None:
        print(f"no pictures: matplotlib is not installed. pip install 'misa_engine[train]', then: misa report {out}")
        return
    from misa_engine.report.pictures import make_report

    for path in make_report(out):
        print(f"picture: {path}")

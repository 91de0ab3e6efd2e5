"""What all result pages share: one HTML file that loads nothing, in a light and in a dark browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; --dim: #5c5c5c; --good: #00694b; --bad: #a33f00; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #222; --dim: #aaa; --good: #4cc79c; --bad: #ff9b5c; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; vertical-align: top; }
th { background: var(--soft); text-align: left; } td:first-child, td.word { text-align: left; }
.wide { overflow-x: auto; } .dim { color: var(--dim); font-size: .85em; } .yes { color: var(--good); }
.no { color: var(--bad); } code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85em; }
figure { margin: 1rem 0; background: #fff; padding: .5rem; } figure img { max-width: 100%; height: auto; }
.notice { border-left: 4px solid var(--bad); padding: .3rem 1rem; background: var(--soft); }
tr.best { background: var(--soft); font-weight: bold; } tr.pruned, tr.failed { color: var(--dim); }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file.

    Args:
        title: plain text, of the browser's tab and of the page.
        parts: HTML of the body; empty ones are left out.
    """
    head = f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>'
    head += f'\n<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
    return head + "\n".join(filter(None, (f"<h1>{escape(title)}</h1>", *parts))) + "\n</body>\n</html>\n"


def table(name: str, headings: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table whose numbers are set right and whose words are set left.

    Args:
        name: its id.
        headings: HTML.
        rows: HTML; what is the user's goes through ``html.escape`` first.
        classes: one a row; empty for none.
    """
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    lines = ["".join(f"<td{_kind(cell)}>{cell}</td>" for cell in row) for row in rows]
    kinds = [f' class="{kind}"' if kind else "" for kind in classes or [""] * len(lines)]
    body = "\n".join(f"<tr{kind}>{line}</tr>" for kind, line in zip(kinds, lines, strict=True))
    made = f'<table id="{name}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{made}</div>'


def section(title: str, name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table below it; nothing where there are no rows."""
    return f"<h2>{title}</h2>\n{table(name, headings, rows)}" if rows else ""


def picture(title: str, figure: Figure) -> str:
    """A figure drawn into the page, the same bytes for the same figure."""
    from matplotlib import rc_context

    held = io.BytesIO()
    with rc_context({"svg.hashsalt": "misa"}):  # matplotlib salts ids by chance otherwise
        figure.savefig(held, format="svg", facecolor="white", metadata={"Date": None})
    data = base64.b64encode(held.getvalue()).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _kind(cell: str) -> str:
    return "" if cell[:1].isdigit() or cell[:1] in "-–+−" else ' class="word"'

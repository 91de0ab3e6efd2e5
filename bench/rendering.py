"""Tables, pages and pictures of stored results, whichever suite they are of."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from misa_engine.bench import learning_results, tables
from misa_engine.errors import UserError


def render(path: Path, into: Path | None = None) -> None:
    """Tables, page and pictures from stored results, a run's or the kernel benchmarks'.

    Args:
        path: results.json, or what ``pytest bench/ --benchmark-json`` wrote.
        into: a Markdown file that gets the page between its markers: those of the results' folder, or those of any.

    Raises:
        UserError: the file cannot be read or is none of them, or ``into`` has no markers.
    """
    drawn: list[Path] = []
    made, folder = tables.page, path.resolve().parent.name
    markers = [f"misa bench {folder}", "misa bench"]
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in document:
            text = tables.kernel_page(document)
        else:
            if learning := document.get("kind") == "learning":
                made, markers = learning_results.page, [f"misa bench learning {folder}"]
            drawn = _pictures(document, path, "learning_pictures" if learning else "pictures")
            text = made(document, [Path(name.name) for name in drawn])
    except OSError as error:
        raise UserError(f"--render {path}: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"--render {path} holds no results of misa bench: {error!r}") from error
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if into is not None:
        try:
            tables.insert(lambda links: made(document, links), drawn, into, markers)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--into {into}: {error}") from error
    shown = tables.tables if made is tables.page else lambda document: learning_results.tables(document["results"])
    for table in [] if "benchmarks" in document else shown(document):
        table.show()
    print("\n".join(str(name) for name in (path, path.with_suffix(".md"), *drawn)))
    kernels = path.with_name("kernels.json")
    if path.name == "results.json" and kernels.exists():
        render(kernels)


def _pictures(document: dict[str, Any], path: Path, module: str) -> list[Path]:
    try:
        drawer = import_module(f"misa_engine.bench.{module}")
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}; pip install 'misa_engine[bench]', then --render {path}", file=sys.stderr)
        return []
    drawn: list[Path] = drawer.pictures(document, path.parent)
    return drawn

"""MkDocs hooks: pictures that live in bench/results, links to files of the repository, and the list of error texts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = "bench/results/"
#: Exceptions with a message for the user.
RAISED = {"UserError", "ValueError", "RuntimeError", "CheckpointError", "ModuleNotFoundError"}
#: Folders whose errors a user of the library or of ``misa`` can meet.
PACKAGES = ("cli", "engine", "evaluation", "export", "method", "planner", "report", "sweep", "trainer", "kernels")


def on_files(files: Any, config: Any) -> Any:
    """Publish the benchmark's pictures under the path that pages on GitHub use for them."""
    from mkdocs.structure.files import File

    for picture in sorted((ROOT / RESULTS).rglob("*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fit links that leave docs/ to the site, and put in the error texts."""
    folder = (DOCS / page.file.src_uri).parent

    def on_site(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = target.partition("#")[0]
        if "://" in target or not path or (folder / path).resolve().is_relative_to(DOCS):
            return link.group(0)
        if RESULTS in target and target.endswith(".png"):
            return f"[{text}]({target[target.index(RESULTS) :]})"
        return text if text.startswith("`") else f"`{text}`"  # a file of the repository has no page

    markdown = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", on_site, markdown)
    if "<!-- errors -->" in markdown:
        markdown = markdown.replace("<!-- errors -->", error_list())
    return markdown


def error_list() -> str:
    """Every message that misa_engine raises, by package and file, straight from the sources."""
    lines = []
    for package in PACKAGES:
        for path in sorted((ROOT / "misa_engine" / package).glob("**/*.py")):
            found = list(dict.fromkeys(messages(path)))
            if found:
                lines += ["", f"### {path.relative_to(ROOT / 'misa_engine')}", "", *(f"- {text}" for text in found)]
    return "\n".join(lines)


def messages(path: Path) -> Iterator[str]:
    """Texts of the exceptions that a file raises, with ``…`` where a value stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = getattr(node.exc.func, "id", "")
            text = " ".join(text_of(node.exc.args[0]).split())
            if name in RAISED and len(text.replace("…", "").strip()) > 12:
                yield "`" + text.replace("`", "'") + "`"


def text_of(node: ast.expr) -> str:
    """A string expression as text."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"

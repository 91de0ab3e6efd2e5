"""The recorded terminal pictures: there, shown on a page, well-formed, small, and silent about where they were made."""

from __future__ import annotations

import getpass
import html
import re
import socket
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from documentation import docs_script

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "docs/terminals").glob("*.svg"))
EACH_PICTURE = pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
#: Absolute paths of Unix and Windows, wherever they begin.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(root|home|Users|tmp|work|var|opt|usr|mnt|private)\b|\b[A-Z]:\\|site-packages", re.IGNORECASE
)


@pytest.fixture(scope="module")
def make_terminals():
    with docs_script("make_terminals") as script:
        yield script


def shown_by(picture: Path) -> str:
    """The text of the terminal, line after line."""
    texts = [element for element in ElementTree.parse(picture).iter() if element.tag.endswith("}text")]
    lines: dict[float, str] = {}
    for element in texts:
        height = float(element.get("y", "0"))
        lines[height] = lines.get(height, "") + "".join(element.itertext())
    return html.unescape("\n".join(lines.values())).replace("\xa0", " ")


def test_every_command_has_its_picture_and_every_picture_a_page(make_terminals):
    """After a new command: python docs/make_terminals.py NAME, and show docs/terminals/NAME.svg on a page."""
    assert {picture.stem for picture in PICTURES} == set(make_terminals.COMMANDS)
    shown = set()
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"!\[[^\]]+\]\(([^)\s]+\.svg)\)", page.read_text(encoding="utf-8")):
            shown.add((page.parent / target).resolve())
    assert shown == set(PICTURES)


@EACH_PICTURE
def test_a_picture_shows_what_its_command_printed(make_terminals, picture):
    first, *others = shown_by(picture).splitlines()[1:]  # the first is the title
    assert make_terminals.COMMANDS[picture.stem].startswith(first.removeprefix("$ ").strip()) and len(others) > 5
    assert not any(make_terminals.of_a_library(line) for line in others)


@EACH_PICTURE
def test_a_picture_is_small_and_loads_nothing(picture):
    text = picture.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("}svg") and len(text.encode()) < 60_000
    assert not re.search(r"url\(\"?http|@import|<script|href=\"http", text)


@EACH_PICTURE
def test_a_picture_tells_nothing_of_the_machine_it_was_made_on(picture):
    for text in (picture.read_text(encoding="utf-8"), shown_by(picture)):
        assert not MACHINE_PATH.search(text)
        assert str(ROOT) not in text and tempfile.gettempdir() not in text
        for name in (getpass.getuser(), socket.gethostname()):
            assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), name


def test_machine_paths_are_found_and_relative_ones_are_not():
    for text in ("in /root/x", '"/tmp/a"', "C:\\Users\\me", "lib/python3/site-packages/x", "at /home/me"):
        assert MACHINE_PATH.search(text), text
    for text in ("out/loss.png", "picture: ./tmp/x", "delta x steps / inner_steps", "https://a.org/work"):
        assert not MACHINE_PATH.search(text), text

"""The scripts in docs/ that make parts of the pages, for the tests that hold the pages to them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


@contextmanager
def docs_script(name: str) -> Iterator[ModuleType]:
    """docs/NAME.py as a module; docs/ is no package."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docs"))

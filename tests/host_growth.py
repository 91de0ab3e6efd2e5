"""How much host memory something takes at its height; for scripts that run in a process of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def importable() -> dict[str, str]:
    """The variable with which a script finds this module, and everything else where it did."""
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *([others] if others else [])))}


def held(key: str = "RssAnon") -> int:
    """Bytes of this process, by a row of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def growth_of(action: Callable[[], Any], key: str = "RssAnon") -> tuple[Any, int]:
    """What ``action`` returns, and by how much ``held(key)`` rose at most meanwhile."""
    before, done, peak = held(key), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], held(key) - before)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    result = action()
    done.set()
    thread.join()
    return result, max(peak[0], held(key) - before)

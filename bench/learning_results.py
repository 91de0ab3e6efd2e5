"""Summary."""
from __future__ import annotations
from pathlib import Path
from typing import Any
def publish(rows, settings, output):
    from misa_engine.bench.runner import write
    write({"settings": settings, "runs": rows}, output / "results.json")

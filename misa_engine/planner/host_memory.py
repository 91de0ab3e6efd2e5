"""What the host has to hold of a model with residents, against what it has: said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil

from misa_engine.errors import UserError

#: For Python, libraries, the data and one tensor in passing.
MARGIN_BYTES = 1 << 30
#: Of the control group that this process belongs to, version 2 and 1: limit, use, and statistics.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_bytes() -> int:
    """Memory that this process can still get: of the machine, or of its container where that has less."""
    free = int(psutil.virtual_memory().available)
    for limit, used, statistics in _GROUPS:
        try:
            rows = dict(line.split() for line in Path(statistics).read_text().splitlines())
            files = int(rows.get("inactive_file", 0))  # given up when memory is short
            least = int(Path(limit).read_text()) - int(Path(used).read_text()) + files
        except (OSError, ValueError):  # no such file, or "max"
            continue
        free = min(free, max(0, least))
    return free


def check_host_memory(name: str, needed: Mapping[str, int], available: int | None = None) -> None:
    """Refuse a model whose masters the host cannot hold.

    Args:
        name: of the model, for the message.
        needed: bytes by category, as ``planner.residents`` counts them.
        available: bytes; None asks the machine.

    Raises:
        UserError: with the bytes of both.
    """
    available = available_bytes() if available is None else available
    total = sum(needed.values())
    if total + MARGIN_BYTES <= available:
        return
    parts = ", ".join(f"{what.replace('_', ' ')} {_gib(size)}" for what, size in needed.items() if size)
    raise UserError(
        f"{name} with residents keeps its exact weights in host memory: {_gib(total)} ({parts}) and "
        f"{_gib(MARGIN_BYTES)} for everything else, but {_gib(available)} are available. Close other programs, take a "
        "machine with more memory, or a smaller model."
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

"""What the host has to hold of a model with residents, against what it has: said before anything is loaded."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from misa_engine.engine.replicas import Replicas, digest
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


def memory_of_all() -> tuple[int, int]:
    """What the processes of a host can still get together, and how many they are: of the host where each gets least.

    Where torch's process group is up all processes have to call this, before any of them loads anything.

    Returns:
        Bytes, and processes of this run on that host; (``available_bytes()``, 1) without a group.

    Raises:
        ReplicaError: another process has ended or does not come.
    """
    replicas = Replicas.join()
    if replicas is None:
        return available_bytes(), 1
    rows = replicas.tell([digest([socket.gethostname()]), available_bytes()])
    hosts: dict[int, list[int]] = {}
    for host, free in rows:
        hosts.setdefault(host, []).append(free)
    found = min(hosts.values(), key=lambda free: min(free) / len(free))  # the same everywhere: then all refuse, or none
    return min(found), len(found)


def check_host_memory(name: str, needed: Mapping[str, int], available: int | None = None, processes: int = 1) -> None:
    """Refuse a model whose masters the host cannot hold.

    Args:
        name: of the model, for the message.
        needed: bytes of each process by category, as ``planner.residents`` counts them.
        available: bytes of the host; None asks the machine.
        processes: of this host, each of which holds its own.

    Raises:
        UserError: with the bytes of both.
    """
    available = available_bytes() if available is None else available
    total = sum(needed.values())
    if processes * (total + MARGIN_BYTES) <= available:
        return
    parts = ", ".join(f"{what.replace('_', ' ')} {_gib(size)}" for what, size in needed.items() if size)
    each = f" in each of {processes} processes of this host" if processes > 1 else ""
    raise UserError(
        f"{name} with residents keeps its exact weights in host memory: {_gib(total)} ({parts}) and "
        f"{_gib(MARGIN_BYTES)} for everything else{each}, but {_gib(available)} are available. Close other programs, "
        f"take {'fewer processes, ' if processes > 1 else ''}a machine with more memory, or a smaller model."
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

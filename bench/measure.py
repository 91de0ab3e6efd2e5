"""What is measured and how: the environment, spreads, memory counters, the limit of an imitated card."""

from __future__ import annotations

import gc
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from misa_engine.trainer.runstats import peak_memory_bytes, resident_bytes

Result = TypeVar("Result")

#: Distributions whose versions a reader needs; those that are not installed are listed as None.
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "badam", "galore-torch", "torch-optimi", "lomo-optim",
    "flashoptim", "torchao", "liger-kernel", "reasoning-gym", "misa_engine",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    folder = Path(__file__).resolve().parent
    return {
        "hardware": _hardware(device),
        "driver": _driver() if device.type == "cuda" else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "alloc_conf": os.environ.get("PYTORCH_ALLOC_CONF"),
        "commit": _output("git", "-C", str(folder), "describe", "--always", "--dirty"),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _command() -> str:
    """What was typed, without the paths of this machine's Python and scripts."""
    script, *words = sys.argv
    module = Path(script).name == "__main__.py"
    return shlex.join([*(["python", "-m", Path(script).parent.name] if module else [Path(script).name]), *words])


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = Path("/proc/cpuinfo")  # of Linux; platform tells the architecture alone there
    names = re.findall(r"model name\s*: (.*)", cores.read_text()) if cores.exists() else []
    return f"CPU, {len(names)} cores, {names[0]}" if names else platform.processor() or "CPU"


def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return lines.splitlines()[0] if lines else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # an editable checkout on the path has no metadata
        return getattr(sys.modules.get(distribution), "__version__", None)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def installed(distribution: str) -> bool:
    """Whether a package is here, by the name that pip knows."""
    return _version(distribution) is not None


# ---- numbers ----


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 20th/80th percentile, interpolated."""
    median, low, high = np.percentile(values, (50, 20, 80))
    return {"median": float(median), "p20": float(low), "p80": float(high)}


# ---- device ----


def timed(device: torch.device, work: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    """Seconds of ``work(*args)`` with the device idle before and after, and what it returned."""
    synchronize(device)
    started = time.perf_counter()
    result = work(*args)
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limit_memory(device: torch.device, limit_bytes: int) -> None:
    """Let the caching allocator reserve at most ``limit_bytes``; 0 takes the limit away.

    What is imitated is the size of a card's memory for the allocator alone: the CUDA context, the libraries'
    workspaces outside the allocator and other programs' memory do not count against it.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total) if limit_bytes else 1.0, device)


def release_cache(device: torch.device) -> None:
    """Give cached memory back. Only between attempts of a search, never in a training loop."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def held_bytes(device: torch.device) -> tuple[int, int]:
    """Allocated and reserved bytes now; on a CPU the resident memory of the process, twice."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (resident := resident_bytes()), resident


def memory_counters(device: torch.device) -> dict[str, int | None]:
    """Peaks since the process began and what the process holds now.

    ``process_bytes`` is NVML's figure for this process (context included), ``device_used_bytes`` is everything in use
    on the card. On a CPU ``peak_bytes`` is the largest resident memory and the allocator's figures are None.
    """
    names = ("peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "device_used_bytes")
    if device.type != "cuda":
        return dict(zip(names, (peak_memory_bytes(device), None, None, resident_bytes(), None), strict=True))
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(zip(names, (reserved, allocated, reserved, _nvml_process_bytes(), total - free), strict=True))


def _nvml_process_bytes() -> int | None:
    """This process's memory as nvidia-smi lists it; None where the driver does not tell (containers often do not)."""
    query = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    rows = [line.split(",") for line in (_output(*query) or "").splitlines()]
    used = {pid.strip(): mib.strip() for pid, mib in (row for row in rows if len(row) == 2)}
    mib = used.get(str(os.getpid())) or (next(iter(used.values())) if len(used) == 1 else "")
    return int(mib) << 20 if mib.isdigit() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, also when a library raises it under another name."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "cublas_status_alloc_failed", "can't allocate memory"))
    )

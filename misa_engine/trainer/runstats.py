"""What a run did, measured from outside the optimizer: which weights changed, how long steps took, peak memory."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # accelerate needs it anyway
import torch
from torch import Tensor, nn

from misa_engine.engine.replicas import Replicas
from misa_engine.engine.shards import first_element, is_sharded, local
from misa_engine.trainer.completeness import SAFE_INDEX, SAFE_WEIGHTS, read_header, weight_files

#: Up to here the starting weights are kept on the host; larger models are compared with the files they came from.
SNAPSHOT_LIMIT_BYTES = 2 << 30
#: Elements compared at a time: 64 MiB in float32, so that no fp32 copy of a large matrix is ever made.
_CHUNK = 1 << 24


# ---- which weights changed ----


@dataclass(frozen=True)
class Change:
    """How far one parameter is from where it started."""

    relative: float | None
    """‖θ_end − θ_start‖ / ‖θ_start‖; None where the start was zero and the end is not."""
    identical: bool
    """Bit for bit the same."""

    @classmethod
    def of(cls, moved: float, before: float, identical: bool) -> Change:
        """From ‖θ_end − θ_start‖² and ‖θ_start‖²."""
        if moved == 0:
            return cls(0.0, identical)
        return cls((moved / before) ** 0.5 if before > 0 else None, identical)


class StartingWeights:
    """The weights as they are now, to be compared with later ones.

    Models of up to ``limit`` bytes are copied to the host. Larger ones are not: their safetensors files, found through
    the config's ``_name_or_path``, are read again when comparing; parameters that are not found there stay unknown.
    Of sharded weights each process has its rows.
    """

    def __init__(self, model: nn.Module, limit: int = SNAPSHOT_LIMIT_BYTES):
        parameters = dict(model.named_parameters())
        self._copies: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        if sum(local(p).nbytes for p in parameters.values()) <= limit:
            self._copies = {name: local(p).detach().to("cpu", copy=True) for name, p in parameters.items()}
        else:
            for file in _source_files(model):
                for name, shape in read_header(file).items():
                    if name in parameters and shape == tuple(parameters[name].shape):
                        self._files[name] = file

    @property
    def held_bytes(self) -> int:
        """Host memory that the copies take, which a run without this measurement would not need."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    def compare(self, model: nn.Module) -> dict[str, Change]:
        """The change of every parameter whose start is known."""
        return {name: Change.of(*sums) for name, sums in self.sums(model).items()}

    def sums(self, model: nn.Module) -> dict[str, tuple[float, float, bool]]:
        """``sums_of_squares`` of every parameter whose start is known, or of this process's rows of it."""
        found = {}
        for name, parameter in model.named_parameters():
            start, now = self._start_of(name, parameter), local(parameter)
            if start is not None and start.shape == now.shape:
                found[name] = sums_of_squares(start, now.detach().cpu())
        return found

    def _start_of(self, name: str, like: Tensor) -> Tensor | None:
        if name in self._copies:
            return self._copies[name]
        if name not in self._files:
            return None
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            if is_sharded(like):
                first = first_element(like) // max(1, like.numel() // like.shape[0])
                return file.get_slice(name)[first : first + local(like).shape[0]].to(like.dtype)
            return file.get_tensor(name).to(like.dtype)  # as from_pretrained converted it


def changes_of_rows(mine: Mapping[str, tuple[float, float, bool]] | None) -> dict[str, Change] | None:
    """The changes of whole parameters, from those of everybody's rows. All processes call it.

    Args:
        mine: ``StartingWeights.sums``; None where this process has none.

    Returns:
        What all know; None where a process knows nothing.
    """
    replicas = Replicas.join()
    told: list[Any] = [mine] if replicas is None else replicas.tell_json(mine)
    if any(sums is None for sums in told):
        return None
    changes = {}
    for name in told[0]:
        rows = [sums[name] for sums in told if name in sums]
        if len(rows) == len(told):
            moved, before, identical = zip(*rows, strict=True)
            changes[name] = Change.of(sum(moved), sum(before), all(identical))
    return changes


def compare(start: Tensor, end: Tensor) -> Change:
    """Compare two host tensors of the same shape and dtype."""
    return Change.of(*sums_of_squares(start, end))


def sums_of_squares(start: Tensor, end: Tensor) -> tuple[float, float, bool]:
    """‖end − start‖², ‖start‖² and whether all bits are the same, in stretches of ``_CHUNK`` elements."""
    moved = before = 0.0
    identical = True
    for a, b in zip(start.reshape(-1).split(_CHUNK), end.reshape(-1).split(_CHUNK), strict=True):
        same = bool(torch.equal(_bits(a), _bits(b)))
        identical = identical and same
        wide = a.double() if a.numel() <= 1 << 16 else a.float()  # small tensors exactly, large ones fast
        before += float(wide.square().sum(dtype=torch.float64))
        if not same:
            moved += float((b.to(wide.dtype) - wide).square_().sum(dtype=torch.float64))
    return moved, before, identical


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _source_files(model: nn.Module) -> list[Path]:
    """Local safetensors files that the model was loaded from; empty when there are none. Downloads nothing."""
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "") or ""
    if not source:
        return []
    if Path(source).is_dir():
        return [file for file in weight_files(Path(source)) if file.is_file()]
    from huggingface_hub import try_to_load_from_cache

    revision = getattr(config, "_commit_hash", None)
    for name in (SAFE_INDEX, SAFE_WEIGHTS):
        found = try_to_load_from_cache(source, name, revision=revision)
        if isinstance(found, str):
            return [file for file in weight_files(Path(found).parent) if file.is_file()]
    return []


# ---- time ----


class StepClock:
    """Time of the latest 10,000 optimizer steps, without ever waiting for the device.

    On CUDA each step is bracketed by two events; those that have completed are read whenever the next step begins.
    """

    def __init__(self, device: torch.device, warm_up: int = 3):
        self.seconds: deque[float] = deque(maxlen=10_000)  # a run of any length holds the same
        self._warm_up = warm_up
        self._cuda = device.type == "cuda"
        self._started: float | torch.cuda.Event | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """A step begins: its first micro-batch is next."""
        self._started = self._mark()

    def end(self) -> None:
        """The step's update has been made (on CUDA: queued)."""
        started, self._started = self._started, None
        if started is None:
            return
        if self._warm_up > 0:  # first steps compile kernels, fill caches and, in a cold start, differ in kind
            self._warm_up -= 1
        elif isinstance(started, float):
            self.seconds.append(time.perf_counter() - started)
        else:
            self._pending.append((started, self._mark()))  # type: ignore[arg-type]
            self._collect()

    def summary(self) -> dict[str, float] | None:
        """Median and the 20th and 80th percentile in seconds; None before the first measured step. Synchronises."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self._collect()
        if not self.seconds:
            return None
        ordered = sorted(self.seconds)
        last = len(ordered) - 1
        return {key: ordered[round(last * share)] for key, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self.seconds.append(begin.elapsed_time(end) / 1e3)


# ---- memory ----


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process on the host.

    On Linux the host's figure is VmHWM and not ``ru_maxrss``: a process started by a large one inherits its
    parent's ``ru_maxrss``, which would make every child of the demo look as large as the demo itself.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()  # psutil has no peak on Linux
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return int(psutil.Process().memory_info().rss)

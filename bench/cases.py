"""One case of a benchmark: what a fresh process measures, and the row that it reports as it goes.

CommandCase     another command: the GPU's tests, kernel benchmarks, a profile
TrainingCase    a method on a model; its kinds are in training.py
"""

from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from misa_engine.bench.baselines import BASELINES, build
from misa_engine.bench.ledger import Floor
from misa_engine.bench.measure import is_out_of_memory, limit_memory, memory_counters, timed
from misa_engine.bench.method import Method, Settings, Unavailable
from misa_engine.bench.named import name_of
from misa_engine.bench.workload import build_model, make_loss

#: Of the checkout.
ROOT = Path(__file__).resolve().parents[1]
CPU_NOTE = "cpu: no memory claim"
#: What every row of a training case has, measured or not.
MEASURED = (
    "step_time_s", "tokens_per_s", "peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "process_bytes",
    "device_used_bytes", "trainable_parameters",
)  # fmt: skip

Row = dict[str, Any]
Report = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """What to measure, in at most how much time."""

    kind: ClassVar[str]
    name: str
    """Of the row, unique in a run."""
    timeout_s: float = 120
    device: str = "cpu"

    def row(self, status: str) -> Row:
        """A row without any result yet."""
        return {"case": self.name, "kind": self.kind, "status": status, "note": None, "settings": asdict(self)}

    @abstractmethod
    def run(self, row: Row, report: Report) -> None:
        """Measure, with what is known so far in ``row`` and reported."""


def run_case(case: Case, report: Report) -> None:
    """Measure and report the row, also when the method is missing, memory runs out or something fails.

    Args:
        case: what to measure.
        report: takes the row; called as soon as there is something, and at the end.
    """
    row = case.row("started")
    report(row)
    try:
        case.run(row, report)
        row["status"] = "ok"
    except Unavailable as error:
        row["status"] = str(error)
    except Exception as error:
        if is_out_of_memory(error):  # a result, with the peaks
            row |= {"status": "out of memory", "error": str(error), **memory_counters(torch.device(case.device))}
        else:
            row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    report(row)


@dataclass(frozen=True, kw_only=True)
class CommandCase(Case):
    """Another command, run at the root of the checkout; it writes results of its own."""

    kind: ClassVar[str] = "command"
    words: tuple[str, ...]
    """After the name of this Python."""
    log: str
    """The file that gets what it prints."""

    def run(self, row: Row, report: Report) -> None:
        """Run it to its end; it is killed with the case's process."""
        with open(self.log, "w", encoding="utf-8") as log:
            done = subprocess.run([sys.executable, *self.words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        lines = Path(self.log).read_text(encoding="utf-8", errors="replace").split("\n")
        row["last_lines"] = [line for line in lines if line.strip()][-5:]
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {' | '.join(row['last_lines'][-2:])}")


@dataclass(frozen=True, kw_only=True)
class TrainingCase(Case, Settings):
    """A method that trains a model: what all such cases share, the method's settings among it."""

    shape: str
    """A configuration that ``workload.model_config`` knows."""
    method: str = "misa"
    """Of BASELINES; options behind it are in the settings already."""
    batch: int = 2
    length: int = 2048
    checkpointing: bool = True
    loss: str = "lean"
    """lean: in chunks, or Liger's; plain: the model's own, as every method computes it in a small model."""
    phases: bool = False
    """Time by phase, and for MISA the ledger of its own overhead."""
    limit_bytes: int = 0
    """What the allocator may reserve; 0 is the whole card."""

    def row(self, status: str) -> Row:
        """A row with every field that a result has, and no result yet."""
        note = CPU_NOTE if self.device == "cpu" else None
        own = {"shape": self.shape, "method": self.method, "note": note}
        return {**super().row(status), **own, **dict.fromkeys(MEASURED)}

    def run(self, row: Row, report: Report) -> None:
        """Build model and method under the limit, then measure."""
        method = self.prepare(row)
        report(row)
        self.measure(method, torch.device(self.device), row, report)
        row["trainable_parameters"] = method.trainable_parameters

    def prepare(self, row: Row) -> Method:
        """The method on its model.

        Raises:
            Unavailable: it cannot run here.
        """
        device = torch.device(self.device)
        if status := BASELINES[name_of(self.method)].missing():  # before seconds go into a model
            raise Unavailable(status)
        limit_memory(device, self.limit_bytes)
        build_all = partial(
            build_model, self.shape, device, checkpointing=self.checkpointing, seed=self.seed, residents=self.residents
        )
        row["build_s"], model = timed(device, build_all)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["weights_bytes"] = sum(p.nbytes for p in model.parameters())  # with residents most of them on the host
        row["loss_kind"], loss = make_loss(model, device, self.loss)
        # before the optimizer puts hooks on the model, of which a floor has a copy; residents cannot be copied
        wants_floor = self.phases and self.method.startswith("misa") and self.residents is None
        floor = Floor(model, lambda twin: make_loss(twin, device, self.loss)[1]) if wants_floor else None
        method = build(name_of(self.method), model, loss, self)
        method.floor = floor
        row["trainable_parameters"] = method.trainable_parameters
        return method

    @abstractmethod
    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """What this kind of case measures."""

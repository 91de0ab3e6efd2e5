"""RunLogWriter: turns a training run into its run log, from the first line ("run") to the last ("end")."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from misa_engine.engine.events import CallbackHandle, SwitchEvent
from misa_engine.engine.optimizer import MISA
from misa_engine.engine.residents import residents_of
from misa_engine.engine.rest import can_rest
from misa_engine.method.config import MisaConfig
from misa_engine.report.log import RunLog
from misa_engine.trainer.checkpoints import write_error
from misa_engine.trainer.runstats import (
    Change,
    StartingWeights,
    StepClock,
    changes_of_rows,
    peak_memory_bytes,
    resident_bytes,
)
from misa_engine.trainer.sharding import has_rows

if TYPE_CHECKING:
    from misa_engine.trainer.resident_check import ResidentLosses

logger = logging.getLogger(__name__)

PACKAGES = ("misa_engine", "torch", "triton", "transformers", "trl", "accelerate")


class RunLogWriter:
    """Writes the run log of one training run, with or without MISA (the baseline has the same log).

    Args:
        out: the run's output directory.
        device: where the model trains.
        writer: whether this process writes; every other rank keeps the clock and nothing else.
    """

    def __init__(self, out: Path, device: torch.device, *, writer: bool):
        self.clock = StepClock(device)
        self._out = out
        self._device = device
        self._log = RunLog(out) if writer else None
        self._began = False
        self._early: list[tuple[int, dict[str, float]]] = []
        self._start: StartingWeights | None = None
        self._rss_before = 0
        self._switches: CallbackHandle | None = None

    def arm(self) -> None:
        """Training is about to be set up: note the memory in use, forget the weights of an earlier training."""
        self._start = None
        self._rss_before = resident_bytes()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def remember(self, model: nn.Module) -> None:
        """Note the weights before training, or before a checkpoint is loaded; later calls change nothing."""
        if self._start is None and (self._log is not None or has_rows(model)):
            self._start = StartingWeights(model)

    def begin(self, step: int, model: nn.Module, misa: MISA | None, description: Mapping[str, Any]) -> None:
        """Open the log: anew at step 0, otherwise as it was when the checkpoint of that step was written."""
        self.clock = StepClock(self._device)
        self._began = True
        if self._log is None:
            return
        resumed = step > 0
        try:
            self._log.truncate_after(step if resumed else -1)
        except OSError as error:
            raise write_error(self._log.path, self._out, error) from error
        if not resumed or not self._has_beginning():
            self._append("run", step, **describe_model(model, misa), **description)
        if not resumed:
            if misa is not None:
                self._on_switch(misa.events[-1])  # the first draw was made at construction
            for early_step, numbers in self._early:
                self._append("metrics", early_step, **numbers)
        self._early = []
        if misa is not None:
            self._append("memory", step, bytes=misa.memory())
            self._switches = misa.on_switch(self._on_switch)

    def metrics(self, step: int, logs: Mapping[str, Any]) -> None:
        """Log numbers; those from before the run began follow its first line."""
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if self._began:
            self._append("metrics", step, **numbers)
        else:
            self._early.append((step, numbers))

    def end(self, step: int, model: nn.Module, misa: MISA | None) -> None:
        """Write the last line, unless the log has it: visits, scores, what changed, memory and time."""
        if self._switches is not None:
            self._switches.remove()
            self._switches = None
        peak = peak_memory_bytes(self._device)  # before the comparison below adds to it
        start = self._start if self._began else None  # not begun: it had ended before this process
        changes: dict[str, Change] | None
        if has_rows(model):
            changes = changes_of_rows(None if start is None else start.sums(model))
        else:
            changes = None if start is None else start.compare(model)
        if self._log is None or start is None or changes is None:
            return
        visits = trained_rounds(misa) if misa is not None else {}
        frozen = untrained_parameters(misa, visits, model) if misa is not None else set()
        self._append(
            "end",
            step,
            visits=visits,
            scores=misa.scores if misa is not None else {},
            relative_change={name: change.relative for name, change in changes.items()},
            frozen=sum(name in frozen for name in changes),
            unchanged_frozen=sum(name in frozen and change.identical for name, change in changes.items()),
            peak_memory_bytes=peak,
            rss_before_training_bytes=self._rss_before,
            snapshot_bytes=start.held_bytes,  # on the host, so part of the peak where that is the device
            step_time_s=self.clock.summary(),
        )

    def has_end(self) -> bool:
        """Whether the log ends with a finished run."""
        if self._log is None or not self._log.path.is_file():
            return False
        return any(entry["type"] == "end" for entry in RunLog.read(self._log.path))

    def _has_beginning(self) -> bool:
        assert self._log is not None
        return self._log.path.is_file() and any(entry["type"] == "run" for entry in RunLog.read(self._log.path))

    def _on_switch(self, event: SwitchEvent) -> None:
        logger.info(describe_switch(event))
        values = event.to_dict()
        self._append("switch", values.pop("step"), **values)

    def _append(self, kind: str, step: int, **values: Any) -> None:
        if self._log is None:
            return
        try:
            self._log.append(kind, step, **values)
        except OSError as error:
            raise write_error(self._log.path, self._out, error) from error


def describe_model(model: nn.Module, misa: MISA | None) -> dict[str, Any]:
    """What trains what: the model's name and size, the units and the budget."""
    total = sum(parameter.numel() for parameter in model.parameters())
    units = misa.units if misa is not None else ()
    return {
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "total_parameters": misa.partition.total if misa is not None else total,
        "units": [{"name": u.name, "numel": u.numel, "layer": u.layer, "kind": u.kind} for u in units],
        "delta": misa.config.delta if misa is not None else 1.0,
        "budget_parameters": misa.budget if misa is not None else total,
    }


def describe_run(config: MisaConfig, optimizer: str, device: torch.device) -> dict[str, Any]:
    """How it trains: options, device, versions of the packages that take part."""
    return {
        "optimizer": optimizer,
        "config": config.to_dict(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def describe_residents(model: nn.Module, losses: ResidentLosses | None) -> dict[str, Any]:
    """How what is not drawn rests, and what that did to the loss; empty for a model without residents."""
    residents = residents_of(model)
    if residents is None:
        return {}
    found: dict[str, Any] = {"format": residents.format.name, "matrices": len(residents.names)}
    if losses is not None:
        found |= {"loss": losses.rested, "exact_loss": losses.exact, "tokens": losses.tokens}
    return {"residents": found}


def sampler_metrics(misa: MISA) -> dict[str, float]:
    """What the sampler is doing, as Trainer metrics. Host numbers, current as of the last switch."""
    tracker = misa.tracker
    return {
        "misa/active_share": sum(misa.units[index].numel for index in tracker.active) / misa.partition.total,
        "misa/entropy": tracker.entropy,
        "misa/skipped_steps": misa.skipped_steps,
        "misa/coverage": tracker.coverage,
        "misa/stale_rounds_max": max(tracker.stale_rounds),
    }


def trained_rounds(misa: MISA) -> dict[str, int]:
    """Rounds in which each unit trained: its visits, without a last draw that no step followed."""
    visits = dict(zip((unit.name for unit in misa.units), map(int, misa.tracker.visits), strict=True))
    if misa.inner_step == 0:
        for name in misa.active:
            visits[name] -= 1
    return visits


def untrained_parameters(misa: MISA, visits: Mapping[str, int], model: nn.Module) -> set[str]:
    """Names of the parameters that must still be as they were: never trained, nor moved by a rest rule."""
    unvisited = (unit.params for unit in misa.units if not visits[unit.name])
    return set(misa.partition.frozen).union(*unvisited).difference(can_rest(model, misa.partition, misa.config))


def describe_switch(event: SwitchEvent, limit: int = 8) -> str:
    """One line: round, who left, who came, share of the budget in use, entropy of the draw, milliseconds."""

    def names(units: tuple[str, ...]) -> str:
        more = f" and {len(units) - limit} more" if len(units) > limit else ""
        return (", ".join(units[:limit]) + more) or "none"

    return (
        f"round {event.round} at step {event.step}: left {names(event.left)}; came {names(event.came)}; "
        f"{event.budget_share:.1%} of the budget, {event.active_share:.2%} of the model; "
        f"entropy {event.entropy:.2f}; {event.milliseconds:.1f} ms"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

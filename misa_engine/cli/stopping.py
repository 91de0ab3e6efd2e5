"""Signals during ``misa train``: the first saves a checkpoint after the present step and stops, a second stops at once.

    SIGINT (Ctrl-C)  exit 130        SIGTERM  exit 143        SIGHUP (closed terminal)  exit 129

Before training begins a signal ends the process as usual, since there is nothing to save.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from misa_engine.cli.signals import receiving
from misa_engine.engine.replicas import Replicas
from misa_engine.errors import Stopped
from misa_engine.trainer.completeness import find_last_complete_checkpoint


def take_over(sft: Any) -> None:
    """Switch transformers' own handling of SIGTERM off: it would end the run as if it were complete, seconds later."""
    if getattr(sft, "enable_jit_checkpoint", False):
        sft.enable_jit_checkpoint = False
        print("--enable_jit_checkpoint: misa train saves a checkpoint at a signal anyway, and says so", flush=True)


class StopOnSignal(TrainerCallback):
    """Turns a signal into a checkpoint and an orderly end of training.

    Args:
        out: the run's output directory.
        replicas: gives the processes that train together, which have to stop at the same step.
    """

    def __init__(self, out: Path, replicas: Callable[[], Replicas | None] = lambda: None):
        self._out, self._replicas = out, replicas
        self._steps = (0, 0)
        self.received: int | None = None
        """The signal that asked to stop; None while none has."""

    def watching(self) -> AbstractContextManager[None]:
        """Receive signals inside the block; the handlers of before are back afterwards."""
        return receiving(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # asked twice: whatever is being written is removed or recovered later
            raise self.stopped()
        self.received = number
        print(f"\n{signal.Signals(number).name}: saving a checkpoint after this step (again: stop at once)", flush=True)

    def stopped(self) -> Stopped:
        """What to raise at the end: how far the run came and how to go on."""
        assert self.received is not None
        made, wanted = self._steps
        last = find_last_complete_checkpoint(self._out)
        way = (
            f"resume with --resume_from_checkpoint true (from {last})"
            if last is not None
            else "no checkpoint was saved yet, the same command starts anew"
        )
        return Stopped(f"stopped at {made}/{wanted}, {way}", self.received)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how far the run is."""
        self._steps = (state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if asked to; a run at its end ends as usual."""
        self._steps = (state.global_step, state.max_steps)
        if (replicas := self._replicas()) is not None:
            self.received = max(number for (number,) in replicas.tell([self.received or 0])) or None
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

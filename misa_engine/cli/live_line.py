"""One line about a run: on a terminal it is rewritten as the run goes on, in a file a new one follows at each log step.

    step 60/600  loss 2.3104  lr 9.8e-06  grad norm 1.02  12,300 tokens/s  peak 4.20 GiB  ETA 3:20  active 2.9%

Messages (switches at level info, warnings, evaluations) stand above the line. All numbers, also those that are not
shown, are in the run log.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from misa_engine.trainer.runstats import peak_memory_bytes

#: Loggers whose handlers hold the stream of before; inside they must write above the line.
LOGGERS = ("misa_engine", "transformers", "trl", "accelerate", "datasets")


class LiveLine(TrainerCallback):
    """Takes the place of the Trainer's raw dictionaries and progress bars.

    Args:
        console: where the line goes; standard output unless a test says otherwise.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(soft_wrap=True)
        self._live: Live | None = None
        self._logs: dict[str, float] = {}
        self._step = self._most = self._first = 0
        self._began = self._paused = 0.0
        self._evaluating: tuple[int, int, float] | None = None  # batches done, of how many, since when
        self._tokens: tuple[float, float] | None = None  # as of the last log: tokens, seconds of training
        self._speed: float | None = None
        self._device: Any = None
        self._writes = True

    def replace_others(self, trainer: Any) -> None:
        """Become the trainer's only way of showing progress."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        self._writes = trainer.is_world_process_zero()
        trainer.add_callback(self)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The line exists inside the block; on a terminal its last state stays."""
        if not self._console.is_terminal or not self._writes:
            yield
            return
        with Live(Text(""), console=self._console, refresh_per_second=4) as self._live, _above(LOGGERS):
            try:
                yield
            finally:
                self._live.update(self._line())
        self._live = None

    # ---- what the trainer tells ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began, self._paused, self._first, self._device = time.monotonic(), 0.0, state.global_step, args.device
        self._step, self._most = state.global_step, state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step is done."""
        self._resume()
        self._step, self._most = state.global_step, state.max_steps
        self._refresh()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of an evaluation is done."""
        loader: Any = kwargs.get("eval_dataloader")
        done, _, since = self._evaluating or (0, 0, time.monotonic())
        self._evaluating = (done + 1, len(loader) if hasattr(loader, "__len__") else 0, since)
        self._refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Numbers have come; the Trainer's own summary of the run is left to the end table."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, (int, float))}
        self._step, self._most = state.global_step, state.max_steps
        if "eval_loss" in numbers:
            self._resume()
            margin = f", margin {numbers['eval_rewards/margins']:.4f}" if "eval_rewards/margins" in numbers else ""
            self._print(f"evaluation at step {self._step}: loss {numbers['eval_loss']:.4f}{margin}")
        if "loss" not in numbers:
            return
        self._logs = numbers
        self._measure(numbers.get("num_tokens"))
        if self._live is None:
            self._print(self._line().plain)
        self._refresh()

    # ---- the line ----

    def _seconds(self) -> float:
        return time.monotonic() - self._began - self._paused

    def _resume(self) -> None:
        if self._evaluating is not None:
            self._paused += time.monotonic() - self._evaluating[2]
            self._evaluating = None

    def _measure(self, tokens: float | None) -> None:
        if tokens is None:
            return
        now = self._seconds()
        before, then = self._tokens or (0.0, 0.0)
        if self._tokens is not None or self._first == 0:  # a resumed run's count may have begun before this process
            self._speed = (tokens - before) / (now - then) if now > then and tokens >= before else None
        self._tokens = (tokens, now)

    def _line(self) -> Text:
        if self._evaluating is not None:
            done, most, _ = self._evaluating
            return Text(f"step {self._step}/{self._most}  evaluating {done}{f'/{most}' if most else ''}")
        logs, parts = self._logs, [f"step {self._step}/{self._most}"]
        for name, key, form in (
            ("loss", "loss", ".4f"),
            ("lr", "learning_rate", ".3g"),
            ("grad norm", "grad_norm", ".3g"),
            ("margin", "rewards/margins", ".4f"),
        ):
            if key in logs:
                parts.append(f"{name} {logs[key]:{form}}")
        if self._speed is not None:
            parts.append(f"{self._speed:,.0f} tokens/s")
        if self._device is not None:
            parts.append(f"peak {peak_memory_bytes(self._device) / 2**30:.2f} GiB")
        made = self._step - self._first
        if made > 0 and self._most > self._step:
            parts.append(f"ETA {_clock(self._seconds() / made * (self._most - self._step))}")
        if "misa/active_share" in logs:
            parts.append(f"active {logs['misa/active_share']:.1%}")
        if "misa/coverage" in logs:
            parts.append(f"visited {logs['misa/coverage']:.0%}")
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._line())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
        if not self._console.is_terminal:
            self._console.file.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _above(names: tuple[str, ...]) -> Iterator[None]:
    """Let the loggers' handlers write to where standard error goes now: rich has put the line's console there."""
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    streams = [h for h in handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]
    before = [handler.setStream(sys.stderr) for handler in streams]
    try:
        yield
    finally:
        for handler, stream in zip(streams, before, strict=True):
            if stream is not None:
                handler.setStream(stream)

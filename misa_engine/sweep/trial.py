"""One trial: ``misa train`` in a process of its own, watched through its run log, ended early if it falls behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misa_engine.files import write_whole
from misa_engine.report.log import LOG_NAME
from misa_engine.trainer.checkpoints import ABANDONED, STAGING

#: In a trial's directory: its configuration, what it printed, its run.
CONFIG, OUTPUT, RUN = "run.yaml", "output.txt", "run"
#: Seconds between looks at a run's log.
EVERY = 0.2
#: Begins as the reasons of all trials that are made up for.
STOPPED = "killed: the sweep was stopped"
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
_MEMORY = re.compile(r"out of memory|OutOfMemory|Cannot allocate memory|MemoryError", re.IGNORECASE)


@dataclass
class Outcome:
    """How a trial ended."""

    state: str
    """complete, pruned or failed."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, held-out loss), of the evaluations after step 0."""
    reason: str | None = None
    """Why it failed, or was ended."""
    exit_code: int | None = None
    seconds: float = 0.0
    end: Mapping[str, Any] = field(default_factory=dict)
    """The last line of the run log: memory, step time, visits."""

    @property
    def loss(self) -> float | None:
        """The last held-out loss."""
        return self.losses[-1][1] if self.losses else None


def launcher() -> list[str]:
    """How a command of misa is started so that it ends with this process."""
    return [sys.executable, "-m", "misa_engine.sweep.worker", str(os.getpid())]


def run_trial(
    folder: Path,
    values: Mapping[str, Any],
    falls_behind: Callable[[int, float], bool],
    launch: Sequence[str],
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train with ``values`` and wait for the end.

    Args:
        folder: of the trial; gets CONFIG, OUTPUT and the run.
        values: options of misa train; output_dir is replaced.
        falls_behind: is told the number of an evaluation (1, 2, ...) and its loss, and says whether to end the run.
        launch: the command to which ``train --config FILE`` is added.
        stopped: says whether the sweep has to end, and the run with it.

    Returns:
        How it ended. Nothing that the run does raises here.
    """
    run, started = folder / RUN, time.monotonic()
    write_config(folder / CONFIG, {**values, "output_dir": str(run)})
    outcome = Outcome(FAILED)
    tail = _Tail(run / LOG_NAME)
    with running([*launch, "train", "--config", str(folder / CONFIG)], folder / OUTPUT) as child:
        while True:
            ended = child.poll() is not None  # before the log is read: what was written until then is seen
            early = _watch(tail.new_entries(), outcome, falls_behind)
            if early is not None and (early[0] == FAILED or not ended):  # what has ended did not fall behind
                outcome.state, outcome.reason = early
                break
            if ended:
                break
            if stopped():
                outcome.reason = STOPPED
                break
            time.sleep(EVERY)
    outcome.seconds = time.monotonic() - started
    if outcome.reason is None:
        _judge(outcome, child.returncode, folder / OUTPUT)
    return outcome


@contextmanager
def running(command: Sequence[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that prints to a file; with the block it ends, and those that it started.

    Nothing of it is kept, so nothing is asked of it.
    """
    with open(output, "wb") as stream:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the sweep, which then ends the process
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                if hasattr(os, "killpg"):
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    child.kill()
            child.wait()


def write_config(path: Path, values: Mapping[str, Any], heading: str = "") -> None:
    """Options of misa train as a file for --config, which appears whole."""
    import yaml

    write_whole(path, heading + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000))


def tidy(folder: Path) -> None:
    """Delete the weights of a trial's run: the model and its checkpoints. Log, pictures and configuration stay."""
    import shutil

    run = folder / RUN
    for path in (*run.glob("checkpoint-*"), *run.glob(f"{ABANDONED}-*"), run / STAGING):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*run.glob("*.safetensors"), *run.glob("*.safetensors.index.json"), *run.glob("training_args.bin")):
        path.unlink(missing_ok=True)


def _watch(
    entries: list[dict[str, Any]], outcome: Outcome, falls_behind: Callable[[int, float], bool]
) -> tuple[str, str] | None:
    """Take in new lines of the log; state and reason where the run should be ended."""
    for entry in entries:
        if entry["type"] == "end":
            outcome.end = entry
        if entry["type"] != "metrics" or "eval_loss" not in entry:
            continue
        step, loss = entry["step"], entry["eval_loss"]
        if loss is None:  # the log writes numbers that are none as null
            return FAILED, f"diverged: the held-out loss at step {step} is not a number"
        if step == 0 or (outcome.losses and step <= outcome.losses[-1][0]):
            continue
        outcome.losses.append((step, float(loss)))
        if falls_behind(len(outcome.losses), float(loss)):
            return PRUNED, f"fell behind: held-out loss {loss:.4f} at step {step}"
    return None


def _judge(outcome: Outcome, code: int, output: Path) -> None:
    """Complete or failed, and why, from the exit code and what was printed."""
    outcome.exit_code = code
    if code == 0:
        outcome.state = COMPLETE
        return
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("misa: ")), lines[-1] if lines else "no output")
    if _MEMORY.search("\n".join(lines[-40:])):
        outcome.reason = f"out of memory: {said}"
    elif code < 0:
        name = signal.Signals(-code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        outcome.reason = f"killed by {name}{hint}"
    else:
        outcome.reason = f"exit code {code}: {said}"


class _Tail:
    """The lines that were added to a run log since the last look."""

    def __init__(self, path: Path):
        self._path, self._place = path, 0

    def new_entries(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._place)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rpartition(b"\n")[0]
        self._place += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

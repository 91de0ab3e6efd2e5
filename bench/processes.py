"""A fresh process for every case, so that no case can spoil the next one, and none outlives the run.

multiprocessing's fork server imports torch and transformers once; on a GPU machine that saves some 15 s a case. It
never touches CUDA, so that every process begins without a context. Where such a process cannot use the device
(something initialised the driver at import), a new interpreter is started each time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench.cases import Case, Row, run_case

#: What is imported before the first case; the model files are those of the round's shapes.
PRELOAD = (
    "misa_engine.bench.cases",
    "misa_engine.engine.optimizer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


class CaseProcesses:
    """Runs cases, each in a process group of its own.

    Args:
        device: that the cases use.
        preload: modules to import once, beside PRELOAD, for all cases together.
    """

    def __init__(self, device: str, preload: tuple[str, ...] = ()) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() at an import must not initialise the driver
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        self._context: Any = multiprocessing.get_context("spawn")
        if "forkserver" in multiprocessing.get_all_start_methods():
            spawn, self._context = self._context, multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([*PRELOAD, *preload])
            probe = self._context.Process(target=_touch, args=(device,))  # imports must not count for the first case
            probe.start()
            probe.join()
            if probe.exitcode != 0:
                print(f"forked processes cannot use {device} here: a new interpreter for each case", flush=True)
                self._context = spawn

    def run(self, case: Case, timeout_s: float) -> Row:
        """Run a case and return its row, whatever becomes of the process."""
        deadline = time.monotonic() + timeout_s
        receiver, sender = self._context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.txt"
            process = self._context.Process(target=_work, args=(case, sender, str(log)))
            row, timed_out = case.row("started"), True
            process.start()
            sender.close()
            try:
                while receiver.poll(max(0.0, deadline - time.monotonic())):
                    row = receiver.recv()
            except EOFError:  # the process has ended
                timed_out = False
                process.join(timeout=max(1.0, deadline - time.monotonic()))
            finally:
                _kill_group(process)
            errors = log.read_text(errors="replace") if log.exists() else ""
        if row["status"] == "started":
            row["status"] = how_it_ended(process.exitcode, timeout_s, timed_out, errors)
        return row


def how_it_ended(code: int | None, timeout_s: float, timed_out: bool, errors: str) -> str:
    """The status of a case whose process ended before the case did."""
    if timed_out:
        return f"timed out after {timeout_s:.0f} s"
    if code == -signal.SIGKILL:
        return "killed by the system (out of host memory?)"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return f"failed: the process ended with code {code}: {last[:300]}"


def _kill_group(process: Any) -> None:
    """End what is left of a case, its own children too, and free its device memory."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in the group
    process.kill()
    process.join()


# ---- inside the process ----


def _touch(device: str) -> None:
    torch.zeros(1, device=device)


def _work(case: Case, sender: Connection, log: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    run_case(case, sender.send)


def _end_with_parent() -> None:
    """Kill this case's group as soon as the process that ordered it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)

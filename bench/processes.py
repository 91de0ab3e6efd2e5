"""A fresh process for every case, so that no case can spoil the next one.

``ForkServer`` imports torch and transformers once and forks; on a GPU machine that saves some 15 s a case. The server
never touches CUDA, so that every fork begins without a context. Where a fork cannot use CUDA (something initialised
the driver at import), ``FreshProcesses`` starts a new interpreter each time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from misa_engine.bench.cases import Case, empty_row, run_case

#: How this file is started as a process of its own.
SELF = (sys.executable, "-m", "misa_engine.bench.processes")
#: What the server imports before it forks; the model files are those of the round's shapes.
PRELOAD = (
    "misa_engine.engine.optimizer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


def child_environment() -> dict[str, str]:
    """The environment of all cases."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() at some import must not initialise the driver
    environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return environ


def run_to_file(case: Case, target: Path) -> None:
    """Run a case in this process; ``target`` holds its row from the beginning and is whole at all times."""

    def report(row: dict[str, Any]) -> None:
        part = target.with_suffix(".part")
        part.write_text(json.dumps(row))
        part.replace(target)

    run_case(case, report)


def row_of(case: Case, target: Path, ended: str) -> dict[str, Any]:
    """The row that a process left; one that did not finish has ``ended`` as its status."""
    row = json.loads(target.read_text()) if target.exists() else empty_row(case, "started")
    if row["status"] == "started":
        row["status"] = ended
    return row


def how_it_ended(code: int, timeout_s: float, timed_out: bool, errors: str) -> str:
    """The status of a case whose process ended before the case did."""
    if timed_out:
        return f"timed out after {timeout_s:.0f} s"
    if code == -signal.SIGKILL:
        return "killed by the system (out of host memory?)"
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return f"failed: the process ended with code {code}: {last[:300]}"


class FreshProcesses:
    """A new interpreter for each case."""

    def run(self, case: Case, timeout_s: float) -> dict[str, Any]:
        """Run a case and return its row, whatever becomes of the process."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "row.json"
            command = [*SELF, "--case", json.dumps(asdict(case)), str(target)]
            process = subprocess.Popen(command, env=child_environment(), start_new_session=True,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
            timed_out = False
            try:
                _, errors = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in the group
                _, errors = process.communicate()
            return row_of(case, target, how_it_ended(process.returncode, timeout_s, timed_out, errors))

    def close(self) -> None:
        """Nothing is left running."""


class ForkServer:
    """Forks a process that has everything imported, for each case."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*SELF, "--serve"],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._read = b""

    def run(self, case: Case, timeout_s: float) -> dict[str, Any]:
        """Run a case and return its row, whatever becomes of the process."""
        with tempfile.TemporaryDirectory() as folder:
            target, log = Path(folder) / "row.json", Path(folder) / "log.txt"
            code, timed_out = self._ask({"case": asdict(case), "target": str(target), "log": str(log)}, timeout_s)
            errors = log.read_text(errors="replace") if log.exists() else ""
            return row_of(case, target, how_it_ended(code, timeout_s, timed_out, errors))

    def can_use(self, device: str) -> bool:
        """Whether a forked process can use the device."""
        return self._ask({"probe": device, "log": os.devnull}, timeout_s=120)[0] == 0

    def close(self) -> None:
        """End the server; no case is running then."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(timeout=30)

    def _ask(self, request: dict[str, Any], timeout_s: float) -> tuple[int, bool]:
        """Have one process forked for ``request``. Returns its exit code and whether it had to be ended."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._line(None)  # comes when the server has imported everything
        assert pid is not None
        code = self._line(timeout_s)
        if code is not None:
            return code, False
        os.killpg(pid, signal.SIGKILL)  # a group of its own: nothing else is in it
        code = self._line(None)
        assert code is not None
        return code, True

    def _line(self, timeout_s: float | None) -> int | None:
        """The next number that the server prints; None when none comes in time."""
        stdout = self._process.stdout
        assert stdout is not None
        while b"\n" not in self._read:  # not readline(): select() does not see what a buffered file has read ahead
            if not select.select([stdout], [], [], timeout_s)[0]:
                return None
            more = os.read(stdout.fileno(), 4096)
            if not more:
                raise RuntimeError("the server that starts the cases ended; --processes fresh does without it")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return int(line)


def make_processes(kind: str, device: str) -> ForkServer | FreshProcesses:
    """What runs the cases: "fork", "fresh", or "auto" (fork where it can use the device)."""
    if kind == "fresh" or not hasattr(os, "fork"):
        return FreshProcesses()
    server = ForkServer()
    if kind == "fork" or server.can_use(device):
        return server
    server.close()
    print(f"forked processes cannot use {device} here: a new interpreter for each case", flush=True)
    return FreshProcesses()


# ---- inside the processes ----


def serve() -> None:
    """Import, then fork for every line that comes in: print the process's id, wait for it, print its exit code."""
    for module in PRELOAD:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _forked(request)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # here as well as in the child: whoever is first, it has its group when we answer
        answers.write(f"{pid}\n")
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _forked(request: dict[str, Any]) -> None:
    """Do one request and leave without the server's clean-up."""
    code = 1
    try:
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if "probe" in request:
            import torch

            torch.zeros(1, device=request["probe"])
        else:
            run_to_file(Case(**request["case"]), Path(request["target"]))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        run_to_file(Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))

"""Cases in processes of their own: crashes, hangs, kills and commands are rows."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from misa_engine.bench import processes
from misa_engine.bench.cases import Case, CommandCase
from test_bench import TINY, last_row

# ---- processes ----


@dataclass(frozen=True, kw_only=True)
class OddCase(Case):
    """Does what no case should."""

    kind: ClassVar[str] = "odd"
    deed: str

    def run(self, row, report):
        report(row | {"seen": self.deed})
        if self.deed == "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            report(row | {"child": child.pid})
            time.sleep(60)
        if self.deed == "segfaults":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.deed == "ends itself":
            print("the last words", flush=True)
            os._exit(3)


@pytest.fixture(scope="module")
def runner():
    return processes.CaseProcesses("cpu")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_case_returns_its_row_from_a_process_of_its_own(runner):
    row = runner.run(TINY, timeout_s=120)
    assert row["status"] == "ok" and row["settings"]["length"] == 16 and row["tokens_per_s"] > 0


def test_what_a_command_preloads_is_imported_by_the_process_that_forks(runner, monkeypatch):
    given = []
    monkeypatch.setattr(runner._context, "set_forkserver_preload", given.extend)  # one object for all; it has forked
    processes.CaseProcesses("cpu", preload=("a.module",))
    assert given == [*processes.PRELOAD, "a.module"]


def test_a_case_that_hangs_is_ended_with_its_children_and_the_next_one_runs(runner):
    row = runner.run(OddCase(name="odd", deed="hangs"), timeout_s=2)
    assert row["status"] == "timed out after 2 s"
    assert row["child"] and not is_running(row["child"])
    assert runner.run(OddCase(name="odd", deed="nothing"), timeout_s=60)["status"] == "ok"


def test_a_case_whose_process_dies_says_how_and_keeps_what_it_had(runner):
    row = runner.run(OddCase(name="odd", deed="segfaults"), timeout_s=60)
    assert row["status"].startswith("failed: the process ended with code -11") and row["seen"] == "segfaults"
    row = runner.run(OddCase(name="odd", deed="ends itself"), timeout_s=60)
    assert row["status"] == "failed: the process ended with code 3: the last words"
    assert processes.how_it_ended(-9, 5, False, "") == "killed by the system (out of host memory?)"


def order(case):
    """What a run does, in a process that is to be killed."""
    inner = object.__new__(processes.CaseProcesses)
    inner._context = multiprocessing.get_context("fork")
    inner.run(case, 60)


def test_a_killed_run_leaves_no_case_behind(runner, tmp_path):
    log = tmp_path / "log"
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    case = CommandCase(name="c", words=("-c", program), log=str(log))
    killed = runner._context.Process(target=order, args=(case,))
    killed.start()
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.join()
    while is_running(int(log.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_is_a_case_with_its_log_and_its_failure(tmp_path):
    case = CommandCase(name="c", words=("-c", "print('a'); print('b'); raise SystemExit(4)"), log=str(tmp_path / "log"))
    row = last_row(case)
    assert row["status"] == "failed: RuntimeError: exit code 4: a | b"
    assert (tmp_path / "log").read_text() == "a\nb\n"
    assert last_row(replace(case, words=("-c", "print('fine')")))["status"] == "ok"


def test_a_device_that_forks_cannot_use_gets_new_interpreters(capfd):
    assert processes.CaseProcesses("nonesuch")._context.get_start_method() == "spawn"
    assert "forked processes cannot use nonesuch here" in capfd.readouterr().out

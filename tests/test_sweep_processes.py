"""``misa sweep``: several processes at one study, kills and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from misa_engine.sweep import study as studies
from misa_engine.sweep import trial as trials
from sweep_studies import LAUNCH, results, settings

pytest_plugins = ["sweep_studies"]
pytestmark = pytest.mark.usefixtures("quick")

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from sweep_studies import LAUNCH, RATE, settings
from misa_engine.sweep.command import sweep
sys.exit(sweep(settings(RATE, base={{"seed": int(sys.argv[3])}}), Path(sys.argv[1]), int(sys.argv[2]), launch=LAUNCH))
"""


def start(out: Path, trials: int, seed: int = 0) -> subprocess.Popen[str]:
    code = WORKER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(out), str(trials), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.05)


def test_two_processes_share_a_study_and_a_killed_one_costs_its_trial_only(tmp_path: Path) -> None:
    """Both wait in their trials, which so run at the same time; one is killed with SIGKILL, then all goes on."""
    out = tmp_path / "s"
    folders = [out / "trials" / f"{number:04}" for number in range(2)]
    processes = [start(out, 4, seed=5) for _ in folders]
    wait_for(lambda: all((folder / "run" / "misa_log.jsonl").exists() for folder in folders))
    holders = [json.loads((folder / ".misa_lock").read_text())["pid"] for folder in folders]
    assert sorted(holders) == sorted(process.pid for process in processes), "each runs one trial"
    victim = next(process for process in processes if process.pid == holders[0])
    other = next(process for process in processes if process is not victim)
    victim.kill()
    victim.communicate()
    for number in range(6):  # the killed one's stand-in too, which misa's own trials would not outlive
        (out / "trials" / f"{number:04}").mkdir(exist_ok=True)
        (out / "trials" / f"{number:04}" / "go").touch()
    said = other.communicate(timeout=120)[0]
    assert other.returncode == 0, said
    rows = results(out)["trials"]
    assert len(rows) == 5 and [row["state"] for row in rows].count("complete") == 4, "the killed one is made up for"
    assert rows[0]["state"] == "failed" and rows[0]["reason"] == studies.KILLED and f"trial 0: {studies.KILLED}" in said
    assert len({row["values"]["learning_rate"] for row in rows}) == 5, "no two trials are the same"


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    child = "from misa_engine.sweep.worker import end_with; import os, time; end_with(os.getppid()); time.sleep(60)"
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    process.kill()
    process.communicate()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    wait_for(gone, 30)


def test_a_signal_marks_the_trial_and_writes_the_results(tmp_path: Path) -> None:
    out = tmp_path / "s"
    process = start(out, 3, seed=5)
    log = out / "trials" / "0000" / "run" / "misa_log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode and "Stopped" in said
    (row,) = results(out)["trials"]
    assert row["state"] == "failed" and row["reason"] == trials.STOPPED
    assert (out / "index.html").is_file()


def test_no_trial_outlives_an_error_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised while a run is watched, the run is ended first."""
    children = []
    started = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        children.append(started(*args, **kwargs))
        return children[-1]

    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    (tmp_path / "0000").mkdir()
    values = {**settings().base, "seed": 5}

    def interrupted(number: int, loss: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trials.run_trial(tmp_path / "0000", values, interrupted, LAUNCH)
    assert children[0].returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(children[0].pid, 0)

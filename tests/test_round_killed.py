"""Soak: the GPU round's script on a CPU, killed at every stage, keeps what it has measured and ends as planned."""

import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from misa_engine.bench.presets import PRESETS, Bench
from misa_engine.bench.suites import cases_of

ROOT = Path(__file__).resolve().parents[1]
#: Seconds that one case may take before the test gives up: 10 on an idle core, over 400 on one that twenty share. The
#: whole test took 12 minutes where three processes shared two cores.
PATIENCE_S = 1800
#: Statuses of a row that a later call runs again.
UNFINISHED = ("not run", "interrupted", "started")


def rows_of(out: Path) -> list[dict]:
    path = out / "results.json"
    return json.loads(path.read_text())["cases"] if path.exists() else []


def finished(out: Path) -> list[dict]:
    return [row for row in rows_of(out) if not row["status"].startswith(UNFINISHED)]


def still_alive(mark: str) -> list[str]:
    """Command lines of processes that were started with ``mark`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(") ")[2][0]
            if state != "Z" and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, IndexError):  # it ended while we looked
            continue
    return found


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for left-over processes in /proc")
def test_the_round_killed_at_every_stage_keeps_its_results_and_is_finished_by_later_calls(tmp_path):
    out, archive, mark = tmp_path / "gpu", tmp_path / "gpu.tar.gz", f"MISA_ROUND_TEST={os.getpid()}-{time.time()}"
    name, _, value = mark.partition("=")
    # PYTHONPATH of the script is its own tree, whatever is installed
    environment = {**os.environ, name: value, "LIMIT_S": "36000", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    planned = [case.name for case in cases_of(Bench(**{**PRESETS["quick"], "suite": "round"}), out)]
    kept: list[dict] = []
    for call in range(4 * len(planned)):
        script = subprocess.Popen(
            ["bash", str(ROOT / "bench" / "gpu_round.sh"), str(out), str(archive)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        # every other call is killed in the midst of its first new case, the others after it; by turns softly and hard
        in_the_midst, how = call % 2 == 0, (signal.SIGTERM, signal.SIGKILL)[call // 2 % 2]
        began = time.monotonic()
        while script.poll() is None and len(finished(out)) == len(kept) and time.monotonic() - began < PATIENCE_S:
            if in_the_midst and time.monotonic() - began > 9:  # starting takes 5 s of these
                break
            time.sleep(0.05)
        gave_up = time.monotonic() - began >= PATIENCE_S
        if script.poll() is None:
            script.send_signal(how)
        said, _ = script.communicate(timeout=60)
        assert not gave_up, f"no case ended, {len(kept)} of {len(planned)} are there: {said[-3000:]}"
        ended_by_us = script.returncode in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 130, 143)
        assert ended_by_us or script.returncode == 0 or len(finished(out)) == len(planned), said[-3000:]
        deadline = time.monotonic() + 20
        while (alive := still_alive(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive, f"left over after {how.name}: {alive}"
        now = finished(out)
        assert now[: len(kept)] == kept, "a result that was there has changed"
        assert not list(out.glob("*.tmp")) or how is signal.SIGKILL
        if now:
            with tarfile.open(archive) as packed:
                inside = json.load(packed.extractfile(f"{out.name}/results.json"))
            # SIGKILL between the two writes leaves the archive one case behind, until the next call packs it again
            assert len(inside["cases"]) >= len(kept) - 1
        kept = now
        if len(kept) == len(planned):
            break
    assert [row["case"] for row in kept] == [row["case"] for row in inside["cases"]] == planned
    assert not [row for row in kept if not row["status"].startswith(("ok", "needs CUDA"))]
    assert (out / "results.md").exists()

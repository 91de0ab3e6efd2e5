import os
import signal
import subprocess
import sys

import pytest

from misa_engine.errors import UserError
from misa_engine.trainer.run_lock import LOCK_NAME, lock_run

pytest.importorskip("fcntl")

HOLD = """
import sys, time
from pathlib import Path
from misa_engine.trainer.run_lock import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead_however_it_died(tmp_path):
    run = tmp_path / "new" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid}, since 20"), lock_run(run):
        pytest.fail("two runs in one directory")
    assert [path.name for path in run.iterdir()] == [LOCK_NAME]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / LOCK_NAME).is_file()  # stale
    with lock_run(run):
        assert str(os.getpid()) in (run / LOCK_NAME).read_text()
    assert not (run / LOCK_NAME).exists() and run.is_dir()  # made by the other process, so not ours to remove


def test_the_same_process_may_ask_again_and_nothing_stays_behind(tmp_path):
    run = tmp_path / "a" / "b"
    with lock_run(run), lock_run(run):
        assert (run / LOCK_NAME).exists()
    assert not any(tmp_path.iterdir())
    with lock_run(run):
        (run / "kept").touch()
    assert [path.name for path in run.iterdir()] == ["kept"]

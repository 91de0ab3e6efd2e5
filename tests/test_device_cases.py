"""The cases that test_optimizer_gpu.py runs on a GPU, on a CPU: so that the first minute with one is not theirs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer_cases import CASES

#: Those whose kernels differ; a case takes 5 to 20 s in the interpreter.
INTERPRETED = ("float32_slots", "both_schedules", "a_skipped_step")
#: A program expands one row, so that a pass of the smallest model takes a second there.
INTERPRETED_SLOWLY = ("residents_int8", "residents_int8_row", "residents_fp8")


@pytest.mark.parametrize("case", CASES)
def test_case_holds_for_the_reference(case):
    CASES[case]("cpu", "reference")


@pytest.mark.parametrize("cases", [INTERPRETED, pytest.param(INTERPRETED_SLOWLY, marks=pytest.mark.soak)])
def test_cases_hold_in_the_interpreter(cases):
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(tests / "optimizer_cases.py"), "triton", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == dict.fromkeys(cases, "")

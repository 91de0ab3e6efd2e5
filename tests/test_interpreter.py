"""The whole optimizer on the Triton backend, in Triton's interpreter, against the same run on the reference backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton")

SCRIPT = """
import json, sys
import torch
from training import batches, tiny, train, weights
from misa_engine import MISA

def run(backend):
    model = tiny(dtype=getattr(torch, sys.argv[1]))
    options = {"delta": 0.3, "inner_steps": 2, "cold_start": "none", "always_train": ("model.norm",), "lr": 1e-2}
    options |= json.loads(sys.argv[2])
    optimizer = MISA(model, weight_decay=0.1, backend=backend, **options)
    assert optimizer.backend == backend
    data = batches()
    train(model, optimizer, data, 3)
    model.get_parameter(optimizer.active[0]).grad = torch.full_like(model.get_parameter(optimizer.active[0]), torch.nan)
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, data, 3)
    return weights(model), optimizer.scores, optimizer.active, optimizer.skipped_steps

(a, scores_a, active_a, skipped_a), (b, scores_b, active_b, skipped_b) = run("triton"), run("reference")
assert active_a == active_b and skipped_a == skipped_b == 1
assert all(torch.equal(a[name], b[name]) for name in a)
# sums of squares are added in another order: <= 1e-6 relative
assert all(abs(scores_a[name] - scores_b[name]) <= 1e-6 * scores_b[name] for name in scores_b)
print("equal")
"""


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {"preset": "engine"}),
        ("float32", {"preset": "paper"}),
        ("bfloat16", {"preset": "official"}),
        ("bfloat16", {"state_dtype": "int8", "grad_dtype": "float32"}),
        ("bfloat16", {"preset": "paper", "state_dtype": "int8", "update_in": "backward"}),
        ("bfloat16", {"rest": "sign", "rest_outside": True, "rest_every": 2}),
        ("bfloat16", {"rule": "cyclic", "revisit": "offload", "leave_rounding": "keep", "inner_steps": 1}),
    ],
    ids=str,
)
def test_a_run_in_the_interpreter_equals_the_reference_bit_for_bit(dtype, options):
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype, json.dumps(options)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]

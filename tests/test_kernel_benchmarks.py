import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from misa_engine.bench import traffic, updates
from misa_engine.bench.conftest import pytest_runtest_call, sizes_asked_for
from misa_engine.bench.traffic import BF16, F32, I16, MOMENTS
from misa_engine.cli.main import main
from misa_engine.engine.arena import Arena

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# ---- bytes ----


def test_bytes_per_parameter_are_those_of_the_design_table():
    assert traffic.fused(BF16, MOMENTS["float32"], [I16]) == 26
    assert traffic.fused(BF16, MOMENTS["int8"], [I16]) == 14.25
    assert traffic.NORM[BF16] == 2
    assert updates.SCHEMES["torch-fused-master-norm"].before_bytes == 2
    assert traffic.NORM[BF16] + traffic.TORCH_WITH_MASTER == 42
    assert updates.SCHEMES["torch-fused-bf16"].update_bytes == 14
    assert updates.SCHEMES["optimi-kahan-bf16"].update_bytes == 18
    assert updates.SCHEMES["flashoptim-24"].update_bytes == 12.25
    assert updates.SCHEMES["flashoptim-32"].update_bytes == updates.SCHEMES["misa-bf16-int8"].update_bytes


@pytest.mark.parametrize("state", ["float32", "int8"])
def test_an_arena_holds_per_parameter_what_the_traffic_assumes(state):
    numel = 1 << 20
    arena = Arena(numel, 1, dtype=BF16, device=torch.device("meta"), split=True, state_dtype=state)
    sizes = arena.bytes()
    del sizes["tables"]
    assert sum(sizes.values()) / numel == traffic.held([BF16, I16, *MOMENTS[state]])
    assert traffic.fused(BF16, MOMENTS[state], [I16]) == 2 + 2 * (2 + traffic.held([I16, *MOMENTS[state]]))


def test_accumulated_gradients_move_less_when_the_gemm_writes_them():
    # first micro-batch: the slot alone; then it is read and written, while a temporary is written and read besides
    assert traffic.accumulate("gemm", BF16, BF16, 4) == 2 + 3 * 4
    assert traffic.accumulate("plain", BF16, BF16, 4) == 2 + 3 * 8
    assert traffic.accumulate("hook", BF16, BF16, 4) == 6 + 3 * 8
    assert traffic.accumulate("gemm", BF16, F32, 1) == 4


# ---- what is compared does the same ----


@pytest.mark.parametrize("scheme", updates.SCHEMES)
def test_every_scheme_makes_the_step_of_adamw(scheme, monkeypatch):
    chosen = updates.SCHEMES[scheme]
    if reason := chosen.unavailable(CPU):
        pytest.skip(reason)
    monkeypatch.setattr(updates, "MAX_NORM", 1e9)  # one scheme measures the norm and does not clip
    monkeypatch.setitem(updates.HYPERPARAMETERS, "lr", 1e-2)  # far above the rounding of bfloat16
    sizes = [3 * 1024, 1024]
    bf16 = "bf16" in scheme or "master" in scheme or "flash" in scheme
    dtype = BF16 if bf16 else F32
    before = [weight.double() for weight in updates.draws(sizes, dtype, CPU, 0.02)]
    gradients = [gradient.double() for gradient in updates.draws(sizes, dtype, CPU, 1e-3)]
    update = chosen.build(sizes, CPU)
    if not scheme.startswith("misa"):  # ours has made its first step
        update.before()
        update.step()
    for weight, start, g in zip(update.weights, before, gradients, strict=True):
        expected = start * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + 1e-8)  # the first step of Adam
        # half an ulp of a bfloat16 weight of 0.1, or of the moments kept in it; float32 is far below
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=5e-4 if bf16 else 1e-7)


def test_a_missing_package_and_a_missing_gpu_are_told_apart():
    scheme = updates.SCHEMES["flashoptim-24"]
    absent = updates.Scheme(scheme.build, 1, 1, "no-such-package", needs_cuda=True)
    present = updates.Scheme(scheme.build, 1, 1, "torch", needs_cuda=True)
    assert absent.unavailable(CPU) == "missing: pip install no-such-package"
    assert present.unavailable(CPU) == "needs a CUDA device"
    assert updates.SCHEMES["misa-bf16-int8"].unavailable(CPU) is None


# ---- the command ----


def bench(*options):
    # one thread and no interpreter: the environment of the test that happened to come before does not count
    # pytest-benchmark switches itself off inside a worker of pytest-xdist
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "bench/", "--sizes", "20k", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    return bench("--benchmark-only", "--rounds", "2", f"--benchmark-json={path}"), path


def test_every_row_has_bytes_bandwidth_and_share_of_a_copy(run):
    results = json.loads(run[1].read_text())
    for row in results["benchmarks"]:
        info = row["extra_info"]
        assert info["bytes"] > 0 and info["percent_of_copy"] > 0, row["name"]
        assert info["gb_per_s"] == pytest.approx(info["bytes"] / info["seconds"] / 1e9, rel=1e-3)
        assert row["stats"]["rounds"] == 2 and "data" not in row["stats"]
    schemes = {row["extra_info"]["scheme"] for row in results["benchmarks"]}
    assert schemes >= {name for name, scheme in updates.SCHEMES.items() if not scheme.unavailable(CPU)}
    assert schemes >= {"clones", "misa, both", "gemm (float32)", "hook (float32)", "compress", "round_stochastic"}
    assert results["environment"]["command"].startswith("pytest bench/") and "node" not in results["machine_info"]
    missing = {row["name"] for row in results["not_run"]}
    absent = [name for name, scheme in updates.SCHEMES.items() if scheme.unavailable(CPU)]
    assert all(f"test_update[20k-whole-{name}]" in missing for name in absent)


def test_the_tables_name_every_row_and_what_is_missing(run):
    text, path = run
    results = json.loads(path.read_text())
    assert main(["bench", "--render", str(path)]) == 0
    page = path.with_suffix(".md").read_text()
    for row in results["benchmarks"]:
        assert f"### {row['group']}" in page and f"'{row['group']}'" in text  # pytest-benchmark's own table
        assert f"| `{row['extra_info']['scheme']}` |" in page
    for skipped in results["not_run"]:
        assert skipped["reason"] in page


def test_a_later_run_is_compared_with_a_committed_one(run):
    text = bench("--benchmark-only", "--rounds", "1", "-k", "test_norm", f"--benchmark-compare={run[1]}")
    assert re.search(r"test_norm\[20k-misa-bf16\] \(NOW\)", text), text
    assert re.search(r"test_norm\[20k-misa-bf16\] \(.*kernels\)", text), text


def test_every_benchmark_runs_once_when_timing_is_disabled():
    assert "failed" not in bench("--benchmark-disable", "-k", "test_norm or clones or gemm")


def test_results_are_written_after_each_benchmark(tmp_path):
    path = tmp_path / "kernels.json"
    script = (
        "import os, pytest\n"
        "class Ends:\n"
        "    def pytest_runtest_logfinish(self, nodeid):\n"
        "        os._exit(9)  # as SIGKILL would end it\n"
        f"pytest.main(['bench/test_kernels.py', '--sizes', '20k', '--rounds', '1', '-q', '-k', 'test_norm',\n"
        f"             '--benchmark-json={path}'], plugins=[Ends()])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 9
    assert len(json.loads(path.read_text())["benchmarks"]) == 1


def test_too_little_memory_skips_one_benchmark():
    hook = pytest_runtest_call(None)
    next(hook)
    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        hook.throw(torch.OutOfMemoryError("CUDA out of memory."))


def test_ordinary_pytest_leaves_bench_alone(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_sizes_are_read_and_nonsense_is_refused():
    class Config:
        def __init__(self, text):
            self.getoption = lambda name: text

    assert sizes_asked_for(Config("20k,1.5M,300")) == {"20k": 20_000, "1.5M": 1_500_000, "300": 300}
    for text in ("4X", "", "4M,,"):
        with pytest.raises(pytest.UsageError, match="--sizes"):
            sizes_asked_for(Config(text))

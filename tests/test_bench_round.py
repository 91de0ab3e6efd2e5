"""``misa bench round``: its cases, the runner around them, the checks, and pages and pictures of a GPU's numbers."""

import json
import os
import signal
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from misa_engine.bench import checks, pictures, runner, tables
from misa_engine.bench.cases import run_case
from misa_engine.bench.presets import CARD_GIB, PRESETS, Bench
from misa_engine.bench.suites import MEMORY_PEERS, cases_of
from misa_engine.bench.training import LongestCase, StepCase, SwitchCase
from misa_engine.errors import UserError
from misa_engine.report import figures

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[1]
TINY = StepCase(name="tiny", shape="tiny", device="cpu", length=16, delta=0.1, steps=2, warm_up=1, inner_steps=2)
CASES = [TINY, replace(TINY, name="tiny adamw", method="adamw")]
ROUND = Bench(**{**PRESETS["quick"], "suite": "round"})


class OneProcess:
    """Runs cases here; what the runner does around them is under test."""

    def __init__(self, device):
        self.ran = []

    def run(self, case, timeout_s):
        rows = []
        run_case(case, lambda row: rows.append(json.loads(json.dumps(row))))
        return rows[-1]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(runner, "CaseProcesses", OneProcess)
    monkeypatch.setattr(runner, "ask_plan", lambda case: {"status": "no plan: none here"})


def gpu_round(folder):
    return cases_of(Bench(**{**PRESETS["gpu"], "suite": "round"}), folder)


# ---- what runs ----


def test_the_gpu_round_runs_what_is_promised_in_order(tmp_path):
    planned = gpu_round(tmp_path)
    names = [case.name for case in planned]
    assert len(names) == len(set(names)) and names[:2] == ["GPU tests", "kernels"]
    first = [f"memory llama-3-8b {what}" for what in ("2x2048 misa", "2x2048 misa-int8", "longest", "1x8192 misa")]
    assert names[2:7] == [*first, "memory llama-3-8b switches"]
    assert names[7:9] == ["residents llama-3-8b int8 in 12 GiB", "residents qwen2.5-14b int8 in 24 GiB"]
    for kind in ("2x2048 misa", "1x8192 misa", "switches"):
        assert f"memory qwen2.5-7b {kind}" in names
    training = [case for case in planned if case.kind != "command" and not case.name.startswith("residents")]
    limit = int(CARD_GIB * GIB)
    assert all(case.limit_bytes == limit and case.delta == 0.03 and case.checkpointing for case in training)
    main = planned[2]
    assert (main.batch, main.length, main.accumulation, main.max_grad_norm) == (2, 2048, 2, 1.0)
    assert {case.method for case in training} >= {"misa", "misa-int8", *MEMORY_PEERS}
    assert {case.shape for case in training if case.name.startswith("speed")} == {"llama-3-8b", "tinyllama"}
    searching = next(case for case in training if case.kind == "longest")
    assert (searching.batch, searching.length, searching.longest, searching.inner_steps) == (1, 8192, 32768, 10**6)
    assert next(case for case in training if case.kind == "switches").switches == 200
    profiled = [case for case in training if case.kind == "steps" and case.folder]
    assert [(case.name, case.timeline) for case in profiled] == [("profile tinyllama misa", True)]


def test_the_round_on_a_cpu_takes_the_same_way(tmp_path):
    kinds = [[case.kind for case in cases_of(bench, tmp_path)[:8]] for bench in (ROUND, replace(ROUND, device="cuda"))]
    assert kinds[0] == kinds[1]


def test_the_gpus_tests_need_neither_trl_nor_datasets(tmp_path):
    words = cases_of(ROUND, tmp_path)[0].words
    files = [ROOT / word for word in words if word.endswith(".py")]
    assert files[0].name == "test_optimizer_gpu.py" and words[-3:] == ("-m", "gpu", "-q")
    for file in files:
        assert not {"import trl", "from trl", "import datasets", "from datasets"} & set(file.read_text().splitlines())


# ---- the runner ----


def test_a_run_writes_environment_rows_checks_and_an_archive(here, tmp_path):
    (tmp_path / "out" / "snapshots").mkdir(parents=True)
    (tmp_path / "out" / "snapshots" / "raw.pickle").write_bytes(b"large")
    archive = tmp_path / "out.tar.gz"
    runner.run_bench(ROUND, CASES, tmp_path / "out", archive=archive, say=str)
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    for key in ("hardware", "driver", "python", "versions", "commit", "command", "date", "alloc_conf"):
        assert key in document["environment"]
    assert [row["case"] for row in document["results"]] == ["tiny", "tiny adamw"]
    for row in document["results"]:
        for key in ("method", "step_time_s", "tokens_per_s", "peak_bytes", "trainable_parameters"):
            assert key in row
        assert row["status"] == "ok"
    assert document["plans"] == {"tiny": {"status": "no plan: none here"}}
    assert {check["verdict"] for check in document["checks"]} == {"cpu: no memory claim"}
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["out/results.json"]


def test_cases_after_the_deadline_are_rows_too_and_resume_runs_them(here, tmp_path):
    document = runner.run_bench(ROUND, CASES, tmp_path, deadline_s=1, say=str)
    assert [row["status"].partition(":")[0] for row in document["cases"]] == ["not run", "not run"]
    lines = []
    document = runner.run_bench(ROUND, CASES[:1], tmp_path, resume=True, say=lines.append)
    assert [row["status"] for row in document["cases"]] == ["ok"] and len(lines) == 1
    document = runner.run_bench(ROUND, CASES, tmp_path, resume=True, say=lines.append)
    assert [row["status"] for row in document["cases"]] == ["ok", "ok"] and len(lines) == 2


def test_resume_refuses_results_of_other_settings(here, tmp_path):
    runner.run_bench(ROUND, CASES[:1], tmp_path, say=str)
    with pytest.raises(UserError, match=r"other settings \(delta\)"):
        runner.run_bench(replace(ROUND, delta=0.5), CASES, tmp_path, resume=True, say=str)


def test_sigterm_keeps_what_was_measured_and_marks_the_running_case(monkeypatch, tmp_path):
    class Terminated(OneProcess):
        def run(self, case, timeout_s):
            if case.method == "adamw":
                os.kill(os.getpid(), signal.SIGTERM)
            return super().run(case, timeout_s)

    monkeypatch.setattr(runner, "CaseProcesses", Terminated)
    monkeypatch.setattr(runner, "ask_plan", lambda case: {"status": "no plan"})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        runner.run_bench(ROUND, CASES, tmp_path / "out", archive=tmp_path / "a.tar.gz", say=str)
    assert signal.getsignal(signal.SIGTERM) is before
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["status"] for row in document["cases"]] == ["ok", "interrupted"]
    assert "1 cases were not run to their end" in tables.page(document) and (tmp_path / "a.tar.gz").exists()


def test_the_round_script_is_sound_and_hands_on_deadline_and_archive():
    script = ROOT / "bench" / "gpu_round.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert "--no-index --no-deps" in text and "--target" not in text.replace("with --target pyarrow", "")
    assert "--deadline_s" in text and "--archive" in text and "exec python3 -m misa_engine bench" in text


# ---- the checks ----


KINDS = {"steps": StepCase, "longest": LongestCase, "switches": SwitchCase}


def gpu_row(kind, **results):
    settings = {"name": f"big {kind}", "shape": "big", "device": "cuda:0"}
    return {**KINDS[kind](**settings).row("ok"), **results}


def train_row(reserved, allocated=17 * GIB):
    times = {"median": 1.0, "p20": 0.9, "p80": 1.1}
    return gpu_row(
        "steps", step_time_s=times, tokens_per_s=8192.0, peak_bytes=reserved, peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved, process_bytes=reserved + GIB // 2, trainable_parameters=240_000_000,
    )  # fmt: skip


PLAN = {
    "status": "ok",
    "bytes": {"weights": 15 * GIB, "activations": 2 * GIB, "cuda_context": GIB // 2, "slack": GIB},
    "max_tokens_per_micro_batch": 11_400,
}


def verdicts(row, plan=PLAN):
    return {check["check"]: check["verdict"] for check in checks.judge([row], {row["case"]: plan})}


def test_the_checks_pass_and_fail_at_their_bounds():
    assert verdicts(train_row(int(18.4 * GIB)))["reserved"] == "pass"
    assert verdicts(train_row(int(18.6 * GIB)))["reserved"] == "fail"
    # the plan gives the allocator 17 GiB
    assert verdicts(train_row(18 * GIB, int(17.4 * GIB)))["plan / allocated - 1"] == "pass"
    assert verdicts(train_row(18 * GIB, int(17.6 * GIB)))["plan / allocated - 1"] == "fail"
    assert verdicts(train_row(18 * GIB))["plan / reserved - 1"] == "pass"
    assert verdicts(train_row(19 * GIB))["plan / reserved - 1"] == "fail"
    assert verdicts(gpu_row("longest", longest_with_reserve=11_000))["longest / plan - 1"] == "pass"
    assert verdicts(gpu_row("longest", longest_with_reserve=10_752))["longest / plan - 1"] == "fail"
    growth = gpu_row("switches", growth_allocated_bytes=0, growth_reserved_bytes=1)
    assert verdicts(growth)["growth of allocated over 200 switches"] == "pass"
    assert verdicts(growth)["growth of reserved over 200 switches"] == "fail"


def test_what_was_not_measured_is_no_pass():
    failed = {**gpu_row("steps"), "status": "timed out after 9 s"}
    assert verdicts(failed) == {"runs": "not measured (timed out after 9 s)"}
    assert verdicts({**failed, "status": "out of memory"}) == {"runs": "fail"}
    without_plan = verdicts(gpu_row("longest", longest=11_000), {"status": "no plan: x"})
    assert without_plan["longest / plan - 1"] == "not measured (ok)"


def test_the_reserve_is_what_an_allocator_does_not_see():
    assert checks.reserve_bytes(PLAN) == GIB * 3 // 2
    assert checks.allocator_bytes(PLAN) == 17 * GIB


def test_the_plan_of_a_case_is_that_of_its_method_and_limit(tmp_path):
    plain, int8 = (
        checks.ask_plan(next(case for case in gpu_round(tmp_path) if case.name == name))
        for name in ("memory llama-3-8b 2x2048 misa", "memory llama-3-8b 2x2048 misa-int8")
    )
    assert plain["status"] == "ok" and (plain["batch"], plain["length"], plain["delta"]) == (2, 2048, 0.03)
    assert plain["card"]["total_bytes"] == int(CARD_GIB * GIB)
    # 8 bytes of moments an element against 2 codes and two float32 scales each 64
    moments = plain["bytes"]["first_moment"] + plain["bytes"]["second_moment"]
    saved = sum(plain["bytes"].values()) - sum(int8["bytes"].values())
    assert saved / moments == pytest.approx(1 - 2.125 / 8, abs=0.001)
    assert int8["max_tokens_per_micro_batch"] > plain["max_tokens_per_micro_batch"] > 8192
    assert checks.reserve_bytes(plain) == plain["bytes"]["cuda_context"] + plain["bytes"]["slack"] > 0


def test_a_plan_that_cannot_be_had_is_said():
    plan = checks.ask_plan(StepCase(name="tiny", shape="tiny", device="cpu", delta=0.001))
    assert plan["status"].startswith("no plan: ") and "delta" in plan["status"]


# ---- pictures and pages of a GPU's numbers ----


def gpu_document():
    points = [[i / 100, 17 * GIB + (i % 40) * GIB // 40] for i in range(200)]
    phases = [
        {"phase": phase, "begin_s": begin, "end_s": begin + 0.5}
        for begin, phase in ((0, "forward"), (0.5, "backward"), (1, "step"), (1.5, "switch"))
    ]
    base = {"weights": 15 * GIB, "gradients": GIB // 2, "first_moment": GIB, "second_moment": GIB // 2, "tables": 1000}
    row = train_row(18 * GIB) | {"timeline": {"points": points, "phases": phases, "base_bytes": base}}
    row |= {"summary": ""}
    peer = {**train_row(18 * GIB), "case": "big peer", "method": "adamw8bit", "status": "out of memory"}
    rows = [row, {**peer, "step_time_s": None, "tokens_per_s": None}]
    environment = {
        "hardware": "Some GPU", "driver": "1.2", "date": "2026-01-01 00:00", "commit": "abc", "command": "python x",
        "versions": {"torch": "2.11", "triton": None},
    }  # fmt: skip
    return {
        "environment": environment,
        "settings": {"device": "cuda:0", "vram_gib": 24.0, "suite": "round", "delta": 0.03},
        "plans": {"big steps": PLAN, "other": {"status": "no plan: none here"}},
        "results": rows,
        "cases": rows,
        "checks": checks.judge([row], {"big steps": PLAN}),
    }


def test_a_page_shows_the_numbers_of_the_json():
    page = tables.page(gpu_document())
    cells = ("240M", "1.000 (0.900-1.100)", "8,192", "17.00", "18.00", "18.50", "ok")
    assert f"| misa | {' | '.join(cells)} |" in page
    assert "| big steps | reserved | <= 18.5 GiB | 18.00 GiB | pass |" in page
    assert "| big steps | plan / reserved - 1 | within 8% | -5.6% | pass |" in page
    assert "out of memory |" in page and "torch 2.11" in page and "triton" not in page
    assert "- plan for other: no plan: none here" in page and "Held-out loss" not in page
    assert "pinned to torch's flash kernel" in page


def test_the_bench_s_pictures_have_the_house_s_title_and_colours():
    figure = pictures._bars(gpu_document()["results"])
    (title,) = [text for text in figure.texts if text.get_text() == "Time and memory of a step"]
    assert title.get_fontsize() == 15 and title.get_fontweight() == "bold" and title.get_ha() == "left"
    assert not figure.get_suptitle() and pictures.BLUE == figures.BLUE and pictures.RED == figures.ORANGE


def test_pictures_are_drawn_of_a_gpu_round(tmp_path):
    drawn = pictures.pictures(gpu_document(), tmp_path)
    assert [path.name for path in drawn] == ["time_and_memory.png", "timeline_big_misa.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_a_method_that_failed_is_in_the_picture_with_its_reason():
    figure = pictures._bars(gpu_document()["results"])
    texts = [text.get_text().strip() for axes in figure.axes for text in axes.texts]
    assert "out of memory" in texts and "8,192 tokens/s" in texts
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["misa", "adamw8bit"]

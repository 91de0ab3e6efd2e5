"""Residents in the bench: a learner's option, and the suite of 8B in 12 GiB and 14B in 24 on tiny shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from in_process import run_here
from misa_engine.bench import matrix, presets
from misa_engine.bench.cases import run_case
from misa_engine.bench.checks import ask_plan, is_judged
from misa_engine.bench.learners import learner_of
from misa_engine.bench.presets import GIB, PRESETS, Bench
from misa_engine.bench.suites import cases_of
from misa_engine.bench.workload import build_model
from misa_engine.cli.main import main
from misa_engine.engine.residents import residents_of
from misa_engine.errors import UserError
from misa_engine.planner.activations import CONTEXT_BYTES

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- learning ----


def test_residents_are_an_option_of_a_learner():
    learner = learner_of("misa-none:residents=int8:delta=0.1")
    assert learner.settings == {"residents": "int8", "delta": 0.1} and learner.misa["rest"] == "none"
    assert "residents" not in learner.misa
    for text, said in (
        ("misa:residents=int4", "unknown residents 'int4'"),
        ("misa:residents=int8:rest=sign", "moves every matrix in place"),
        ("adamw:residents=int8", "options are MISA's"),
    ):
        with pytest.raises(UserError, match=said):
            learner_of(text)


def test_a_learner_with_residents_learns_and_is_compared_at_the_same_bytes(tmp_path, monkeypatch):
    run_here(monkeypatch)
    monkeypatch.setitem(presets.RECIPES, "tiny", {**presets.RECIPES["tiny"], "steps": 3, "batch": 2})
    words = ["--preset", "quick", "--base", "tiny", "--steps", "4", "--batch", "2", "--length", "64", "--rows", "4"]
    words += ["--points", "2", "--delta", "0.2", "--lrs", "1e-3", "--output", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "work"), "--methods", "misa-none,misa-none:residents=int8"]
    assert main(["bench", "learning", *words]) == 0
    rows = {row["settings"]["learner"]: row for row in matrix.read_rows(tmp_path / "out")}
    plain, rested = rows["misa-none"]["learning"], rows["misa-none:residents=int8"]["learning"]
    assert rested["heldout_loss"] == pytest.approx(plain["heldout_loss"], abs=0.05)
    assert rested["heldout_loss"] != plain["heldout_loss"]
    held = rested["held_bytes"]
    assert {key: size for key, size in held.items() if key != "active_weights"} == plain["held_bytes"]


# ---- 8B in 12 GiB, 14B in 24 ----


def test_the_suite_runs_8b_in_12_gib_and_14b_in_24_in_under_nine_minutes(tmp_path):
    bench = Bench(**{**PRESETS["gpu"], "suite": "residents"})
    cases = cases_of(bench, tmp_path)
    assert [(case.shape, case.limit_bytes) for case in cases] == [
        ("llama-3-8b", 12 * GIB - CONTEXT_BYTES),
        ("qwen2.5-14b", 24 * GIB - CONTEXT_BYTES),
    ]
    assert sum(case.timeout_s for case in cases) < 9 * 60 and all(is_judged(case) for case in cases)
    for case in cases:
        assert (case.length, case.batch, case.residents, case.delta) == (2048, 1, "int8", 0.03)
        planned = ask_plan(replace(case, device="cpu"))
        assert planned["status"] == "ok" and planned["residents"]["format"] == "int8"
        # the limit is of the allocator, which sees no context
        assert planned["total_bytes"] - planned["bytes"]["cuda_context"] <= case.limit_bytes


def test_the_suite_takes_the_same_way_on_a_cpu(tmp_path):
    bench = Bench(**{**PRESETS["quick"], "suite": "residents"})
    case, rows = cases_of(bench, tmp_path)[0], []
    run_case(replace(case, length=16, steps=4, warm_up=1, inner_steps=2), lambda row: rows.append(dict(row)))
    assert rows[-1]["status"] == "ok", rows[-1]["status"]
    assert rows[-1]["optimizer_bytes"]["active_weights"] > 0 and rows[-1]["timed_switches"] > 0


@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen"])
def test_a_random_model_with_residents_is_whole(shape):
    model = build_model(shape, torch.device("cpu"), checkpointing=False, residents="int8")
    residents = residents_of(model)
    assert residents is not None and residents.resting == residents.names
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    weight = model.get_parameter(residents.names[0])
    assert 0.015 < float(weight.std()) < 0.025
    assert all(float(p.abs().max()) == 0 for name, p in model.named_parameters() if name.endswith("bias"))
    ids = torch.randint(300, (1, 8))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)

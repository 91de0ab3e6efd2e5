"""A slice of every harness of ``tests/soak``, and proof that its judges notice what they are there for."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soak import damage, full_disk, fuzz, kill
from soak.cases import Case, draw
from soak.entrypoints import loss_of
from soak.oracle import Finding
from soak.stepping import Run

FUZZ_CASES = 40
KILLED_RUNS = 2
DAMAGED_FILES = 12
FAILING_SAVES = 5
SMALL_DISKS = 2

needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


def report(text: str) -> None:
    print(text)  # shown by pytest when the test fails


def counted(number: int):
    """``keep_going`` for so many cases."""
    left = itertools.count(number, -1)
    return lambda: next(left) > 0


# ---- fuzzed training ----


def test_fuzzed_cases_train_as_plain_torch_does():
    counts, findings = fuzz.fuzz(range(FUZZ_CASES), lambda: True, report)
    assert not findings
    assert counts["cases"] == FUZZ_CASES and counts["gradients"] > 1000 and counts["bitwise equal continuations"] > 2


def test_a_case_is_the_same_whenever_it_is_drawn():
    assert [draw(seed) for seed in range(20)] == [draw(seed) for seed in range(20)]
    assert len({str(draw(seed).plain("seed")) for seed in range(20)}) == 20


PLAIN = Case(seed=3, family="plain", steps=6, options={"delta": 0.5, "inner_steps": 2, "lr": 1e-2, "rest": "none"})


class Tampered(Run):
    """A run whose engine does something wrong once."""

    def __init__(self, case: Case, what: str):
        super().__init__(case)
        self.what = what

    def _micro_batches(self, step: int, poison: str) -> None:
        if step == 3 and self.what == "a micro-batch is counted twice":
            torch.manual_seed(0)
            loss_of(self.model, self._batch()).backward()
        super()._micro_batches(step, poison)

    def _edits_and_step(self, poison: str):
        result = super()._edits_and_step(poison)
        if self.backwards and self.optimizer.total_steps == 4:
            inactive = next(p for name, p in self.model.named_parameters() if name not in self._names())
            active = self.model.get_parameter(self.names[0])
            if self.what == "an inactive weight moves":
                inactive.data.view(-1)[0] += 1e-7
            elif self.what == "an active weight is off":
                active.data.view(-1)[0] += 1e-4
            elif self.what == "an inactive weight is trainable":
                inactive.requires_grad_(True)
        if self.what == "a gradient is scored after it was clipped":
            self.optimizer.tracker._ema[self.optimizer.tracker.active[0]] *= 1.01
            self.optimizer.tracker._updates[self.optimizer.tracker.active[0]] += 1
        return result


@pytest.mark.parametrize(
    "what",
    [
        "a micro-batch is counted twice",
        "an inactive weight moves",
        "an active weight is off",
        "an inactive weight is trainable",
        "a gradient is scored after it was clipped",
    ],
)
def test_the_judge_notices_when(what):
    with pytest.raises(Finding):
        Tampered(PLAIN, what).all_steps()


def test_the_judge_finds_nothing_in_the_same_case_left_alone():
    assert fuzz.run_case(PLAIN)["steps"] == 6
    assert fuzz.run_case(replace(PLAIN, bf16=True, reload=True))["bitwise equal continuations"] == 1


# ---- runs of the command ----


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    from soak.runs import Server

    made = Server(tmp_path_factory.mktemp("soak"))
    yield made
    made.close()


@needs_kill
def test_killed_runs_end_as_undisturbed_ones(server):
    counts, findings = kill.kill_runs(server, range(KILLED_RUNS), lambda: True, report)
    assert not findings
    assert counts["kills"] + counts["ended by SIGTERM"] + counts["ended by SIGINT"] > 0


def test_damaged_files_are_refused_or_passed_over_with_a_line(server):
    damager = server.damager()
    order = damage.file_order(damager, 0)
    assert {name for _, name, _, _ in order} >= {"model.safetensors", "optimizer.pt", "trainer_state.json"}
    counts, findings = damage.damage_files(damager, order, counted(DAMAGED_FILES), report)
    assert not findings
    assert counts["refused"] and counts["fell back"]


def test_a_save_that_fails_at_one_point_leaves_a_way_on(server):
    damager = server.damager()
    assert damager.changes > 50
    counts, findings = damage.fail_saves(damager, damage.failure_order(damager, 0), counted(FAILING_SAVES), report)
    assert not findings
    assert counts["save failed"]


def test_a_full_disk_leaves_a_way_on(server):
    reason = full_disk.why_not(server.place / "probe")
    if reason is not None:
        pytest.skip(f"no tmpfs can be mounted here: {reason}")
    filler = full_disk.DiskFiller(server, server.damager().whole)
    counts, findings = full_disk.fill_disks(filler, range(SMALL_DISKS), lambda: True, report)
    assert not findings
    assert counts["disk full"]


# ---- the long form ----


def test_the_page_is_what_the_counts_say(tmp_path):
    from soak import page

    counts = Counter(
        {"cases": 1234, "kills": 5, "runs": 6, "refused": 7, "damaged files": 8, "refused at construction": 2}
    )
    finding = {"finding": "it lost a step", "reproduction": "python tests/soak kill --case 9"}
    page.write(tmp_path / "r.json", counts, [finding], {"fuzz": 60, "kill": 60}, 3)
    page.render(tmp_path / "r.json", tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "| fuzzed training | 1,234 | 0 |" in text and "| killed runs | 6 | 1 |" in text
    assert "it lost a step" in text and "2 minutes, first seed 3" in text and "Not run." in text
    assert text.index("- 7 refused") > text.index("## Damaged") > text.index("- 2 refused at construction")


@pytest.mark.soak
def test_the_whole_attack_finds_nothing():
    """For $SOAK_MINUTES minutes, 30 by default."""
    words = [sys.executable, str(Path(__file__).parent / "soak"), "--minutes", os.environ.get("SOAK_MINUTES", "30")]
    done = subprocess.run([*words, "--seed", os.environ.get("SOAK_SEED", "0")], text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout

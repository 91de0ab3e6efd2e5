"""Every script of examples/ runs as it is, offline, and does what it is there to show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from misa_engine.trainer import last_good_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")
STEPS = 4


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, as its command line would, and gives its variables and what it printed."""

    def running(name: str) -> tuple[dict, str]:
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [script, "--steps", str(STEPS), "--output_dir", str(tmp_path / "out")])
        with torch.random.fork_rng(devices=[]):
            return runpy.run_path(script, run_name="__main__"), capsys.readouterr().out

    return running


def trained(optimizer) -> set[str]:
    """Names of the units that have been visited; the optimizer made STEPS steps."""
    misa = getattr(optimizer, "optimizer", optimizer)
    assert misa.total_steps == STEPS
    return {name for event in misa.events for name in event.active}


def test_the_scripts_are_those_of_the_documentation():
    assert SCRIPTS == ["accelerate_accumulation", "dpo", "hf_trainer", "plain_loop", "sft_chat"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_enough_to_copy(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


def test_plain_loop(run, tmp_path):
    variables, printed = run("plain_loop")
    assert trained(variables["optimizer"]) and printed.count("loss") == STEPS
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(saved) == {"model", "optimizer"} and "misa" in saved["optimizer"]


def test_hf_trainer(run, tmp_path):
    variables, _ = run("hf_trainer")
    assert trained(variables["trainer"].optimizer) and (tmp_path / "out/model.safetensors").is_file()
    assert last_good_checkpoint(tmp_path / "out") == str(tmp_path / "out/checkpoint-4")


def test_sft_chat(run, tmp_path):
    variables, _ = run("sft_chat")
    assert trained(variables["trainer"].optimizer)
    assert (tmp_path / "out/checkpoint-4/optimizer.pt").is_file() and (tmp_path / "out/misa_log.jsonl").is_file()


def test_dpo(run):
    variables, _ = run("dpo")
    assert trained(variables["trainer"].optimizer)
    frozen = variables["reference"].state_dict()
    moved = [name for name, value in variables["model"].state_dict().items() if not torch.equal(value, frozen[name])]
    assert moved  # and the reference, of the same seed, did not move with it


def test_accelerate_accumulation(run):
    variables, printed = run("accelerate_accumulation")
    assert variables["misa"].total_steps >= STEPS and "round" in printed
    assert all(parameter.grad is None for parameter in variables["misa"]._model.parameters())

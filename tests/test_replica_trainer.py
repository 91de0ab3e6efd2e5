"""Trainers and ``misa train`` in two processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import make_workplace, words
from misa_engine import MISA
from misa_engine.cli import main as cli
from ranks import run_ranks
from trainer_cases import plain_trainer, texts, tokenizer, tokens  # noqa: F401

STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "use_cpu": "true"}


def like_torchrun(rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")


def run_command(rank: int, place: Path, out: Path, *more: str, die_at: int = 0) -> dict[str, Any]:
    like_torchrun(rank)
    step = MISA.step

    def deadly(self: MISA, *args: Any) -> Any:
        if self.total_steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    if die_at and rank == 1:
        MISA.step = deadly
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = cli.main(words(place, out, *more, **STEPS))
    return {"code": code, "said": said.getvalue(), "complained": complained.getvalue()}


def killed(rank: int, place: Path, out: Path) -> dict[str, Any]:
    return run_command(rank, place, out, die_at=5)


def resumed(rank: int, place: Path, out: Path) -> dict[str, Any]:
    return run_command(rank, place, out, "--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    return make_workplace(folder, folder / "cache")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_run_whose_rank_is_killed_ends_with_one_line_and_resumes_to_the_same_weights(place, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first, second = run_ranks(run_command, tmp_path / "a", place, whole)
    assert first["code"] == second["code"] == 0, first
    assert "model and tokenizer" in first["said"] and not second["said"]
    log = [json.loads(line) for line in (whole / "misa_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["type"] == "metrics" and "loss" in entry] == list(range(1, 7))
    assert sum(entry["type"] == "end" for entry in log) == 1
    assert {path.name for path in whole.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert {path.name for path in (whole / "checkpoint-6").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert list(whole.glob("*.png"))

    first, second = run_ranks(killed, tmp_path / "b", place, broken)
    assert second is None and first["code"] == 1
    lines = [line for line in first["complained"].splitlines() if line.startswith("misa: ")]
    assert len(lines) == 1 and "resume from the last complete checkpoint" in lines[0], first["complained"]
    assert not (broken / "model.safetensors").exists()

    first, second = run_ranks(resumed, tmp_path / "c", place, broken)
    assert first["code"] == second["code"] == 0, first
    assert "goes on from step 4" in first["said"]
    expected = load_file(whole / "model.safetensors")
    for name, tensor in load_file(broken / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def train_plainly(rank: int, out: Path, data: Any) -> dict[str, torch.Tensor]:
    like_torchrun(rank)
    trainer = plain_trainer(out, data, per_device_train_batch_size=1, max_steps=4)
    trainer.train()
    assert trainer.model_wrapped is trainer.model
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_plain_trainer_with_the_factory_trains_replicas_as_one_process_would(tmp_path, tokens):  # noqa: F811
    first, second = run_ranks(train_plainly, tmp_path / "ranks", tmp_path / "two", tokens)
    assert not isinstance(first, str), first
    alone = plain_trainer(tmp_path / "one", tokens, per_device_train_batch_size=2, max_steps=4)
    alone.train()
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=0, atol=1e-4)  # of steps of 1e-2

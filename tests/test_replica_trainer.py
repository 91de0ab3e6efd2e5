"""Trainers and ``misa train`` in two processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
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


def run_command(rank: int, place: Path, out: Path, *more: str, die_at: int = 0, writing: str = "") -> dict[str, Any]:
    like_torchrun(rank)
    step = MISA.step

    def deadly(self: MISA, *args: Any) -> Any:
        if self.total_steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    if die_at and rank == 1:
        MISA.step = deadly
    if writing and rank == 0:
        _die_writing(writing)
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = cli.main(words(place, out, *more, **STEPS))
    return {"code": code, "said": said.getvalue(), "complained": complained.getvalue()}


def killed(rank: int, place: Path, out: Path) -> dict[str, Any]:
    return run_command(rank, place, out, die_at=5)


def _die_writing(folder: str) -> None:
    """Die when half of a checkpoint's optimizer state is on disk."""
    save = torch.save

    def deadly(what: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if folder in str(file) and "optimizer" in Path(str(file)).name:
            Path(str(file)).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(what, file, *args, **kwargs)

    torch.save = deadly


def killed_writing(rank: int, place: Path, out: Path) -> dict[str, Any]:
    return run_command(rank, place, out, "--shard_state", "true", writing="checkpoint-4")


def resumed(rank: int, place: Path, out: Path, *more: str) -> dict[str, Any]:
    return run_command(rank, place, out, "--resume_from_checkpoint", "true", *more)


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

    half = tmp_path / "half"  # with parts of the state on both, which together write what one has
    first, second = run_ranks(killed_writing, tmp_path / "d", place, half)
    assert first is None and second["code"] == 1
    assert "resume from the last complete checkpoint" in second["complained"], second
    first, second = run_ranks(resumed, tmp_path / "e", place, half, "--shard_state", "true")
    assert first["code"] == second["code"] == 0, first
    assert "goes on from step 2" in first["said"]
    for name, tensor in load_file(half / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--num_machines", "1"],
}


@pytest.mark.soak
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_both_launchers_start_replicas_without_a_flag(place, tmp_path, launcher):
    pytest.importorskip(LAUNCHERS[launcher][0].split(".")[0])
    count = "--nproc_per_node" if launcher == "torchrun" else "--num_processes"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    name = "--master_port" if launcher == "torchrun" else "--main_process_port"
    start = [sys.executable, "-m", *LAUNCHERS[launcher], count, "2", name, port, "-m", "misa_engine"]
    run = subprocess.run(
        [*start, *words(place, tmp_path / "out", **STEPS)], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("model and tokenizer") == 1  # rank 0 speaks
    checkpoint = tmp_path / "out" / "checkpoint-6"
    assert {path.name for path in checkpoint.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}


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

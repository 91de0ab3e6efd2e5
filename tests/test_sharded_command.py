"""``misa train --fsdp`` in two processes: what one process trains, saves and says."""

from __future__ import annotations

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
from misa_engine.cli import main as cli
from misa_engine.method.config import MisaConfig
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import Card
from misa_engine.planner.plan import plan
from misa_engine.planner.sharded import sharded_plan
from misa_engine.planner.worst_case import MetaModel
from ranks import run_ranks
from test_replica_trainer import STEPS, run_command


def evaluated(place: Path) -> tuple[str, ...]:
    """On other records than a share of the 24, which are whole steps: one process and two then see the same in each."""
    return ("--eval_dataset", str(place / "data.jsonl"), "--eval_steps", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    return make_workplace(folder, folder / "cache")


def rows(rank: int, place: Path, out: Path, *more: str, **how: Any) -> dict[str, Any]:
    return run_command(rank, place, out, "--fsdp", *more, **how)


def ways(rank: int, place: Path, outs: Path) -> dict[str, dict[str, Any]]:
    """What needs no process to die, one after the other."""
    found = {
        "dry": rows(rank, place, outs / "dry", "--dry_run"),
        "run": rows(rank, place, outs / "two", *evaluated(place)),
    }
    for name, more in {
        "vram": ("--max_vram_gb", "1"),
        "residents": ("--residents", "int8"),
        "compile": ("--torch_compile", "true"),
        "resize": ("--resize_embeddings", "true"),
        "offload": ("--fsdp_config", '{"cpu_offload": true}'),
        "one": ("--fsdp_config", '{"version": 1}'),
        "rest": ("--rest", "sign"),
        "missing": ("--model_name_or_path", str(place / "absent")),
    }.items():
        found[name] = rows(rank, place, outs / "bad", *more)
    return found


def killed(rank: int, place: Path, out: Path) -> dict[str, Any]:
    return rows(rank, place, out, *evaluated(place), die_at=5)


def resumed(rank: int, place: Path, out: Path) -> dict[str, Any]:
    return rows(rank, place, out, *evaluated(place), "--resume_from_checkpoint", "true")


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "misa_log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_run_of_rows_is_that_of_one_process_also_after_a_rank_was_killed(place, tmp_path):
    first, second = run_ranks(ways, tmp_path / "a", place, tmp_path)
    assert isinstance(first, dict), first
    assert first["run"]["code"] == second["run"]["code"] == 0, first["run"]
    assert first["dry"]["code"] == 0 and not (tmp_path / "dry").exists(), first["dry"]
    assert "one of 2 processes that hold rows of the weights" in first["dry"]["said"] and not second["run"]["said"]
    assert (
        cli.main(
            words(place, tmp_path / "one", *evaluated(place), "--rest", "none", **STEPS, per_device_train_batch_size=4)
        )
        == 0
    )
    check_files(tmp_path)
    check_account(place, tmp_path / "two", first["run"]["said"])
    check_refusals(first, second)
    assert not (tmp_path / "bad").exists()

    broken = tmp_path / "broken"
    first, second = run_ranks(killed, tmp_path / "b", place, broken)
    assert second is None and first["code"] == 1
    lines = [line for line in first["complained"].splitlines() if line.startswith("misa: ")]
    assert len(lines) == 1 and "resume from the last complete checkpoint" in lines[0], first["complained"]
    first, second = run_ranks(resumed, tmp_path / "c", place, broken)
    assert first["code"] == second["code"] == 0, first
    assert "goes on from step 4" in first["said"]
    expected = load_file(tmp_path / "two" / "model.safetensors")
    for name, tensor in load_file(broken / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def check_files(outs: Path) -> None:
    one, two = (load_file(outs / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    assert {path.name for path in (outs / "two").iterdir()} == {path.name for path in (outs / "one").iterdir()}
    logs = [log_of(outs / name) for name in ("one", "two")]
    ends = [next(entry for entry in log if entry["type"] == "end") for log in logs]
    assert ends[0]["visits"] == ends[1]["visits"] and ends[1]["frozen"] == ends[1]["unchanged_frozen"] > 0
    assert ends[0]["relative_change"] == pytest.approx(ends[1]["relative_change"], rel=1e-2)
    seen = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in logs]
    assert seen[0] == pytest.approx(seen[1], abs=2e-3) and len(seen[0]) >= 3  # means of batches of other sizes


def check_account(place: Path, out: Path, said: str) -> None:
    """The planner's, the preview's and the optimizer's bytes are the same; the planner's model is bfloat16."""
    from transformers import AutoConfig

    options = {"delta": 0.2, "inner_steps": 2, "rest": "none"}
    meta = MetaModel(AutoConfig.from_pretrained(place / "model"))
    one = plan(meta, card=Card.of("24GiB"), misa=MisaConfig(**options), micro_batch=MicroBatch(batch=2, length=64))
    planned = sharded_plan(meta, one, 2).bytes
    held = next(entry for entry in log_of(out) if entry["type"] == "memory")["bytes"]
    for category, times in {"gradients": 2, "first_moment": 1, "second_moment": 1, "tables": 1}.items():
        assert held[category] == times * planned[category]
        assert f"{held[category] / 2**10:,.2f} KiB" in said
    assert held["weights"] == pytest.approx(2 * planned["weights"], rel=0.01)  # the planner counts buffers too


def check_refusals(first: dict[str, Any], second: dict[str, Any]) -> None:
    said = {
        "vram": "misa plan --gpus K --sharded",
        "residents": "--residents with --fsdp",
        "compile": "torch_compile with fsdp",
        "resize": "resize and save the model first",
        "offload": "cpu_offload with fsdp",
        "one": "Use FSDP2",
        "rest": "rest='sign' with sharded weights",
        "missing": "absent does not exist",
    }
    for name, text in said.items():
        for rank in (first, second):
            assert rank[name]["code"] == 2 and text in rank[name]["complained"], (name, rank[name])


def test_fsdp_in_one_process_is_refused_with_the_launcher(place, tmp_path, capsys):
    assert cli.main(words(place, tmp_path / "out", "--fsdp", **STEPS)) == 2
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LAUNCHERS = {
    "torchrun": (["torch.distributed.run", "--nproc_per_node", "2", "--master_port"], ["--fsdp"]),
    "accelerate": (
        ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "true"]
        + ["--num_machines", "1", "--mixed_precision", "no", "--num_processes", "2", "--main_process_port"],
        [],
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_both_launchers_shard(place, tmp_path, launcher):
    pytest.importorskip(LAUNCHERS[launcher][0][0].split(".")[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start, flags = LAUNCHERS[launcher]
    command = [
        sys.executable,
        "-m",
        *start,
        port,
        "-m",
        "misa_engine",
        *words(place, tmp_path / "out", *flags, **STEPS),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("one of 2 processes that hold rows") == 1
    assert {path.name for path in (tmp_path / "out" / "checkpoint-6").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }

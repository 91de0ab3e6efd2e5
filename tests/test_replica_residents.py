"""Replicas of a model whose undrawn matrices rest in 8 bits: as one process with the same residents, and equal."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import misa_engine
from command import make_workplace
from misa_engine import MISA
from misa_engine.engine.replicas import CHECKSUM_ROUNDS
from misa_engine.planner import host_memory
from ranks import run_ranks
from resident_models import OPTIONS, of, resting, snapshot
from test_replica_failures import attempt
from test_replica_trainer import run_command
from test_replicas import micro_batches
from training import loss_of

STEPS, T = 6, 2
#: name -> (format, dtype, MISA's options, micro-batches a step)
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], int]] = {
    "int8": ("int8", torch.float32, {}, 1),
    "int8_row, accumulation": ("int8_row", torch.float32, {"always_train": ("*norm*",)}, 2),
    "fp8, in backward": ("fp8", torch.float32, {"update_in": "backward"}, 1),
    "bfloat16": ("int8", torch.bfloat16, {"state_dtype": "int8"}, 1),
    "bfloat16, 32 bits": ("int8", torch.bfloat16, {"leave_rounding": "keep", "revisit": "offload"}, 1),
}


def drifted(format: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """A resting model; with a seed, of other weights than the rank 0's."""
    model = resting(format, dtype)
    if seed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def steps(model: nn.Module, optimizer: MISA, numbers: range, part: slice, count: int = 1) -> None:
    for number in numbers:
        for ids in micro_batches(number, count, part):
            (loss_of(model, ids) / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def run(case: str, part: slice, seed: int = 0) -> dict[str, Any]:
    format, dtype, options, count = CASES[case]
    model = drifted(format, dtype, seed)
    optimizer = MISA(model, **{**OPTIONS, "lr": 1e-4, "inner_steps": T, **options})
    draws = [optimizer.active]
    optimizer.on_switch(lambda event: draws.append(event.active))
    steps(model, optimizer, range(STEPS), part, count)
    residents = of(model)
    expanded = {name: residents.expanded(name) for name in residents.resting}
    return {"draws": draws, "weights": snapshot(model), "expanded": expanded, "scores": optimizer.scores}


def all_cases(rank: int) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    return {case: run(case, part, seed=rank) for case in CASES}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(all_cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_with_residents_equal_one_process_on_the_concatenated_batch(replicas, case):
    assert not isinstance(replicas[0], str), replicas[0]
    first, second = (rank[case] for rank in replicas)
    alone, half = run(case, slice(0, 4)), CASES[case][1] == torch.bfloat16
    assert first["draws"] == second["draws"] == alone["draws"] and len(set(first["draws"])) > 2
    assert first["scores"] == second["scores"]
    for kind in ("weights", "expanded"):
        assert first[kind].keys() == second[kind].keys() == alone[kind].keys()
        assert all(torch.equal(tensor, second[kind][name]) for name, tensor in first[kind].items()), kind
    start, moved = drifted(*CASES[case][:2], 0).state_dict(), 0
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-2 if half else 1e-6)
        moved += not torch.equal(weight, start[name])
        # what was never drawn is rank 0's file, bit for bit, also where rank 1 began with other weights
        assert not torch.equal(weight, start[name]) or torch.equal(second["weights"][name], start[name])
    assert 0 < moved < len(start)


def saved_and_resumed(rank: int, folder: Path) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    model = resting("int8", torch.bfloat16)
    optimizer = MISA(model, **OPTIONS | {"inner_steps": 3, "leave_rounding": "keep"})
    steps(model, optimizer, range(4), part)
    state = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, state)
    steps(model, optimizer, range(4, 8), part)
    if rank == 0:
        model.save_pretrained(folder)
    whole = snapshot(model)

    again = resting("int8", torch.bfloat16)
    resumed = MISA(again, **OPTIONS | {"inner_steps": 3, "leave_rounding": "keep"})
    state.seek(0)
    loaded = torch.load(state, weights_only=True)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    steps(again, resumed, range(4, 8), part)
    return {"whole": whole, "resumed": snapshot(again)}


def test_rank_0_saves_the_masters_and_a_resumed_run_makes_the_same_bits(tmp_path):
    ranks = run_ranks(saved_and_resumed, tmp_path / "ranks", tmp_path / "saved")
    assert not isinstance(ranks[0], str), ranks[0]
    written = load_file(tmp_path / "saved/model.safetensors")
    for rank in ranks:
        assert written.keys() == rank["whole"].keys() == rank["resumed"].keys()
        for name, tensor in written.items():
            assert torch.equal(tensor, rank["whole"][name]) and torch.equal(tensor, rank["resumed"][name]), name


# ---- what differs ----


def apart(rank: int, place: Path) -> dict[str, str]:
    part, said = slice(2 * rank, 2 * rank + 2), {}
    said["format"] = attempt(lambda: MISA(resting("fp8" if rank else "int8"), **OPTIONS))
    plain = misa_engine.load_model(place)
    said["one"] = attempt(lambda: MISA(plain if rank else resting("int8"), **OPTIONS))

    model = resting("int8")
    optimizer = MISA(model, **OPTIONS | {"inner_steps": 1})
    if rank:  # past everything that watches: the exact weights alone, and not their 8 bits
        model.get_parameter(of(model).resting[2]).data[0, 0] += 1
    said["name"] = of(model).resting[2]
    said["master"] = attempt(lambda: steps(model, optimizer, range(CHECKSUM_ROUNDS + 1), part))

    free = host_memory.available_bytes
    host_memory.MARGIN_BYTES = 0
    host_memory.available_bytes = lambda: 700_000 if rank else 500_000  # the second has seen the first's memory go
    said["memory"] = attempt(lambda: misa_engine.load_model(place, residents="int8"))
    host_memory.available_bytes = free
    return said


def test_what_differs_between_replicas_with_residents_is_named(tmp_path):
    from models import TINY

    TINY["llama"](vocab_size=4096).bfloat16().save_pretrained(tmp_path / "model")  # 0.2 MB of embedding alone
    for said in run_ranks(apart, tmp_path / "ranks", tmp_path / "model"):
        assert not isinstance(said, str), said
        assert "at rest as fp8 on rank 1 and" in said["format"] and "at rest as int8 on rank 0" in said["format"]
        assert said["one"].startswith("ValueError") and "on rank 1" in said["one"]
        assert said["master"].startswith("ReplicaError")
        assert f"before round {CHECKSUM_ROUNDS}: {said['name']} of ranks 1 is not that of rank 0" in said["master"]
        assert "in each of 2 processes of this host" in said["memory"] and said["memory"].startswith("UserError")


def test_equal_weights_are_not_written_and_others_bring_their_codes():
    model, sent = resting("fp8"), []
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    assert of(model).become(lambda tensor: sent.append(tensor.nbytes)) == ()
    assert before == {name: parameter._version for name, parameter in model.named_parameters()}
    sizes = of(model).bytes()
    assert sum(sent) == sum(sizes[name] for name in sizes if name != "resident_workspace")
    other = resting("fp8")
    with torch.no_grad():
        for name in of(other).on_host:
            other.get_parameter(name).mul_(1.5)
    tape: list[Tensor] = []
    of(other).become(lambda tensor: tape.append(tensor.clone()))
    tape = copy.deepcopy(tape)[::-1]
    assert of(model).become(lambda tensor: tensor.copy_(tape.pop())) == of(model).on_host
    for name in of(model).on_host:
        assert torch.equal(model.get_parameter(name), other.get_parameter(name))
    for name in of(model).resting:
        assert torch.equal(of(model).expanded(name), of(other).expanded(name))


# ---- misa train ----


def command(rank: int, place: Path, out: Path, *more: str) -> dict[str, Any]:
    return run_command(rank, place, out, "--residents", "int8", "--inner_steps", "2", "--cold_start", "none", *more)


@pytest.mark.filterwarnings("ignore")
def test_misa_train_with_residents_in_two_processes_saves_and_resumes(tmp_path):
    place = make_workplace(tmp_path / "place", tmp_path / "cache", torch.bfloat16)
    out = tmp_path / "out"
    first, second = run_ranks(command, tmp_path / "a", place, out)
    assert first["code"] == second["code"] == 0, (first, second)
    assert "residents int8: loss" in first["said"] and not second["said"]
    expected, start = load_file(out / "model.safetensors"), load_file(place / "model/model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], expected[name])}
    assert changed and changed != set(start) and "model.embed_tokens.weight" not in changed
    import shutil

    shutil.rmtree(out / "checkpoint-6")
    (out / "model.safetensors").unlink()
    first, second = run_ranks(command, tmp_path / "b", place, out, "--resume_from_checkpoint", "true")
    assert first["code"] == second["code"] == 0 and "goes on from step 4" in first["said"], (first, second)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out / "model.safetensors").items())

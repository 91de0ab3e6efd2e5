"""What can go wrong with sharded weights: a process ends, passes that not all make, matrices that not all use."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from misa_engine import MISA
from misa_engine.engine.replicas import lost_ranks
from misa_engine.engine.sharded.mesh import ShardMesh
from ranks import run_ranks
from test_replica_failures import attempt, step
from test_replicas import COMMON, build, micro_batches
from test_sharded import full, shard
from training import loss_of

OPTIONS: dict[str, Any] = {**COMMON, "inner_steps": 2, "revisit": "keep"}
SAVED_AT, STEPS = 3, 6


def train(rank: int, folder: Path, where: str = "") -> Any:
    """Save after SAVED_AT steps; then rank 1 ends at ``where``, if anywhere."""
    model = shard(build())
    optimizer = MISA(model, **OPTIONS)
    part = slice(2 * rank, 2 * rank + 2)
    for number in range(SAVED_AT):
        step(model, optimizer, number, part)
    saved = {"weights": full(model), "optimizer": optimizer.state_dict()}
    if rank == 0:
        torch.save(saved, folder / "checkpoint.pt")
    if where and rank == 1:
        _die(model, optimizer, where)
    return _go_on(rank, model, optimizer, part)


def _go_on(rank: int, model: nn.Module, optimizer: MISA, part: slice) -> Any:
    began = time.monotonic()

    def rest_of_the_run() -> None:
        with lost_ranks(rank):
            for number in range(SAVED_AT, STEPS):
                step(model, optimizer, number, part)
            optimizer.state_dict()

    said = attempt(rest_of_the_run)
    return (said, time.monotonic() - began) if said else full(model)


def _die(model: nn.Module, optimizer: MISA, where: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "forward":
        model.model.layers[1].register_forward_hook(die)
    elif where == "backward":
        model.model.layers[1].register_full_backward_hook(die)
    elif where == "norms":
        ShardMesh.add_up = die
    elif where == "switch":
        optimizer.tracker.draw = die
    else:
        ShardMesh.whole = die


def go_on(rank: int, folder: Path) -> Any:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = shard(build())
    set_model_state_dict(model, saved["weights"], options=StateDictOptions(full_state_dict=True))
    optimizer = MISA(model, **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    return _go_on(rank, model, optimizer, slice(2 * rank, 2 * rank + 2))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks(train, folder, folder)[0]


SOAK = [pytest.param(where, marks=pytest.mark.soak) for where in ("forward", "saving")]


@pytest.mark.parametrize("where", ["backward", "norms", "switch", *SOAK])
def test_when_a_rank_is_killed_the_other_ends_with_one_line_and_the_checkpoint_goes_on(tmp_path, uninterrupted, where):
    first, second = run_ranks(train, tmp_path, tmp_path, where, timeout=30)
    assert second is None
    said, seconds = first
    assert said.startswith("ReplicaError: rank 0 waited in vain") and "resume from the last complete" in said
    assert "\n" not in said
    assert seconds < 40
    if where == "norms":
        (tmp_path / "store").unlink(missing_ok=True)
        for found in run_ranks(go_on, tmp_path, tmp_path):
            assert found.keys() == uninterrupted.keys()
            for name, weight in uninterrupted.items():
                assert torch.equal(found[name], weight), name


def uneven(rank: int, batches: tuple[int, int]) -> Any:
    model = shard(build())
    optimizer = MISA(model, **OPTIONS)
    step(model, optimizer, 0, slice(2 * rank, 2 * rank + 2))
    began = time.monotonic()
    with lost_ranks(rank):
        said = attempt(lambda: step(model, optimizer, 1, slice(2 * rank, 2 * rank + 2), batches=batches[rank]))
    return said, time.monotonic() - began


def test_a_rank_without_a_batch_is_refused_at_once(tmp_path):
    first, second = run_ranks(uneven, tmp_path, (1, 0), timeout=30)
    assert second[0].startswith("ValueError: rank 1 ends step 1 without a forward and backward pass")
    assert "same number of batches" in second[0]
    assert first[0] and first[1] < 40 and second[1] < 40


def test_a_rank_with_fewer_batches_ends_all_within_the_timeout(tmp_path):
    first, second = run_ranks(uneven, tmp_path, (2, 1), timeout=8)
    assert second[0].startswith("ReplicaError: rank 1 waited in vain while the processes meet at a step")
    assert first[0] and first[1] < 40 and second[1] < 40


def without_mlp(model: nn.Module) -> None:
    """Layer 1 passes its MLP by, whose matrices get no gradient."""
    model.model.layers[1].mlp.forward = torch.zeros_like


def unused(rank: int) -> dict[str, torch.Tensor]:
    model = shard(build())
    model.set_reduce_scatter_unused_params(True)
    optimizer = MISA(model, **{**OPTIONS, "delta": 1.0})
    if rank:
        without_mlp(model)
    for number in range(3):
        step(model, optimizer, number, slice(2 * rank, 2 * rank + 2))
    return full(model)


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="torch below 2.13")
def test_a_matrix_that_one_rank_does_not_use_counts_as_zero_there(tmp_path):
    model, other = build(), build()
    optimizer = MISA(model, **{**OPTIONS, "delta": 1.0})
    for number in range(3):
        (ids,) = micro_batches(number, 1, slice(0, 4))
        (loss_of(model, ids[:2]) / 2).backward()
        held = model.model.layers[1].mlp.forward
        without_mlp(model)
        (loss_of(model, ids[2:]) / 2).backward()
        model.model.layers[1].mlp.forward = held
        optimizer.step()
        optimizer.zero_grad()
    for found in run_ranks(unused, tmp_path):
        assert not isinstance(found, str), found
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name], weight.detach(), rtol=0, atol=1e-6)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))

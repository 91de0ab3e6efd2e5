"""Checkpoints of sharded weights, what is refused, and when the set of trained matrices may change."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from misa_engine import MISA
from misa_engine.engine import replicas
from misa_engine.engine.shards import local
from ranks import run_ranks
from test_replica_failures import attempt, step
from test_replicas import COMMON, build, micro_batches
from test_sharded import UNEVEN, full, shard
from training import loss_of

OPTIONS = {**COMMON, "inner_steps": 4, "rule": "uniform", "revisit": "keep", "leave_rounding": "keep"}
SAVED_AT, STEPS = 6, 16  # within the second round


def steps(model: nn.Module, optimizer: MISA, span: range, part: slice) -> None:
    for number in span:
        step(model, optimizer, number, part)


def part_of(rank: int) -> slice:
    share = 4 // dist.get_world_size()
    return slice(rank * share, (rank + 1) * share)


def snapshot(value: Any) -> Any:
    """As torch.save and torch.load(weights_only=True) would give it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(rank: int) -> dict[str, Any]:
    """A run that saves and goes on, and one that begins where it saved."""
    model = shard(build(**UNEVEN))
    optimizer = MISA(model, **OPTIONS)
    steps(model, optimizer, range(SAVED_AT), part_of(rank))
    saved = {"weights": full(model), "optimizer": snapshot(optimizer.state_dict())}
    steps(model, optimizer, range(SAVED_AT, STEPS), part_of(rank))
    return {**saved, "end": full(model), "active": optimizer.active, "resumed": resumed(rank, saved)}


def resumed(rank: int, saved: dict[str, Any]) -> dict[str, Any]:
    model = shard(build(**UNEVEN))
    weights = dict(saved["weights"])  # which torch rewrites
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    optimizer = MISA(model, **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    again = snapshot(optimizer.state_dict())
    steps(model, optimizer, range(SAVED_AT, STEPS), part_of(rank))
    return {"end": full(model), "active": optimizer.active, "again": again}


def alone(saved: dict[str, Any] | None) -> dict[str, Any]:
    """One process without sharding, from the beginning (and saving) or from a checkpoint."""
    model = build(**UNEVEN)
    optimizer = MISA(model, **OPTIONS)
    found: dict[str, Any] = {}
    if saved is not None:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        steps(model, optimizer, range(SAVED_AT), slice(0, 4))
        found = {"weights": copy.deepcopy(model.state_dict()), "optimizer": snapshot(optimizer.state_dict())}
    steps(model, optimizer, range(SAVED_AT, STEPS), slice(0, 4))
    return {**found, "end": {n: p.detach() for n, p in model.named_parameters()}, "active": optimizer.active}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(found: dict[str, Any], wanted: dict[str, Any], atol: float) -> None:
    assert found["active"] == wanted["active"]
    for name, weight in wanted["end"].items():
        torch.testing.assert_close(found["end"][name], weight, rtol=0, atol=atol)


def test_state_goes_on_exactly_on_as_many_processes_and_to_rounding_on_fewer(tmp_path):
    ranks = run_ranks(trained, tmp_path / "four", size=4)
    assert not isinstance(ranks[0], str), ranks[0]
    for found in ranks:
        assert equal(found["optimizer"], ranks[0]["optimizer"])  # whole, everywhere
        same_run(found["resumed"], found, atol=0)
        assert equal(found["resumed"]["again"], found["optimizer"])
    saved = {name: ranks[0][name] for name in ("weights", "optimizer")}
    two = run_ranks(resumed, tmp_path / "two", saved)
    assert not isinstance(two[0], str), two[0]
    same_run(two[0], ranks[0], atol=1e-6)
    same_run(alone(saved), ranks[0], atol=1e-6)
    # and the other way round
    one = alone(None)
    two = run_ranks(resumed, tmp_path / "from one", {name: one[name] for name in ("weights", "optimizer")})
    assert not isinstance(two[0], str), two[0]
    same_run(two[0], one, atol=1e-6)


def refusal(call: Callable[[], Any]) -> str:
    return attempt(call) or "accepted"


def refusals(rank: int) -> dict[str, str]:
    def misa(model: nn.Module, **options: Any) -> Callable[[], MISA]:
        return lambda: MISA(model, **{**COMMON, **options})

    layers_only = build()
    for layer in layers_only.model.layers:
        fully_shard(layer)
    columns = shard(build(), shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    other = shard(build())
    return {
        "update_in": refusal(misa(other, update_in="backward")),
        "offload": refusal(misa(other, revisit="offload")),
        "rest": refusal(misa(other, rest="sign")),
        "state": refusal(misa(other, shard_state=True)),
        "8 bits": refusal(misa(shard(build(**UNEVEN)), state_dtype="int8")),
        "plain": refusal(misa(layers_only)),
        "columns": refusal(misa(columns)),
        "host": refusal(misa(shard(build(), offload_policy=CPUOffloadPolicy(pin_memory=False)))),
        "option": refusal(misa(other, delta=0.2 + 0.1 * rank)),
        "one whole": refusal(misa(other if rank else build())),
        "fine": refusal(misa(other)),
    }


def test_what_sharded_weights_do_not_have_is_refused_by_name_before_training(tmp_path):
    ranks = run_ranks(refusals, tmp_path)
    assert not isinstance(ranks[0], str), ranks[0]
    for found in ranks:
        assert "update_in='backward' with sharded weights" in found["update_in"] and "'step'" in found["update_in"]
        assert "revisit='offload'" in found["offload"] and "'keep'" in found["offload"]
        assert "rest='sign' with sharded weights" in found["rest"] and "rest='none'" in found["rest"]
        assert "shard_state=True with sharded weights" in found["state"] and "leave it out" in found["state"]
        assert "inside a group of 64" in found["8 bits"] and "float32" in found["8 bits"]
        assert "plain tensor while others are sharded" in found["plain"] and "fully_shard" in found["plain"]
        assert "Shard(dim=1)" in found["columns"] and "shard_placement_fn" in found["columns"]
        assert "CPUOffloadPolicy" in found["host"] and "Leave out offload_policy" in found["host"]
        assert "option delta is 0.3" in found["option"] and "0.2 on rank 0" in found["option"]
        assert "on 2 processes on rank 1" in found["one whole"]
        assert found["fine"] == "accepted"


def apart(rank: int) -> dict[str, str]:
    """Two copies of a model in halves: rank 3, which holds what rank 1 does, loads another state, then other rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replicas.CHECKSUM_ROUNDS = 2
    model = shard(build(), mesh=mesh)
    optimizer = MISA(model, **{**COMMON, "inner_steps": 1})
    early = snapshot(optimizer.state_dict())
    steps(model, optimizer, range(2), part_of(rank))
    late = snapshot(optimizer.state_dict())
    found = {"loaded": refusal(lambda: optimizer.load_state_dict(early if rank == 3 else late))}
    optimizer.remove()
    model = shard(build(), mesh=mesh)
    optimizer = MISA(model, **{**COMMON, "inner_steps": 1})
    if rank == 3:
        with torch.no_grad():
            local(model.lm_head.weight)[0, 0] += 1
    found["drifted"] = refusal(lambda: steps(model, optimizer, range(4), part_of(rank)))
    return {**found, "round": str(optimizer.round)}


def test_other_states_and_other_rows_of_processes_that_hold_the_same_are_errors_that_name_ranks(tmp_path):
    for rank, found in enumerate(run_ranks(apart, tmp_path, size=4)):
        assert isinstance(found, dict), found
        assert f"ranks 3 have loaded another optimizer state than rank 0; rank {rank} is at" in found["loaded"]
        if rank in (1, 3):
            assert f"rank {rank} holds the same rows as ranks {4 - rank}, with other values" in found["drifted"]
            assert "before round 2" in found["drifted"] and found["round"] == "2"


def toggling(rank: int) -> dict[str, str]:
    model = shard(build())
    optimizer = MISA(model, **{**COMMON, "inner_steps": 3})
    data = micro_batches(0, 1, part_of(rank))[0]
    found = {}

    def at_backward(call: Callable[[], Any]) -> str:
        said = []
        output = model(input_ids=data, labels=data)
        output.logits.register_hook(lambda gradient: said.append(refusal(call)))
        output.loss.backward()
        optimizer.zero_grad()
        return said[0]

    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: found.update(forward=refusal(optimizer.step)))
    loss_of(model, data).backward()
    hook.remove()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, data).backward()
    found["backward"] = at_backward(optimizer.end_round)
    loss = loss_of(model, data)
    optimizer.step()
    found["between"] = refusal(loss.backward)
    return found


def test_set_of_trained_matrices_changes_between_steps_only(tmp_path):
    for found in run_ranks(toggling, tmp_path):
        assert not isinstance(found, str), found
        assert "step() within a forward or backward pass" in found["forward"]
        assert "end_round() within a forward or backward pass" in found["backward"]
        assert "forward pass from before the last step" in found["between"]


def evaluated(rank: int) -> dict[str, torch.Tensor]:
    model = shard(build())
    optimizer = MISA(model, **{**COMMON, "inner_steps": 1, "always_train": ("lm_head",)})
    data = micro_batches(0, 1, part_of(rank))[0]
    loss_of(model, data).backward()
    with torch.no_grad():
        loss_of(model, data)  # leaves the root's weights gathered
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = loss_of(model, data)
        fresh = build()
        fresh.load_state_dict(_gathered(model))
        return {"seen": after, "wanted": loss_of(fresh, data)}


def _gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return full(model)


def test_weights_that_an_evaluation_left_gathered_are_not_stale_after_a_step(tmp_path):
    for found in run_ranks(evaluated, tmp_path):
        assert not isinstance(found, str), found
        assert found["seen"].item() == pytest.approx(found["wanted"].item(), abs=1e-6)

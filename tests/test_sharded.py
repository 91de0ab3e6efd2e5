"""Two and four processes that hold rows of one model (``fully_shard``), beside one process that holds it whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import test_replicas
from misa_engine import MISA
from ranks import run_ranks
from test_replicas import CASES, COMMON, _arguments, check, micro_batches, run
from training import loss_of

#: Of the replicas' cases, those that take another way with sharded weights.
SHARDED = [
    *("engine", "paper", "official", "cold start", "8 bits", "blocks and always", "accumulation", "clip_grad_norm_"),
    *("torch clips", "not finite", "scaler, unscaled", "bfloat16, float32 slots"),
]
#: In four processes: 50 rows are 13, 13, 13 and 11; 5 rows are 2, 2, 1 and none.
UNEVEN = {"hidden_size": 40, "intermediate_size": 50}
EMPTY = {"intermediate_size": 5}
whole = test_replicas.build


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}


def sharded_run(name: str, part: slice, mesh: Any = None, **shape: Any) -> dict[str, Any]:
    """What ``test_replicas.run`` does, with a sharded model."""
    options, how = CASES[name]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(test_replicas, "build", lambda dtype, seed: shard(whole(dtype, seed, **shape), mesh=mesh))
        result = run(options, part, **_arguments(how))
    result["weights"] = {name: weight.full_tensor() for name, weight in result["weights"].items()}
    return result


def in_twos(rank: int) -> dict[str, Any]:
    return {name: sharded_run(name, slice(2 * rank, 2 * rank + 2)) for name in SHARDED}


FOUR = {
    "uneven": ("engine", UNEVEN),
    "uneven, always": ("blocks and always", UNEVEN),
    "empty": ("max_grad_norm", EMPTY),
    "empty, not finite": ("not finite", EMPTY),
    "hsdp": ("max_grad_norm", {}),
    "hsdp, official": ("official", UNEVEN),
}


def in_fours(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    part = slice(rank, rank + 1)
    return {
        case: sharded_run(name, part, mesh if case.startswith("hsdp") else None, **shape)
        for case, (name, shape) in FOUR.items()
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(in_twos, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", SHARDED)
def test_rows_in_two_processes_equal_one_process_on_the_concatenated_batch(two, case):
    assert not isinstance(two[0], str), two[0]
    check([ranks[case] for ranks in two], case)


def test_uneven_and_empty_rows_and_hsdp_in_four_processes_equal_one_process(tmp_path, monkeypatch):
    four = run_ranks(in_fours, tmp_path, size=4)
    assert not isinstance(four[0], str), four[0]
    for case, (name, shape) in FOUR.items():
        monkeypatch.setattr(test_replicas, "build", lambda dtype, seed, shape=shape: whole(dtype, seed, **shape))
        check([ranks[case] for ranks in four], name)


#: name -> (options, dtype): what has to be the same to the last bit where gradients are.
EXACT: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "bfloat16": ({}, torch.bfloat16),
    "8 bits": ({"state_dtype": "int8", "revisit": "keep"}, torch.bfloat16),
    "residual bits kept": ({"leave_rounding": "keep", "revisit": "keep"}, torch.bfloat16),
    "float32": ({"preset": "paper"}, torch.float32),
}


def exact_run(options: dict[str, Any], dtype: torch.dtype, sharded: bool) -> dict[str, Any]:
    model = whole(dtype)
    optimizer = MISA(
        shard(model) if sharded else model,
        **{**COMMON, **options, "rule": "uniform", "lr": 1e-2, "gemm_gradients": False},
    )
    for step in range(9):
        loss_of(model, micro_batches(step, 1, slice(0, 4))[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["misa"]
    weights = full(model) if sharded else {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, **{name: state[name] for name in ("buffers", "host", "slots")}}


def exact(rank: int) -> dict[str, Any]:
    return {name: exact_run(options, dtype, True) for name, (options, dtype) in EXACT.items()}


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.soak), 4])
def test_update_of_an_element_does_not_depend_on_who_holds_it(tmp_path, size):
    """The same batch everywhere, so that gradients are the same to the last bit: all bits of weights and state are."""
    ranks = run_ranks(exact, tmp_path, size=size)
    assert not isinstance(ranks[0], str), ranks[0]
    for name, (options, dtype) in EXACT.items():
        alone = exact_run(options, dtype, False)
        for found in (rank[name] for rank in ranks):
            assert found["slots"] == alone["slots"] and found["host"].keys() == alone["host"].keys()
            for kind in ("weights", "buffers"):
                assert found[kind].keys() == alone[kind].keys()
                for key, tensor in alone[kind].items():
                    assert torch.equal(found[kind][key], tensor), (name, key)
            for key, (step, kept) in alone["host"].items():
                assert found["host"][key][0] == step
                assert all(torch.equal(found["host"][key][1][category], kept[category]) for category in kept), key


def counted(rank: int) -> list[dict[str, Any]]:
    """Collectives of each step, beside what the draw says they should be."""
    model = shard(whole(num_hidden_layers=4))
    optimizer = MISA(model, **{**COMMON, "delta": 0.1, "inner_steps": 1})
    sent: Counter[str] = Counter()
    scatter, reduce = dist.reduce_scatter_single, dist.all_reduce

    def reduce_scatter(*args: Any, **kwargs: Any) -> Any:
        given = kwargs["input"] if "input" in kwargs else args[1]
        sent.update({"reduce-scatters": 1, "elements": given.numel()})
        return scatter(*args, **kwargs)

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.update({"all-reduces": 1, "numbers": tensor.numel()})
        return reduce(tensor, *args, **kwargs)

    dist.reduce_scatter_single, dist.all_reduce = reduce_scatter, all_reduce  # as FSDP2 and we call them
    steps = []
    for step in range(6):
        sent.clear()
        before = optimizer.replicas.exchanged_bytes
        active = [unit for unit in optimizer.units if unit.name in optimizer.active]
        for ids in micro_batches(step, 2, slice(2 * rank, 2 * rank + 2)):
            loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted = {
            "reduce-scatters": 2 * len({unit.layer for unit in active}),
            "elements": 2 * sum(unit.numel for unit in active),
            "all-reduces": 1,
            "numbers": 2 * len(active),  # as it arrived, for the scores, and as it is, for clipping
        }
        said = (optimizer.replicas.exchanged_bytes - before) / 4
        steps.append({"found": dict(sent), "wanted": wanted, "said": said})
    return steps


def test_only_layers_with_active_matrices_exchange_gradients(tmp_path):
    ranks = run_ranks(counted, tmp_path)
    assert not isinstance(ranks[0], str), ranks[0]
    for step in ranks[0]:
        assert step["found"] == step["wanted"]
        assert step["said"] == step["found"]["elements"]
        assert step["found"]["reduce-scatters"] < 2 * 4

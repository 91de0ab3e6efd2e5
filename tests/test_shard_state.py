"""``shard_state``: replicas that keep parts of the state each, beside replicas that keep all of it."""

from __future__ import annotations

import io
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

import test_replicas
from misa_engine import MISA
from misa_engine.engine.own_state.share import Share
from misa_engine.planner.plan import optimizer_bytes
from misa_engine.planner.replicas import replica_traffic
from misa_engine.trainer.mixin import MisaFactory
from ranks import run_ranks
from test_replica_failures import attempt, step
from test_replicas import CASES, COMMON, _arguments

#: 64 x 64 is 4 tiles; 64 x 80 is 5, of which two processes have 3 and 2, four 2, 2, 1 and none.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 80}
#: 40 x 40 and 40 x 50 are one tile and a part of the second; the head's 2,560 two and a half.
TAILS: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 50}

#: name -> (MISA's options, how the loop goes), beside some of the replicas'
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rest": ({"rest": "row_norm", "rest_every": 2, "rest_scores": True}, {"micro_batches": 2, "told": True}),
    "rest, update in backward": ({"rest": "sign", "update_in": "backward"}, {"dtype": torch.bfloat16}),
    "residual bits and moments kept": ({"leave_rounding": "keep", "revisit": "keep"}, {"dtype": torch.bfloat16}),
    "8 bits, offload": ({"state_dtype": "int8", "revisit": "offload"}, {"dtype": torch.bfloat16}),
}
EVERY = {**CASES, **MORE}
ALIKE = [
    *("engine", "paper", "official", "update in backward", "offload", "blocks and always", "accumulation, told"),
    *("max_grad_norm", "torch clips", "not finite in backward", "scaler", "bfloat16, float32 slots"),
    *MORE,
]


def trained(case: str, part: slice, shape: dict[str, Any], rank: int = 0, **options: Any) -> dict[str, Any]:
    """What ``test_replicas.run`` gives, and the state at the end."""
    given, how = EVERY[case]
    plain, built = test_replicas.build, []

    def build(model: nn.Module, **given: Any) -> MISA:
        built.append(MISA(model, **{**given, **options}))
        return built[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(test_replicas, "MISA", build)
        patched.setattr(test_replicas, "ROUNDS", 3)
        patched.setattr(test_replicas, "build", lambda dtype, seed: plain(dtype, seed, **shape))
        result = test_replicas.run(given, part, seed=rank, **_arguments(how))
    del result["begun"]
    return {**result, "state": snapshot(built[0].state_dict()["misa"])}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested results are not the same to the last bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys"]
        return [text for key in one for text in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: lengths"]
        return [
            text for i, pair in enumerate(zip(one, other, strict=True)) for text in differences(*pair, f"{where}.{i}")
        ]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    else:
        same = one == other or one != one and other != other
    return [] if same else [where]


def snapshot(value: Any) -> Any:
    """As torch.save and torch.load(weights_only=True) would give it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def alike(rank: int, shape: dict[str, Any], cases: list[str]) -> dict[str, Any]:
    """The same batch everywhere, so that gradients are those of one process to the last bit."""
    return {case: trained(case, slice(0, 4), shape, rank, shard_state=True) for case in cases}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(alike, tmp_path_factory.mktemp("two"), WIDE, ALIKE)


@pytest.mark.parametrize("case", ALIKE)
def test_parts_of_the_state_in_two_processes_train_bit_for_bit_as_all_of_it_in_one(two, case):
    assert isinstance(two[0], dict), two[0]
    alone = trained(case, slice(0, 4), WIDE)
    for found in two:
        assert differences(alone, found[case]) == []


def apart(rank: int, size: int, cases: list[str]) -> dict[str, Any]:
    """Another batch on every rank, with whole state and in parts: what is not the same."""
    part = slice(rank * 4 // size, (rank + 1) * 4 // size)
    found: dict[str, Any] = {}
    for case in cases:
        whole, parts = (trained(case, part, TAILS, rank, shard_state=given) for given in (False, True))
        found[case] = differences(whole, parts)
        found[f"{case}: skipped"] = parts["skipped"]
    return found


@pytest.mark.parametrize(("size", "cases"), [(2, ["accumulation", "not finite"]), (4, ["bfloat16", "max_grad_norm"])])
def test_parts_of_the_state_equal_whole_replicas_bit_for_bit_on_batches_of_their_own(tmp_path, size, cases):
    for found in run_ranks(apart, tmp_path, size, cases, size=size):
        assert isinstance(found, dict), found
        assert [found[case] for case in cases] == [[], []]
        assert size == 4 or found["not finite: skipped"] == 1


# ---- checkpoints ----

OPTIONS: dict[str, Any] = {**COMMON, "inner_steps": 4, "revisit": "offload", "rest": "none", "delta": 0.3}
SAVED_AT, STEPS = 6, 11


def go_on(rank: int, saved: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    """From the beginning, saving within the second round, or from what was saved; the same batch everywhere."""
    model = test_replicas.build(torch.bfloat16, **TAILS)
    optimizer, found = MISA(model, **{**OPTIONS, **options}), {}
    if saved is None:
        for number in range(SAVED_AT):
            step(model, optimizer, number, slice(0, 4))
        found = {"saved": snapshot({"weights": model.state_dict(), "optimizer": optimizer.state_dict()})}
    else:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        found = {"saved": {**saved, "optimizer": snapshot(optimizer.state_dict())}}
    for number in range(SAVED_AT, STEPS):
        step(model, optimizer, number, slice(0, 4))
    end = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {**found, "end": end, "active": optimizer.active, "state": snapshot(optimizer.state_dict()["misa"])}


def go_on_in_parts(rank: int, saved: dict[str, Any] | None) -> dict[str, Any]:
    return go_on(rank, saved, shard_state=True)


def test_state_of_parts_goes_on_exactly_on_any_number_of_processes(tmp_path):
    alone = go_on(0, None)
    saved = alone["saved"]
    for size, given in ((2, None), (2, saved), (4, saved)):
        for found in run_ranks(go_on_in_parts, tmp_path / f"{size}{given is None}", given, size=size):
            assert isinstance(found, dict), found
            del found["saved"]["optimizer"]["misa"]["config"], found["state"]["config"]
            saved_here = {**saved, "optimizer": {**saved["optimizer"], "misa": dict(saved["optimizer"]["misa"])}}
            del saved_here["optimizer"]["misa"]["config"]
            state = {key: value for key, value in alone["state"].items() if key != "config"}
            assert differences({**alone, "saved": saved_here, "state": state}, found) == []


# ---- bytes ----


COUNTED: dict[str, dict[str, Any]] = {
    "float32": {},
    "8 bits": {"state_dtype": "int8"},
    "backward": {"update_in": "backward"},
}


def counted(rank: int) -> dict[str, Any]:
    found = {}
    for name, options in COUNTED.items():
        model = test_replicas.build(torch.bfloat16, hidden_size=128, intermediate_size=256)
        optimizer = MISA(model, **{**COMMON, **options, "shard_state": True})
        config, dtype = optimizer.config, torch.bfloat16
        traffic = replica_traffic(optimizer.partition, config, dtype, 2)
        used = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        step(model, optimizer, 0, slice(2 * rank, 2 * rank + 2))
        found[name] = {
            "held": optimizer.arena.bytes(),
            "planned": optimizer_bytes(optimizer.partition, config, dtype, gpus=2),
            "in one": optimizer_bytes(optimizer.partition, config.altered(shard_state=False), dtype, gpus=2),
            "sent": optimizer.replicas.sent_weight_bytes == optimizer.replicas.exchanged_bytes == used,
            "at most": used <= traffic.weight_bytes == traffic.step_bytes,
        }
    return found


def test_each_process_keeps_its_share_of_the_state_and_bytes_are_the_planners(tmp_path):
    for ranks in run_ranks(counted, tmp_path):
        assert isinstance(ranks, dict), ranks
        for name, found in ranks.items():
            held, one = found["held"], found["in one"]
            assert held == found["planned"] and found["sent"] and found["at most"], (name, found)
            scales = ["moment_scales"] if name == "8 bits" else []
            for category in ("first_moment", "second_moment", "residual_bits", *scales):
                assert one[category] / 2 <= held[category] <= one[category] / 2 * 1.02, category  # whole tiles
            assert held.get("gradients") == one.get("gradients")


# ---- failures ----


def be_killed(rank: int) -> Any:
    """Rank 1 ends when it has sent some of its parts of the updated weights."""
    model = test_replicas.build(**WIDE)
    optimizer = MISA(model, **{**COMMON, "shard_state": True})
    refused = attempt(lambda: MisaFactory()(model, shard_state=True))
    send, sent = Share.send, []

    def deadly(self: Share, weight: torch.Tensor) -> Any:
        sent.append(weight)
        if rank == 1 and len(sent) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return send(self, weight)

    Share.send = deadly
    began = time.monotonic()
    said = attempt(lambda: [step(model, optimizer, number, slice(0, 2)) for number in range(2)])
    return said, time.monotonic() - began, refused


def test_when_a_rank_is_killed_while_weights_are_sent_the_others_end_with_one_line(tmp_path):
    first, second = run_ranks(be_killed, tmp_path, timeout=30)
    assert second is None
    said, seconds, refused = first
    assert said.startswith("ReplicaError: rank 0 waited in vain") and "\n" not in said
    assert seconds < 40
    assert "plain Trainer" in refused and "MisaTrainer" in refused


def edited(rank: int) -> dict[str, Any]:
    """Weights are written between two steps, on all ranks alike; ranks without a gradient, and without a batch."""
    found = {}
    for shards in (False, True):
        model = test_replicas.build(torch.bfloat16, **WIDE)
        optimizer = MISA(model, **{**COMMON, "shard_state": shards, "inner_steps": 3})
        for number in range(7):
            step(model, optimizer, number, slice(2 * rank, 2 * rank + 2), batches=0 if rank and number % 2 else 1)
            if number == 2:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.01)
        found[shards] = {**dict(model.named_parameters()), "state": snapshot(optimizer.state_dict()["misa"]["buffers"])}
    return {"differences": differences(found[False], found[True])}


def test_uneven_batches_and_edited_weights_are_those_of_whole_replicas(tmp_path):
    for found in run_ranks(edited, tmp_path):
        assert found == {"differences": []}

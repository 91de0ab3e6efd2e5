"""What can go wrong between replicas: other models, other batches, weights that drift, processes that end."""

from __future__ import annotations

import copy
import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

from misa_engine import MISA
from misa_engine.engine import exchange, replicas
from ranks import run_ranks
from test_replicas import COMMON, build, micro_batches
from training import loss_of


def attempt(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def step(model: nn.Module, optimizer: MISA, number: int, part: slice, batches: int = 1) -> None:
    for ids in micro_batches(number, batches, part):
        loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def equal(rank: int, model: nn.Module) -> bool:
    whole = torch.cat([parameter.detach().view(-1).view(torch.uint8) for parameter in model.parameters()])
    both = [torch.empty_like(whole) for _ in range(2)]
    torch.distributed.all_gather(both, whole)
    return torch.equal(*both)


# ---- at construction ----


def build_apart(rank: int) -> dict[str, str]:
    """Each rank builds something else in turn; all of it in one pair of processes."""
    other = rank == 1
    drift = {"lr": 1e-4, "delta": 0.2}
    said = {
        "option": attempt(lambda: MISA(build(), lr=1e-3 if other else 1e-4, delta=0.2)),
        "seed": attempt(lambda: MISA(build(), seed=rank, **drift)),
        "dtype": attempt(lambda: MISA(build(torch.bfloat16 if other else torch.float32), **drift)),
        "model": attempt(lambda: MISA(build(num_hidden_layers=2 + rank), **drift)),
        "refused": attempt(lambda: MISA(build(), lr=1e-4, delta=0.001 if other else 0.2)),
        "unknown": attempt(lambda: MISA(build(), **({"detla": 1} if other else drift))),
        "rest": attempt(lambda: MISA(build(), **({"rest": "none"} if other else {}), **drift)),
        "wrapped": attempt(lambda: MISA(nn.parallel.DistributedDataParallel(build()), **drift)),
    }
    torch.__version__ = f"{torch.__version__}{'x' if other else ''}"
    said["version"] = attempt(lambda: MISA(build(), **drift))
    return said


DIFFERENCES = {
    "option": "ValueError.*option lr is 0.001 on rank 1 and 0.0001 on rank 0",
    "seed": "ValueError.*option seed is 1 on rank 1 and 0 on rank 0",
    "dtype": r"ValueError.*parameter model.embed_tokens.weight is \[64, 32\] torch.bfloat16 on rank 1",
    "model": r"ValueError.*parameter model.layers.2.\S+ is \[\d+, \d+\] torch.float32 on rank 1 and absent on rank 0",
    "rest": "ValueError.*option rest is 'none' on rank 1 and 'row_norm' on rank 0",
    "wrapped": "ValueError.*MISA averages the gradients itself",
    "version": "ValueError.*version of torch is",
}


def test_what_differs_between_ranks_is_refused_by_name(tmp_path):
    both = run_ranks(build_apart, tmp_path)
    for said in both:
        assert isinstance(said, dict), said
        for case, pattern in DIFFERENCES.items():
            assert re.search(pattern, said[case]), (case, said[case])
    first, second = both
    assert "rank 1 refused its model" in first["refused"] and "0.001" in first["refused"]
    assert second["refused"].startswith("ValueError: delta")
    assert "Did you mean 'delta'" in first["unknown"] and "Did you mean 'delta'" in second["unknown"]


# ---- in training ----


def train_unevenly(rank: int) -> dict[str, Any]:
    part, told = slice(2 * rank, 2 * rank + 2), {}
    for update_in in ("step", "backward"):
        model = build()
        optimizer = MISA(model, update_in=update_in, **COMMON)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for number in range(5):  # the last batches are uneven: none at all on rank 1 in steps 1 and 3
            step(model, optimizer, number, part, batches=0 if rank and number % 2 else 1)
        told[update_in] = equal(rank, model)
        told[f"{update_in}: moved"] = sum(not torch.equal(before[n], p) for n, p in model.named_parameters())
        told[f"{update_in}: empty"] = optimizer.empty_steps

    model = build()
    optimizer = MISA(model, **COMMON)
    for number in range(4):  # two micro-batches on rank 0, one on rank 1
        step(model, optimizer, number, part, batches=2 - rank)
    told["accumulation"] = equal(rank, model)

    for update_in in ("step", "backward"):
        told |= _skip_layers(rank, part, update_in)
    return told


def _skip_layers(rank: int, part: slice, update_in: str) -> dict[str, Any]:
    """Rank 1 skips layer 1, so that its matrices have a gradient on rank 0 only; both skip layer 0 in step 1."""
    model = build()
    optimizer = MISA(model, **{**COMMON, "delta": 1.0, "inner_steps": 3, "update_in": update_in})
    layers = list(model.model.layers)
    whole, skipped = type(layers[0]).forward, []

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x if self in skipped else whole(self, x, *args, **kwargs)

    type(layers[0]).forward = forward
    before = [layer.mlp.up_proj.weight.detach().clone() for layer in layers]
    for number in range(3):
        skipped = [layers[1]] if rank else []
        skipped += [layers[0]] if number == 1 else []
        step(model, optimizer, number, part)
    type(layers[0]).forward = whole
    moved = [not torch.equal(was, layer.mlp.up_proj.weight) for was, layer in zip(before, layers, strict=True)]
    steps = dict(zip(optimizer.arena.names, optimizer._kernels.report().steps, strict=True))
    return {
        f"{update_in} skipped layers": equal(rank, model),
        f"{update_in} skipped layers: moved": all(moved),
        f"{update_in} skipped layers: steps": [steps[f"model.layers.{k}.mlp.up_proj.weight"] for k in (0, 1)],
    }


def test_uneven_batches_and_skipped_layers_leave_replicas_equal(tmp_path):
    for told in run_ranks(train_unevenly, tmp_path):
        assert isinstance(told, dict), told
        moved = {key: value for key, value in told.items() if key.endswith("moved")}
        assert told["step skipped layers: steps"] == told["backward skipped layers: steps"] == [2, 3]
        assert all(moved.values())
        assert told["step: empty"] == told["backward: empty"] == 0
        assert all(value is True for key, value in told.items() if ":" not in key), told


def count_exchanges(rank: int) -> dict[str, Any]:
    sent: list[int] = []
    began: list[int] = []
    plain = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return plain(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    model = build()
    optimizer = MISA(model, **{**COMMON, "inner_steps": 4})
    complete = exchange.Exchange._complete

    def watched(self: exchange.Exchange, rows: Any) -> None:
        began.append(self._begun)
        complete(self, rows)

    exchange.Exchange._complete = watched
    told = {}
    for name, last in (("step", (True,)), ("told", (False, False, True)), ("untold", (True, True, True))):
        sent.clear()
        began.clear()
        used = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        slots = sum(p.requires_grad for p in model.parameters())
        for place, ids in enumerate(micro_batches(0, len(last), slice(2 * rank, 2 * rank + 2))):
            optimizer.last_micro_batch = last[place]
            loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        told[name] = sum(sent) / used
        told[f"{name}: begun in backward"] = began == [slots] * sum(last)
    told["all"] = optimizer.replicas.exchanged_bytes == 5 * used
    torch.distributed.all_reduce = plain
    return told


def test_a_step_exchanges_the_active_gradients_once_and_begins_during_backward(tmp_path):
    for told in run_ranks(count_exchanges, tmp_path):
        assert told == {
            "step": 1,
            "told": 1,
            "untold": 3,
            "step: begun in backward": True,
            "told: begun in backward": True,
            "untold: begun in backward": True,
            "all": True,
        }


def drift(rank: int) -> dict[str, str]:
    part, told = slice(2 * rank, 2 * rank + 2), {}
    model = build()
    optimizer = MISA(model, **COMMON)
    step(model, optimizer, 0, part)
    saved = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, 1, part)
    optimizer.load_state_dict(saved)  # on both, and the weights are equal
    told["loaded"] = attempt(lambda: step(model, optimizer, 1, part))
    told["clipped alone"] = attempt(lambda: _clip_alone(model, optimizer, part))
    optimizer.remove()

    model = build()
    optimizer = MISA(model, **COMMON)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += rank
    replicas.CHECKSUM_ROUNDS = 2
    told["drifted"] = attempt(lambda: [step(model, optimizer, number, part) for number in range(20)])
    told["drifted at"] = str(optimizer.round)
    optimizer.remove()

    model = build()
    optimizer = MISA(model, **COMMON)
    if rank:
        optimizer.tracker._ema[0] = 50.0
        optimizer.tracker._updates[0] = 1
    told["drawn"] = attempt(lambda: [step(model, optimizer, number, part) for number in range(20)])
    optimizer.remove()

    model = build()
    optimizer = MISA(model, **COMMON)
    if rank:
        optimizer.total_steps += 1
    told["step"] = attempt(lambda: step(model, optimizer, 0, part))
    return told


def _clip_alone(model: nn.Module, optimizer: MISA, part: slice) -> None:
    optimizer.last_micro_batch = False
    loss_of(model, micro_batches(9, 1, part)[0]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    try:
        optimizer.step()
    finally:
        optimizer.last_micro_batch = True


def test_drift_is_an_error_that_names_ranks(tmp_path):
    for told in run_ranks(drift, tmp_path):
        assert isinstance(told, dict), told
        assert told["loaded"] == ""
        assert told["clipped alone"].startswith("ValueError") and "last_micro_batch" in told["clipped alone"]
        assert "lm_head.weight of ranks 1 is not that of rank 0" in told["drifted"]
        assert "draws of round" in told["drawn"] and "ranks 1 drew other matrices" in told["drawn"]
        assert told["step"].startswith("ReplicaError: the processes are at different steps: rank 0 at 0, rank 1 at 1")


def be_killed(rank: int, where: str) -> Any:
    """Rank 1 kills itself in its second step or in the switch after it; what rests moves in every step."""
    model = build()
    rest = "none" if where == "backward, no rest" else "row_norm"
    update_in = "backward" if where == "update in backward" else "step"
    optimizer = MISA(model, **{**COMMON, "rest": rest, "update_in": update_in})
    part = slice(2 * rank, 2 * rank + 2)
    step(model, optimizer, 0, part)
    if rank == 1:
        _die(model, optimizer, where)
    began = time.monotonic()
    said = attempt(lambda: [step(model, optimizer, number, part) for number in range(1, 5)])
    return said, time.monotonic() - began


def _die(model: nn.Module, optimizer: MISA, where: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "step":
        die()
    elif where == "forward":
        model.model.layers[1].register_forward_hook(die)
    elif where == "exchange":
        replicas.Average.wait = die  # it has begun its part
    elif where == "switch":
        optimizer.tracker.draw = die
    else:
        next(p for p in model.parameters() if p.requires_grad).register_hook(die)


MOMENTS = ("step", "forward", "backward", "backward, no rest", "update in backward", "exchange", "switch")


@pytest.mark.parametrize("where", MOMENTS)
def test_when_a_rank_is_killed_the_others_end_with_one_line(tmp_path, where):
    first, second = run_ranks(be_killed, tmp_path, where, timeout=30)
    assert second is None
    said, seconds = first
    assert said.startswith("ReplicaError: rank 0 waited in vain") and "resume from the last complete" in said
    assert "\n" not in said
    assert seconds < 40

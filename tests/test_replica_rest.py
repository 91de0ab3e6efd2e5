"""The rest rule on several processes: its gradients are averaged in one order, and move the same on all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from misa_engine import MISA, MisaConfig
from misa_engine.engine import exchange, rest
from misa_engine.planner.replicas import replica_traffic
from misa_engine.planner.resting import resting_elements
from ranks import run_ranks
from test_replica_failures import attempt, equal, step
from test_replicas import COMMON, build, micro_batches
from training import loss_of

#: lr 1e-4 and a rest rate of 0.3 in 8 steps: weights move by about 2.4e-4, so 1e-6 is 0.4% of the way.
RULES: dict[str, dict[str, Any]] = {
    "row_norm": {"rest": "row_norm"},
    "sinkhorn": {"rest": "sinkhorn"},
    "sgd": {"rest": "sgd"},
    "sign": {"rest": "sign"},
    "in backward": {"rest": "row_norm", "update_in": "backward"},
    "every second step, all, scores": {
        "rest": "row_norm",
        "rest_every": 2,
        "rest_outside": True,
        "rest_scores": True,
        "cold_start": "probe",
    },
    "above": {"rest": "row_norm", "rest_scope": "above"},
}
STEPS = 8


def train(options: dict[str, Any], part: slice, *, nan: int | None = None, micro: int = 1) -> dict[str, Any]:
    model = build()
    optimizer = MISA(model, **{**COMMON, **options})
    draws, before = [optimizer.active], [p.detach().clone() for p in model.parameters()]
    optimizer.on_switch(lambda event: draws.append(event.active))
    stood_still = True
    for number in range(STEPS):
        held = [p.detach().clone() for p in model.parameters()]
        for place, ids in enumerate(micro_batches(number, micro, part)):
            optimizer.last_micro_batch = place + 1 == micro
            loss = loss_of(model, ids) / micro
            (loss * float("nan") if number == nan and part.stop == 4 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == nan:
            stood_still = all(map(torch.equal, held, model.parameters()))
    moved = sum(not torch.equal(was, p) for was, p in zip(before, model.parameters(), strict=True))
    return {
        "draws": draws,
        "moved": moved,
        "matrices": sum(p.ndim > 1 for p in model.parameters()),
        "stood still": stood_still,
        "scores": optimizer.scores,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


def by_rules(rank: int) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    told = {name: train(options, part) for name, options in RULES.items()}
    told["not finite"] = train(RULES["row_norm"], part, nan=3)
    told["not finite, in backward"] = train(RULES["in backward"], part, nan=3)
    told["accumulation"] = train(RULES["row_norm"], part, micro=2)
    return told


def in_fours(rank: int) -> dict[str, Any]:
    part = slice(rank, rank + 1)
    return {name: train(RULES[name], part) for name in ("row_norm", "sign", "in backward")}


HOW = {"not finite": {"nan": 3}, "not finite, in backward": {"nan": 3}, "accumulation": {"micro": 2}}


def check(ranks: list[dict[str, Any]], case: str) -> None:
    options = RULES["in backward" if "in backward" in case else case if case in RULES else "row_norm"]
    alone = train(options, slice(0, 4), **HOW.get(case, {}))
    first = ranks[0]
    for other in ranks[1:]:
        assert first["draws"] == other["draws"] and first["scores"] == other["scores"]
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
    assert first["draws"] == alone["draws"] and len(first["draws"]) > 4
    assert first["moved"] > (first["matrices"] // 2 if case == "above" else first["matrices"] - 3)
    assert first["stood still"]
    apart = torch.cat([(w - alone["weights"][name]).abs().view(-1) for name, w in first["weights"].items()])
    if case == "sign":
        # a mean within rounding of zero has either sign: such an element is up to 2·rate a step apart, and few are
        assert (apart > 1e-6).float().mean() < 5e-3 and apart.max() <= 2 * STEPS * 1e-4 * 0.3 + 1e-5
    else:
        assert apart.max() <= 1e-6


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(by_rules, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [*RULES, *HOW])
def test_what_rests_moves_by_the_mean_of_two_replicas_as_in_one_process(replicas, case):
    assert not isinstance(replicas[0], str), replicas[0]
    check([rank[case] for rank in replicas], case)


def test_what_rests_moves_by_the_mean_of_four_replicas_as_in_one_process(tmp_path):
    four = run_ranks(in_fours, tmp_path, size=4)
    assert not isinstance(four[0], str), four[0]
    for case in four[0]:
        check([rank[case] for rank in four], case)


# ---- ranks that do not do the same ----


def unevenly(rank: int) -> dict[str, Any]:
    part, told = slice(2 * rank, 2 * rank + 2), {}
    for update_in in ("step", "backward"):
        options = {**COMMON, "rest": "row_norm", "update_in": update_in}
        model = build()
        optimizer = MISA(model, **options)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for number in range(5):  # no batch at all on rank 1 in steps 1 and 3
            step(model, optimizer, number, part, batches=0 if rank and number % 2 else 1)
        told[f"{update_in}, last batches"] = equal(rank, model)
        told[f"{update_in}, moved"] = all(
            not torch.equal(before[n], model.get_parameter(n)) for n in optimizer._rest._index
        )
        told[f"{update_in}, skipped"] = _skip(rank, part, options)
    model = build()
    optimizer = MISA(model, **{**COMMON, "rest": "row_norm"})
    for number in range(4):  # two micro-batches on rank 0, one on rank 1
        step(model, optimizer, number, part, batches=2 - rank)
    told["accumulation"] = equal(rank, model)
    return told


def _skip(rank: int, part: slice, options: dict[str, Any]) -> bool:
    """Each rank skips another layer, and rank 1 all of them once; MOST_WAITING is less than a layer has matrices."""
    model = build(num_hidden_layers=4)
    optimizer = MISA(model, **options)
    layers = list(model.model.layers)
    whole, skipped = type(layers[0]).forward, []

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x if self in skipped else whole(self, x, *args, **kwargs)

    type(layers[0]).forward = forward
    exchange.MOST_WAITING = 3
    for number in range(6):
        skipped = layers if rank and number == 2 else [layers[(rank + number) % 4]]
        step(model, optimizer, number, part)
    type(layers[0]).forward, exchange.MOST_WAITING = whole, 8
    return equal(rank, model)


def test_uneven_batches_and_skipped_layers_leave_what_rests_equal(tmp_path):
    for told in run_ranks(unevenly, tmp_path):
        assert isinstance(told, dict), told
        assert all(told.values()), told


def reversed_order(rank: int) -> dict[str, str]:
    """A model whose layers run in the reverse of their order: gradients come before their turn, more than may wait."""
    model = build(num_hidden_layers=4)
    run = list(model.model.layers)
    optimizer = MISA(model, **{**COMMON, "rest": "row_norm"})
    del model.model._modules["layers"]
    object.__setattr__(model.model, "layers", run[::-1])
    return {"said": attempt(lambda: step(model, optimizer, 0, slice(2 * rank, 2 * rank + 2)))}


def test_a_model_that_does_not_run_in_its_order_is_an_error_and_no_hang(tmp_path):
    for told in run_ranks(reversed_order, tmp_path):
        assert isinstance(told, dict), told
        assert "rest='none'" in told["said"] or "inplace operation" in told["said"], told


# ---- bytes and memory ----


def count(rank: int) -> dict[str, Any]:
    part, told = slice(2 * rank, 2 * rank + 2), {}
    for name, options in {"every step": {}, "every second step": {"rest_every": 2}, "none": {"rest": "none"}}.items():
        config = MisaConfig(**{**COMMON, "rest": "row_norm", "inner_steps": 4, **options})
        model = build()
        optimizer = MISA(model, config)
        drawn = sum(model.get_parameter(n).nbytes for n in optimizer.arena.names)
        sent, most = [], 0
        went_on = exchange.Exchange._finish_one

        def watched(self: exchange.Exchange, go_on: Any = went_on) -> None:
            nonlocal most
            most = max(most, sum(isinstance(item, str) for item, *_ in self._in_flight))
            go_on(self)

        exchange.Exchange._finish_one = watched
        for number in range(4):
            before = optimizer.replicas.exchanged_bytes
            for place, ids in enumerate(micro_batches(number, 2, part)):
                optimizer.last_micro_batch = place == 1
                loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            sent.append(optimizer.replicas.exchanged_bytes - before)
        exchange.Exchange._finish_one = went_on
        resting = resting_elements(model, optimizer.partition, config)
        planned = replica_traffic(optimizer.partition, config, torch.float32, 2, resting)
        told[name] = {
            "steps": [value - drawn for value in sent],
            "rests": 4 * resting - drawn if resting else 0,
            "planned": [planned.step_bytes, planned.round_bytes],
            "unused": 4 * optimizer.budget - drawn,
            "sent": [max(sent), sum(sent)],
            "most": most,
        }
    return told


def test_bytes_exchanged_are_the_planners_number_and_few_are_in_flight(tmp_path):
    for told in run_ranks(count, tmp_path):
        assert isinstance(told, dict), told
        rests = told["every step"]["rests"]
        assert rests > 0
        assert told["every step"]["steps"] == [rests] * 4
        assert told["every second step"]["steps"] == [0, rests, 0, rests]
        assert told["none"]["steps"] == [0] * 4
        for name, found in told.items():
            # the plan is for a full budget; what the draw leaves of it rests instead
            over = [0, 0] if name == "every step" else [0, 2] if name == "every second step" else [1, 4]
            expected = [
                planned - times * found["unused"] for planned, times in zip(found["planned"], over, strict=True)
            ]
            assert found["sent"] == expected, (name, found)
            assert found["most"] <= exchange.RESTING_IN_FLIGHT + 1


# ---- a state ----


def resume(rank: int) -> dict[str, Any]:
    part, options = slice(2 * rank, 2 * rank + 2), {**COMMON, "rest": "row_norm", "rest_every": 2, "rest_scores": True}
    model = build()
    optimizer = MISA(model, **options)
    for number in range(3):
        step(model, optimizer, number, part)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for number in range(3, 7):
        step(model, optimizer, number, part)
    again = build(seed=3)
    again.load_state_dict(saved[0])
    other = MISA(again, **options)
    other.load_state_dict(saved[1])
    for number in range(3, 7):
        step(again, other, number, part)
    return {"same": all(map(torch.equal, model.parameters(), again.parameters())), "equal": equal(rank, again)}


def test_a_state_resumes_exactly_where_what_rests_moves(tmp_path):
    for told in run_ranks(resume, tmp_path):
        assert told == {"same": True, "equal": True}, told


def looked(rank: int) -> list[int]:
    """After how many steps the modules of the model were walked through, for compiled ones."""
    model, walks = build(), []
    plain = rest.compiled_modules
    optimizer = None

    def walk(model: nn.Module) -> Any:
        walks.append(0 if optimizer is None else optimizer.total_steps)
        return plain(model)

    rest.compiled_modules = walk
    optimizer = MISA(model, **{**COMMON, "rest": "row_norm", "inner_steps": 3})
    for number in range(5):
        step(model, optimizer, number, slice(0, 2))
    return walks


def test_compiled_modules_are_looked_for_once_a_round(tmp_path):
    assert run_ranks(looked, tmp_path) == [[0, 3], [0, 3]]

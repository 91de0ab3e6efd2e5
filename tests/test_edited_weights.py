"""Weights that are written in place behind the optimizer's back leave no stale residual bits."""

import copy

import pytest
import torch

from misa_engine import MISA
from training import batches, loss_of, tiny, train

OPTIONS = {"delta": 0.3, "inner_steps": 4, "cold_start": "none", "lr": 1e-2}


def bits(optimizer):
    """Whether any residual bit is set, of active and of kept parameters."""
    state = optimizer.state_dict()["misa"]
    kept = any(
        bool(buffers["residual_bits"].any()) for _, buffers in state["host"].values() if "residual_bits" in buffers
    )
    return bool(state["buffers"]["residual_bits"].any()), kept


@pytest.mark.parametrize("update_in", ["step", "backward"])
@pytest.mark.parametrize("steps", [2, 6])
def test_residual_bits_of_replaced_weights_are_dropped(steps, update_in):
    model, source = tiny(dtype=torch.bfloat16), tiny(dtype=torch.bfloat16).state_dict()
    optimizer = MISA(model, rest="none", leave_rounding="keep", update_in=update_in, **OPTIONS)
    train(model, optimizer, batches(), steps)
    assert bits(optimizer) == (True, steps > 4)
    model.load_state_dict(source)
    assert bits(optimizer) == (False, False)
    train(model, optimizer, batches(), 1)
    assert bits(optimizer)[0]


@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_update_after_replaced_weights_starts_from_them(update_in):
    def run(replace):
        model = tiny(dtype=torch.bfloat16)
        source = copy.deepcopy(model.state_dict())
        optimizer = MISA(model, update_in=update_in, preset="paper", **OPTIONS)
        if replace:
            train(model, optimizer, batches(seed=3), 1)
            for name in optimizer.arena.moments().values():
                name.zero_()
            optimizer.arena.table.slot_step.zero_()
            model.load_state_dict(source)
        loss_of(model, next(batches())).backward()
        optimizer.step()
        return model, optimizer

    (a, first), (b, second) = run(True), run(False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(first.arena.residual, second.arena.residual)


@pytest.mark.parametrize("weights_first", [True, False])
def test_resume_is_exact_in_either_order_of_loading(weights_first):
    whole = tiny(dtype=torch.bfloat16)
    optimizer = MISA(whole, rest="none", leave_rounding="keep", **OPTIONS)
    train(whole, optimizer, batches(), 6)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, batches(seed=1), 6)
    model = tiny(dtype=torch.bfloat16)
    other = MISA(model, rest="none", leave_rounding="keep", **OPTIONS)
    train(model, other, batches(seed=9), 3)
    loads = [lambda: model.load_state_dict(saved[0]), lambda: other.load_state_dict(saved[1])]
    for load in loads if weights_first else reversed(loads):
        load()
    train(model, other, batches(seed=1), 6)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))

"""Phases of the engine as a benchmark's clock and torch.profiler see them."""

from contextlib import contextmanager

import pytest
import torch

from misa_engine import MISA
from misa_engine.engine.marks import PHASES, PREFIX, observed
from training import batches, tiny, train


@pytest.mark.parametrize("rest", ["none", "sign"])
@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_every_phase_is_seen_where_it_belongs(update_in, rest):
    model = tiny("llama", torch.float32)
    optimizer = MISA(model, delta=0.3, inner_steps=2, cold_start="none", update_in=update_in, rest=rest)
    nesting, stack = set(), []

    @contextmanager
    def around(name):
        stack.append(name)
        nesting.add(tuple(stack))
        yield
        assert stack.pop() == name

    with observed(around):
        train(model, optimizer, batches(), 2)
    assert {name for names in nesting for name in names} <= set(PHASES)
    step = {("update",), ("update", "clip/norm"), ("update", "switch")}
    step |= {("update", "switch", "switch (sampler)"), ("update", "switch", "switch (host copy)")}
    backward = {
        "step": {("hooks",), ("backward dW",), ("backward dW", "hooks")},
        "backward": {("hooks",), ("hooks", "update"), ("hooks", "update", "clip/norm")},
    }
    assert nesting == step | backward[update_in] | ({("resting",)} if rest == "sign" else set())
    nesting.clear()
    train(model, optimizer, batches(), 1)
    assert not nesting, "the observer stays after its block"


def test_profiler_shows_the_phases_as_ranges():
    model = tiny("llama", torch.float32)
    optimizer = MISA(model, delta=0.3, inner_steps=1, rest="sign")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(model, optimizer, batches(), 1)
    ranges = {event.key.removeprefix(PREFIX) for event in profiler.key_averages() if event.key.startswith(PREFIX)}
    assert ranges == set(PHASES)

"""load_state_dict of a damaged state refuses before anything has changed."""

import copy
import math

import pytest
import torch

from misa_engine import MISA
from training import batches, tiny, train

OPTIONS = {"delta": 0.3, "inner_steps": 3, "revisit": "offload", "leave_rounding": "keep", "rest": "none", "lr": 1e-2}


@pytest.fixture(scope="module")
def state():
    model = tiny(dtype=torch.bfloat16)
    optimizer = MISA(model, **OPTIONS)
    train(model, optimizer, batches(), 40)
    return copy.deepcopy(optimizer.state_dict())


def put(*path, value):
    def damage(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return damage


def drop(*path):
    def damage(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return damage


KEYS = ("version", "config", "units", "always", "total", "dtype", "tracker", "inner_step", "total_steps", "slots")
DAMAGES = {
    **{f"no {key}": drop("misa", key) for key in (*KEYS, "skipped_steps", "buffers", "round", "host")},
    "no misa": drop("misa"),
    "misa is a list": put("misa", value=[1]),
    "no groups": drop("param_groups"),
    "group without lr": drop("param_groups", 0, "lr"),
    "lr is nan": put("param_groups", 0, "lr", value=math.nan),
    "fewer parameters": put("param_groups", 0, "params", value=lambda found: found[1:]),
    "no generator": drop("misa", "tracker", "generator"),
    "short generator": put("misa", "tracker", "generator", value=lambda found: found[:8]),
    "short visits": put("misa", "tracker", "visits", value=lambda found: found[:-1]),
    "active out of range": put("misa", "tracker", "active", value=(999,)),
    "active units of text": put("misa", "tracker", "active", value=("a",)),
    "round length": put("misa", "tracker", "round_length", value=77),
    "negative clock": put("misa", "total_steps", value=-1),
    "step beyond the round": put("misa", "inner_step", value=3),
    "clock of text": put("misa", "inner_step", value="x"),
    "unknown slot": put("misa", "slots", 0, 0, value="nobody"),
    "slot twice": put("misa", "slots", value=lambda found: [*found, found[-1]]),
    "slots overlap": put("misa", "slots", -1, 1, value=0),
    "slot inside a block": put("misa", "slots", -1, 1, value=lambda found: found + 1),
    "slot beyond the arena": put("misa", "slots", -1, 1, value=lambda found: found + (1 << 40)),
    "no moment": drop("misa", "buffers", "first_moment"),
    "short moment": put("misa", "buffers", "second_moment", value=lambda found: found[:-1]),
    "moment of another dtype": put("misa", "buffers", "first_moment", value=lambda found: found.double()),
    "buffer is a number": put("misa", "buffers", "residual_bits", value=3),
    "short round": put("misa", "round", "tile_sumsq", value=lambda found: found[1:]),
    "host: unknown name": put("misa", "host", value=lambda found: {**found, "nobody": [1, {}]}),
    "host: short buffer": put(
        "misa",
        "host",
        value=lambda found: {name: [1, {c: t[1:] for c, t in b.items()}] for name, (_, b) in found.items()},
    ),
}


def everything(optimizer, model):
    misa = copy.deepcopy(optimizer.state_dict())
    return [misa, [p.requires_grad for p in model.parameters()], [p.detach().clone() for p in model.parameters()]]


def same(a, b):
    leaves_a, tree_a = torch.utils._pytree.tree_flatten(a)
    leaves_b, tree_b = torch.utils._pytree.tree_flatten(b)
    return tree_a == tree_b and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves_a, leaves_b, strict=True)
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_and_nothing_changes(damage, state):
    model = tiny(dtype=torch.bfloat16)
    optimizer = MISA(model, **OPTIONS, seed=0)
    train(model, optimizer, batches(seed=5), 4)
    before, broken = everything(optimizer, model), copy.deepcopy(state)
    DAMAGES[damage](broken)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(broken)
    assert same(before, everything(optimizer, model))
    optimizer.load_state_dict(state)
    assert same(optimizer.state_dict()["misa"], state["misa"])

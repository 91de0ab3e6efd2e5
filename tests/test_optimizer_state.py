"""state_dict and load_state_dict: exact continuation, and what is refused."""

import copy
import io

import pytest
import torch

from misa_engine import MISA
from misa_engine.method.config import PRESETS
from training import batches, tiny, train, weights

DELTA = 0.3  # the tiny models' largest matrix is 8% of the whole


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 5, 9, 12])
def test_resume_anywhere_in_a_round_is_bitwise_exact(preset, dtype, stop):
    options = {"lr": 1e-2, "delta": DELTA, "inner_steps": 4, "preset": preset, "always_train": ("norm",), "seed": 3}

    def build():
        model = tiny(dtype=dtype)
        return model, MISA(model, **options)

    model, optimizer = build()
    data = batches()
    train(model, optimizer, data, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    rest = [next(data) for _ in range(25 - stop)]
    train(model, optimizer, iter(rest), len(rest))

    again, resumed = build()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, iter(rest), len(rest))
    first, second = weights(model), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.scores == optimizer.scores and resumed.probabilities == optimizer.probabilities
    assert resumed.active == optimizer.active and resumed.round == optimizer.round
    assert resumed.inner_step == optimizer.inner_step and resumed.total_steps == optimizer.total_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["engine", "paper"])
def test_resume_with_8_bit_moments_is_bitwise_exact(preset, dtype):
    options = {
        "lr": 1e-2,
        "delta": DELTA,
        "inner_steps": 4,
        "preset": preset,
        "state_dtype": "int8",
        "max_grad_norm": 1.0,
    }
    whole, parts = tiny(dtype=dtype), tiny(dtype=dtype)
    train(whole, MISA(whole, **options), batches(), 25)
    first, data = MISA(parts, **options), batches()
    train(parts, first, data, 18)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.remove()
    file.seek(0)
    second = MISA(parts, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(parts, second, data, 7)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_loading_leaves_only_the_saved_active_set_trainable():
    model = tiny()
    optimizer = MISA(model, rest="none", delta=DELTA, inner_steps=2, seed=1)
    train(model, optimizer, batches(), 9)
    saved = copy.deepcopy(optimizer.state_dict())
    other = tiny()
    resumed = MISA(other, rest="none", delta=DELTA, inner_steps=2, seed=1)
    resumed.load_state_dict(saved)
    assert {name for name, p in other.named_parameters() if p.requires_grad} == set(optimizer.active)


@pytest.mark.parametrize(
    ("options", "model_options", "word"),
    [
        ({"delta": 0.5}, {}, "delta: 0.3 in the checkpoint, 0.5 here"),
        ({"granularity": "block", "delta": 0.3}, {}, "granularity"),
        ({"preset": "paper"}, {}, "preset: 'engine' in the checkpoint, 'paper' here"),
        ({"inner_steps": 7}, {}, "inner_steps"),
        ({}, {"num_hidden_layers": 3}, "parameters of the model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(options, model_options, word):
    model = tiny()
    optimizer = MISA(model, delta=0.3, inner_steps=2)
    train(model, optimizer, batches(), 3)
    saved = copy.deepcopy(optimizer.state_dict())
    other_model = tiny(**model_options)
    other = MISA(other_model, **{"delta": 0.3, "inner_steps": 2, **options})
    active = other.active
    with pytest.raises(ValueError, match=word):
        other.load_state_dict(saved)
    assert other.active == active


def test_the_state_of_another_optimizer_is_refused():
    model = tiny()
    optimizer = MISA(model, delta=DELTA)
    with pytest.raises(ValueError, match="not written by MISA"):
        optimizer.load_state_dict(torch.optim.AdamW(tiny().parameters()).state_dict())


def test_a_state_that_refers_to_the_live_buffers_is_refused_after_training_went_on():
    model = tiny()
    optimizer = MISA(model, delta=DELTA)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    train(model, optimizer, batches(), 1)
    with pytest.raises(ValueError, match="deepcopy"):
        optimizer.load_state_dict(state)


def test_learning_rate_travels_in_the_parameter_groups():
    optimizer = MISA(tiny(), lr=1e-2, delta=DELTA)
    optimizer.param_groups[0]["lr"] = 5e-3
    other = MISA(tiny(), lr=1e-2, delta=DELTA)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 5e-3

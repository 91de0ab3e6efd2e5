"""What a caller does to gradients between backward and step: never a non-finite update, never distorted scores."""

import math

import pytest
import torch
from torch import nn

from misa_engine import MISA
from training import batches, loss_of, tiny, weights

OPTIONS = {"delta": 0.3, "inner_steps": 1, "preset": "paper", "lr": 1e-2}


def one_step(edit, dtype=torch.float32, **options):
    """Scores after one step in which ``edit(model, optimizer)`` came between backward and step, and weights."""
    model = tiny("llama", dtype)
    optimizer = MISA(model, **{**OPTIONS, **options})
    loss_of(model, next(batches())).backward()
    edit(model, optimizer)
    optimizer.step()
    return optimizer, weights(model)


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


POISON = {
    "data.div_(0)": lambda g: g.data.div_(0.0),
    "data[...] = nan": lambda g: g.data.view(-1)[-1:].fill_(math.nan),
    "div_(0)": lambda g: g.div_(0.0),
    "storage": lambda g: torch.tensor([], dtype=g.dtype).set_(g.untyped_storage()).fill_(math.inf),
}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("how", POISON)
def test_non_finite_gradient_changes_nothing_however_it_came_about(how, early, clip):
    model = tiny("llama", torch.bfloat16)
    optimizer = MISA(model, rest="none", delta=0.3, inner_steps=2, cold_start="none", lr=1e-2, max_grad_norm=clip)
    before = weights(model)
    loss_of(model, next(batches())).backward()
    if early:
        optimizer.clip_grad_norm_(1.0)
    POISON[how](gradients(model)[0])
    optimizer.step()
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    optimizer.zero_grad()
    loss_of(model, next(batches())).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(map(math.isfinite, optimizer.scores.values()))


EDITS = {
    "nothing": lambda model, optimizer: None,
    "data.mul_": lambda model, optimizer: [g.data.mul_(1e-3) for g in gradients(model)],
    "mul_": lambda model, optimizer: [g.mul_(1e-3) for g in gradients(model)],
    "torch clips": lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "torch clips by value": lambda model, optimizer: nn.utils.clip_grad_value_(model.parameters(), 1e-4),
    "the optimizer clips": lambda model, optimizer: optimizer.clip_grad_norm_(1e-3),
    "both clip": lambda model, optimizer: [
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        optimizer.clip_grad_norm_(1e-4),
    ],
    "clipped copies": lambda model, optimizer: [g.data.copy_(1e-3 * g.clone()) for g in gradients(model)],
}


@pytest.mark.parametrize("edit", EDITS)
def test_scores_are_of_raw_gradients_whoever_changes_them(edit):
    raw, _ = one_step(EDITS["nothing"])
    optimizer, _ = one_step(EDITS[edit])
    assert optimizer.scores == raw.scores and max(raw.scores.values()) > 0


def test_scores_are_those_that_clip_saw_where_arrival_is_not_measured():
    def edit(model, optimizer):
        optimizer.clip_grad_norm_(1e-3)
        [g.data.mul_(1e-3) for g in gradients(model)]

    def run(edit):
        model = tiny()
        optimizer = MISA(model, **OPTIONS)
        optimizer.measure_on_arrival = False
        loss_of(model, next(batches())).backward()
        edit(model, optimizer)
        optimizer.step()
        return optimizer.scores

    assert run(edit) == run(EDITS["nothing"]) == one_step(EDITS["nothing"])[0].scores


def test_update_uses_the_edited_gradient_and_its_norm():
    """Adam's first step is ±lr whatever the scale; the norm that clips is the one of what is used."""
    optimizer, _ = one_step(EDITS["data.mul_"])
    raw, _ = one_step(EDITS["nothing"])
    assert float(optimizer.grad_norm) == pytest.approx(1e-3 * float(raw.grad_norm), rel=1e-4)


def test_gradient_that_one_parameter_was_given_by_hand_is_scored_as_given():
    model = tiny()
    optimizer = MISA(model, **{**OPTIONS, "score_beta": 0.0})
    given, *others = optimizer.active
    loss_of(model, next(batches())).backward(inputs=[model.get_parameter(name) for name in others])
    model.get_parameter(given).grad = torch.full_like(model.get_parameter(given), 2.0)
    for name in others:
        model.get_parameter(name).grad.data.mul_(1e-3)
    optimizer.step()
    raw, _ = one_step(EDITS["nothing"], score_beta=0.0)
    assert optimizer.scores[given] == 4.0
    assert all(optimizer.scores[name] == raw.scores[name] for name in others) and others


SCALED = {
    "step alone": lambda scaler, model, optimizer: None,
    "unscale_": lambda scaler, model, optimizer: scaler.unscale_(optimizer),
    "unscale_ and the optimizer clips": lambda scaler, model, optimizer: [
        scaler.unscale_(optimizer),
        optimizer.clip_grad_norm_(1e-3),
    ],
}


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("way", SCALED)
def test_scores_and_weights_under_a_grad_scaler_are_those_without(way, measured):
    def run(scale):
        model = tiny()
        optimizer = MISA(model, **OPTIONS)
        optimizer.measure_on_arrival = measured
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scale)
        data = batches()
        for _ in range(6):
            scaler.scale(loss_of(model, next(data))).backward()
            if scale:
                SCALED[way](scaler, model, optimizer)
            elif "clips" in way:
                optimizer.clip_grad_norm_(1e-3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert not scale or scaler.get_scale() == 8192.0
        return optimizer, weights(model)

    (scaled, a), (plain, b) = run(True), run(False)
    assert scaled.active == plain.active and scaled.scores == pytest.approx(plain.scores, rel=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    assert not hasattr(scaled, "grad_scale") and not hasattr(scaled, "found_inf")


def test_scaled_overflow_skips_the_step_and_shrinks_the_scale():
    model = tiny()
    optimizer = MISA(model, **{**OPTIONS, "inner_steps": 2, "cold_start": "none"})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = weights(model)
    for _ in range(2):
        scaler.scale(loss_of(model, next(batches()))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 2 and scaler.get_scale() == 2.0**125
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())


def test_torch_clipping_of_unscaled_gradients_is_refused_with_the_remedy():
    model = tiny()
    optimizer = MISA(model, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu")
    before = weights(model)
    scaler.scale(loss_of(model, next(batches()))).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match=r"Clip with optimizer.clip_grad_norm_"):
        scaler.step(optimizer)
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())


def test_grad_scaler_with_updates_in_backward_is_refused():
    model = tiny()
    optimizer = MISA(model, **OPTIONS, update_in="backward")
    optimizer.last_micro_batch = False
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, next(batches()))).backward()
    with pytest.raises(ValueError, match="update_in='step'"):
        scaler.step(optimizer)

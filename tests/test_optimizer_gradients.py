"""What the optimizer does with gradients: views, accumulation, clipping, non-finite and missing ones."""

import copy
import math

import pytest
import torch
from torch import nn

from misa_engine import MISA
from training import batches, changed, loss_of, tiny, train, weights

DELTA = 0.3  # the tiny models' largest matrix is 8% of the whole


def test_a_gradient_that_arrives_after_clipping_is_measured_again():
    def run(clip_early):
        model = tiny()
        optimizer = MISA(model, lr=1e-2, delta=DELTA, cold_start="none")
        data = batches()
        loss_of(model, next(data)).backward()
        if clip_early:
            optimizer.clip_grad_norm_(0.01)
        loss_of(model, next(data)).backward()
        if not clip_early:
            optimizer.clip_grad_norm_(0.01)
        optimizer.step()
        return weights(model), float(optimizer.grad_norm)

    (early, norm_early), (late, norm_late) = run(True), run(False)
    assert norm_early == norm_late
    assert all(torch.equal(early[name], late[name]) for name in early)


def test_gradients_are_views_of_the_arena_in_every_zero_grad_mode():
    model = tiny()
    optimizer = MISA(model, rest="none", delta=DELTA)
    low = optimizer.arena.grad.data_ptr()
    high = low + optimizer.arena.grad.nbytes
    clears = [
        lambda: optimizer.zero_grad(),
        lambda: optimizer.zero_grad(set_to_none=False),
        lambda: model.zero_grad(),
        lambda: model.zero_grad(set_to_none=False),
    ]
    gradients = []
    for clear in clears:
        clear()
        loss_of(model, next(batches())).backward()
        for name in optimizer.active:
            assert low <= model.get_parameter(name).grad.data_ptr() < high
        gradients.append([model.get_parameter(name).grad.clone() for name in optimizer.active])
    for others in gradients[1:]:
        assert all(torch.equal(first, other) for first, other in zip(gradients[0], others, strict=True))


def test_every_zero_grad_mode_gives_the_same_weights():
    def run(clear):
        model = tiny()
        optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=2)
        data = batches()
        for _ in range(7):
            loss_of(model, next(data)).backward()
            optimizer.step()
            clear(model, optimizer)
        return weights(model)

    first = run(lambda model, optimizer: optimizer.zero_grad())
    for clear in (
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: model.zero_grad(),
        lambda model, optimizer: model.zero_grad(set_to_none=False),
    ):
        other = run(clear)
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_accumulation_equals_the_big_batch():
    def run(parts):
        model = tiny(dtype=torch.float32)
        optimizer = MISA(model, lr=1e-3, delta=DELTA, inner_steps=3, preset="paper", eps=1e-3)
        data = batches(size=4)
        for _ in range(6):
            ids = next(data)
            for part in ids.chunk(parts):
                (loss_of(model, part) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model), optimizer.scores

    (big, big_scores), (small, small_scores) = run(1), run(4)
    for name in big:  # eps=1e-3 keeps Adam from amplifying rounding; ~10x the worst difference seen (2e-8)
        torch.testing.assert_close(small[name], big[name], rtol=0, atol=2e-7)
    assert small_scores == pytest.approx(big_scores, rel=1e-4)


def test_torch_clipping_is_right_and_leaves_the_scores_raw():
    def run(clip):
        model = tiny()
        optimizer = MISA(model, lr=1e-3, delta=DELTA, inner_steps=1, preset="paper")
        loss_of(model, next(batches())).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        true_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        norm = clip(model, optimizer)
        if norm is not None:
            assert float(norm) == pytest.approx(true_norm, rel=1e-6)
        optimizer.step()
        return weights(model), optimizer.scores

    limit = 1e-3
    plain, raw = run(lambda model, optimizer: None)
    outside, outside_scores = run(lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), limit))
    inside, inside_scores = run(lambda _, optimizer: optimizer.clip_grad_norm_(limit))
    assert outside_scores == inside_scores == raw and max(raw.values()) > 0
    for name in plain:  # the coefficient is rounded once more when torch multiplies in place: 1 ulp of the update
        torch.testing.assert_close(inside[name], outside[name], rtol=0, atol=1e-7)
    assert any(not torch.equal(plain[name], inside[name]) for name in plain)


def test_max_grad_norm_option_equals_clipping_by_hand():
    def run(option, by_hand):
        model = tiny()
        optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=2, max_grad_norm=option)
        data = batches()
        for _ in range(5):
            loss_of(model, next(data)).backward()
            if by_hand:
                optimizer.clip_grad_norm_(0.01)
            optimizer.step()
            optimizer.zero_grad()
        return weights(model), optimizer.scores

    (a, scores_a), (b, scores_b) = run(0.01, False), run(None, True)
    assert all(torch.equal(a[name], b[name]) for name in a) and scores_a == scores_b


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("when", range(5))
def test_a_non_finite_gradient_changes_nothing_but_the_counter(when, bad):
    model = tiny(dtype=torch.bfloat16)
    optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=6, cold_start="none")
    data = batches()
    for step in range(6):
        loss_of(model, next(data)).backward()
        if step == when:
            model.get_parameter(optimizer.active[-1]).grad.view(-1)[3] = bad
            before = weights(model)
            state = copy.deepcopy(optimizer.state_dict()["misa"])
            optimizer.step()
            after = optimizer.state_dict()["misa"]
            assert changed(before, model) == set()
            for name, buffer in state["buffers"].items():
                assert torch.equal(buffer, after["buffers"][name]), name
            for name, tensor in state["round"].items():
                expected = tensor + 1 if name == "skipped_on_device" else tensor
                assert torch.equal(expected, after["round"][name]), name
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    assert all(math.isfinite(score) for score in optimizer.scores.values())


def test_a_round_of_skipped_steps_leaves_the_scores_alone():
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=2, preset="paper")
    train(model, optimizer, batches(), 2)
    scores = optimizer.scores
    for _ in range(2):
        loss_of(model, next(batches())).backward()
        model.get_parameter(optimizer.active[0]).grad.fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.scores == scores and optimizer.skipped_steps == 2


def test_a_parameter_without_gradient_is_left_alone():
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=3, cold_start="none")
    loss_of(model, next(batches())).backward()
    absent = optimizer.active[0]
    model.get_parameter(absent).grad = None
    before = weights(model)
    optimizer.step()
    assert changed(before, model) == set(optimizer.active) - {absent}


def test_a_gradient_put_there_by_the_caller_is_used():
    def run(replace):
        model = tiny()
        optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=5)
        loss_of(model, next(batches())).backward()
        for name in optimizer.active:
            parameter = model.get_parameter(name)
            if replace:
                parameter.grad = parameter.grad.clone()
        optimizer.step()
        return weights(model)

    a, b = run(False), run(True)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_closure_is_evaluated_with_gradients():
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=DELTA)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, next(batches()))
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0

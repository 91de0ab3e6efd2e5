"""rest_scores: what rests is measured too; and what the options of the rest rule refuse."""

import copy

import pytest

from misa_engine import MisaConfig
from resting import backward, build
from training import batches, tiny, train


def test_gradients_of_what_rests_enter_the_scores():
    model, twin = tiny(), tiny()
    # score_beta=0: a score is what the last round measured
    optimizer = build(model, rest_scores=True, cold_start="probe", inner_steps=1, score_beta=0.0)
    backward(twin, batches())
    train(model, optimizer, batches(), 1)
    for name, score in optimizer.scores.items():
        gradient = twin.get_parameter(name).grad
        # sums of squares in another order
        assert score == pytest.approx(gradient.square().mean().item(), rel=1e-5)
    assert optimizer.tracker.round_length == 1 and min(optimizer.scores.values()) > 0


def test_scores_of_what_rests_make_the_cold_start_one_round():
    lengths = {}
    for rest_scores in (False, True):
        model = tiny(num_hidden_layers=4)
        optimizer = build(model, rest_scores=rest_scores, cold_start="probe", inner_steps=5, delta=0.1)
        data, lengths[rest_scores] = batches(), []
        for _ in range(8):
            train(model, optimizer, data, 1)
            lengths[rest_scores].append(optimizer.tracker.round_length)
    assert lengths[True] == [5] * 8 and lengths[False][:4] == [1, 1, 1, 1]


@pytest.mark.parametrize("told", [True, False])
def test_scores_of_one_micro_batch_are_not_mixed_with_those_of_several(told):
    model = tiny()
    optimizer = build(model, rest_scores=True, inner_steps=1)
    resting = {unit.name for unit in optimizer.units} - set(optimizer.active)
    for last in (False, True):
        if told:
            optimizer.last_micro_batch = last
        backward(model, batches())
    optimizer.step()
    assert all(optimizer.scores[name] == 0 for name in resting)


def test_a_run_with_scores_of_what_rests_resumes_at_a_switch_and_within_a_round():
    for steps in (3, 4):
        model = tiny()
        optimizer = build(model, rest_scores=True)
        data = batches()
        train(model, optimizer, data, steps)
        model_state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, data, 5)
        again = tiny()
        resumed = build(again, rest_scores=True)
        again.load_state_dict(model_state)
        resumed.load_state_dict(optimizer_state)
        rest = batches()
        for _ in range(steps):
            next(rest)
        train(again, resumed, rest, 5)
        assert resumed.scores == optimizer.scores and resumed.active == optimizer.active


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rest": "none", "rest_lr": 0.1}, "rest is 'none'"),
        ({"rest": "none", "rest_outside": True}, "rest is 'none'"),
        ({"rest": "none", "rest_scope": "above"}, "rest is 'none'"),
        ({"rest": "none", "rest_every": 2}, "rest is 'none'"),
        ({"rest": "sing"}, "Did you mean 'sign'"),
        ({"rest": "sign", "rest_lr": 0.0}, "positive and finite"),
        ({"rest": "sign", "rest_lr": float("nan")}, "positive and finite"),
        ({"rest": "sign", "rest_every": 0}, "at least 1"),
        ({"rest": "sign", "leave_rounding": "keep"}, "leave_rounding"),
        ({"rest": "none", "rest_scores": True}, "rest is 'none'"),
        ({"rest": "sign", "rest_scores": True, "preset": "official"}, "score='mean_square'"),
    ],
)
def test_what_cannot_be_is_said_at_construction(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        MisaConfig(**options)

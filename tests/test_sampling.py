"""Scores, draws and guarantees of the sampler, against hand-computed numbers and exact enumeration."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from draws import SMALL_SIZES, measure, tracker_with_scores
from misa_engine.method.config import CHOICES, PRESETS, MisaConfig
from misa_engine.method.rules import RULES
from misa_engine.method.sampling import ImportanceTracker

# --- what every rule must hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [56, 150])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rule", RULES)
def test_thousand_draws_stay_within_budget_and_reach_every_unit(rule, preset, budget):
    tracker = ImportanceTracker(SMALL_SIZES, budget, MisaConfig(preset=preset, rule=rule, seed=3))
    for number in range(1000):
        active = tracker.draw()
        assert tracker.round == number and active == tracker.active
        assert 0 < sum(SMALL_SIZES[unit] for unit in active) <= budget
        assert len(set(active)) == len(active)
        measure(tracker)
    if rule != "top_k" or preset != "paper":  # greedy from the first round on, without a cold start
        assert min(tracker.visits) > 0 and tracker.coverage == 1
    assert sum(tracker.probabilities) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_whole_model_as_budget_trains_every_unit_in_every_round(rule):
    tracker = ImportanceTracker(SMALL_SIZES, sum(SMALL_SIZES), MisaConfig(rule=rule, delta=1.0))
    for _ in range(5):
        assert sorted(tracker.draw()) == list(range(len(SMALL_SIZES)))
        measure(tracker)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rule", RULES)
def test_saved_and_loaded_tracker_draws_on_identically(rule, preset):
    config = MisaConfig(preset=preset, rule=rule, seed=11, inner_steps=4)
    tracker = ImportanceTracker(SMALL_SIZES, 130, config)
    for _ in range(23):
        tracker.draw()
        measure(tracker)
    tracker.draw()  # stop in the middle of a round: drawn, not closed
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = ImportanceTracker(SMALL_SIZES, 130, MisaConfig(preset=preset, rule=rule, seed=99, inner_steps=4))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.active == tracker.active and other.round_length == tracker.round_length
    for _ in range(40):
        measure(tracker)
        measure(other)
        assert other.scores == tracker.scores and other.probabilities == tracker.probabilities
        assert other.draw() == tracker.draw()
    assert other.visits == tracker.visits and other.last_visit == tracker.last_visit


def test_carried_unit_survives_a_checkpoint():
    tracker = ImportanceTracker([2, 3, 3], 4, MisaConfig(rule="uniform"))
    while not tracker.state_dict()["carried"]:
        tracker.draw()
    other = ImportanceTracker([2, 3, 3], 4, MisaConfig(rule="uniform"))
    other.load_state_dict(tracker.state_dict())
    assert other.draw()[0] == tracker.state_dict()["carried"][0] == tracker.draw()[0]


def test_state_is_a_copy():
    tracker = ImportanceTracker(SMALL_SIZES, 130, MisaConfig())
    state = tracker.state_dict()
    tracker.draw()
    measure(tracker)
    assert state["visits"] == [0] * len(SMALL_SIZES) and state["round"] == -1
    other = ImportanceTracker(SMALL_SIZES, 130, MisaConfig())
    other.load_state_dict(state)
    other.draw()
    assert state["visits"] == [0] * len(SMALL_SIZES)


@pytest.mark.parametrize(
    ("sizes", "budget", "rule", "named"),
    [
        ([2, 3], 5, "importance", "units = 3; this run has 2"),
        ([2, 4, 3], 5, "importance", "parameters = 8; this run has 9"),
        ([3, 2, 3], 5, "importance", "sizes = "),
        ([2, 3, 3], 6, "importance", "budget = 5; this run has 6"),
        ([2, 3, 3], 5, "uniform", "rule = importance; this run has uniform"),
    ],
)
def test_state_of_another_run_is_refused_and_changes_nothing(sizes, budget, rule, named):
    saved = ImportanceTracker([2, 3, 3], 5, MisaConfig())
    saved.draw()
    tracker = ImportanceTracker(sizes, budget, MisaConfig(rule=rule))
    with pytest.raises(ValueError, match=named):
        tracker.load_state_dict(saved.state_dict())
    assert tracker.round == -1 and tracker.active == ()


def test_incomplete_state_is_refused():
    tracker = ImportanceTracker([2, 3, 3], 5, MisaConfig())
    state = tracker.state_dict()
    del state["generator"], state["ema"]
    with pytest.raises(ValueError, match="lacks ema, generator"):
        tracker.load_state_dict(state)


@pytest.mark.parametrize("rule", RULES)
def test_global_generator_is_untouched_and_without_influence(rule):
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tracker = ImportanceTracker(SMALL_SIZES, 130, MisaConfig(rule=rule, sample_last=1))
        for _ in range(10):
            tracker.draw()
            measure(tracker)
        assert torch.equal(torch.get_rng_state(), before)
        draws.append((tracker.visits, tracker.active))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("rule", RULES)
def test_default_device_of_torch_does_not_matter(rule):
    plain = ImportanceTracker(SMALL_SIZES, 130, MisaConfig(rule=rule))
    for _ in range(10):
        plain.draw()
        measure(plain)
    with torch.device("meta"):
        other = ImportanceTracker(SMALL_SIZES, 130, MisaConfig(rule=rule))
        for _ in range(10):
            other.draw()
            measure(other)
        assert other.active == plain.active and other.probabilities == plain.probabilities
        assert other.entropy == plain.entropy


# --- cold start and forced choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.needs_scores])
def test_probe_sees_every_unit_exactly_once_in_one_step_rounds(rule):
    tracker = ImportanceTracker(SMALL_SIZES, 130, MisaConfig(rule=rule, inner_steps=7))
    seen: list[int] = []
    while len(seen) < len(SMALL_SIZES):
        seen += tracker.draw()
        assert tracker.round_length == 1
        measure(tracker)
    assert sorted(seen) == list(range(len(SMALL_SIZES)))
    tracker.draw()
    assert tracker.round_length == 7


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.needs_scores])
def test_rules_without_scores_have_no_cold_start(rule):
    tracker = ImportanceTracker(SMALL_SIZES, 130, MisaConfig(rule=rule, inner_steps=7))
    tracker.draw()
    assert tracker.round_length == 7


def test_probe_averages_over_the_step_it_made_and_official_divides_by_t():
    engine = ImportanceTracker([4], 4, MisaConfig(inner_steps=10))
    engine.draw()
    engine.update([8.0], [1])
    assert engine.scores == pytest.approx((2.0,))  # 8 / 1 step / 4 parameters
    official = ImportanceTracker([4], 4, MisaConfig(preset="official", inner_steps=10))
    official.draw()
    official.update([8.0], [1])
    assert official.scores == pytest.approx((0.8,))  # 8 / T, unscaled
    official.draw()
    official.update([80.0], [10])
    assert official.scores == pytest.approx(((0.8 * 0.8 + 0.2 * 8) / 0.36,))


def test_official_cold_start_forces_unvisited_units_then_fills_up():
    tracker = ImportanceTracker([1] * 5, 3, MisaConfig(preset="official", inner_steps=9))
    first, second = tracker.draw(), tracker.draw()
    assert tracker.round_length == 1
    assert set(second[:2]) == set(range(5)) - set(first) and second[2] in first
    tracker.draw()
    assert tracker.round_length == 9


def test_probe_returns_to_units_whose_only_step_was_skipped_but_not_for_ever():
    tracker = ImportanceTracker([1] * 3, 1, MisaConfig(inner_steps=5))
    rounds = 0
    while True:
        (unit,) = tracker.draw()
        if tracker.round_length > 1:
            break
        rounds += 1
        first_try = tracker.visits[unit] == 1
        tracker.update([1.0], [0 if unit == 0 or (unit == 1 and first_try) else 1])
    # Unit 2 is measured at once, unit 1 at its second visit, unit 0 never: 1 + 2 + 3 rounds.
    assert rounds == 6 and tracker.visits[0] >= 3 and tracker.scores[0] == 0 and tracker.scores[1] == 1


def test_least_recently_used_units_are_forced_in_first():
    tracker = tracker_with_scores([0.0, 0.0, 0.0, 0.0, 1e3], [1] * 5, 3, sample_last=2, score_normalisation="none")
    draws = [tracker.draw() for _ in range(5)]
    # The rule itself would always take unit 4; two of three places go to whoever waited longest.
    assert draws == [(0, 1, 4), (2, 3, 4), (0, 1, 4), (2, 3, 4), (0, 1, 4)]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("official", [1.0, 1 / 0.36, (0.8 / 0.36 + 0.2) / 0.488]),  # 1, 2.78, 4.96: the corrected value is fed back
        ("engine", [1.0, 1.0, 1.0]),
        ("paper", [0.2, 0.36, 0.488]),
    ],
)
def test_constant_gradient_gives_the_presets_sequence(preset, expected):
    tracker = ImportanceTracker([5], 5, MisaConfig(preset=preset, cold_start="none"))
    found = []
    for _ in expected:
        tracker.draw()
        measure(tracker, [1.0])
        found.append(tracker.scores[0])
    assert found == pytest.approx(expected, rel=1e-14)
    if preset == "official":
        assert [round(value, 2) for value in found] == [1.0, 2.78, 4.96]


def test_changing_gradient_is_averaged_with_weights_summing_to_one():
    tracker = ImportanceTracker([2], 2, MisaConfig(score_beta=0.5, cold_start="none", inner_steps=2))
    for total in (4.0, 16.0):
        tracker.draw()
        tracker.update([total], [2])
    # x = 1, 4; stored 0.5, 2.25; 1 − 0.5² = 0.75
    assert tracker.scores == pytest.approx((3.0,))


def test_official_weights_are_exp_of_the_squared_score_capped_at_five():
    tracker = tracker_with_scores([1.0, 2.0, 3.0], [1, 1, 1], 1, preset="official")
    weights = [math.e, math.exp(4.0), math.exp(5.0)]
    assert tracker.probabilities == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)


def test_paper_weights_are_exp_of_eta_times_score():
    tracker = tracker_with_scores([0.0, 0.01], [1, 1], 1, preset="paper", eta=100.0)
    assert tracker.probabilities[1] / tracker.probabilities[0] == pytest.approx(math.e)


def test_relative_scores_do_not_depend_on_scale():
    scores = [1.0, 2.0, 4.0, 0.0]
    base = tracker_with_scores(scores, [1] * 4, 1).probabilities
    for scale in (1e-300, 1e-10, 1e10, 1e290):
        scaled = tracker_with_scores([scale * score for score in scores], [1] * 4, 1).probabilities
        assert scaled == pytest.approx(base, rel=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_eta_zero_and_scores_all_zero_are_uniform(preset):
    assert tracker_with_scores([1.0, 2.0, 9.0], [1] * 3, 1, preset=preset, eta=0.0).probabilities == (1 / 3,) * 3
    still = tracker_with_scores([0.0] * 3, [1] * 3, 1, preset=preset)
    assert still.probabilities == (1 / 3,) * 3 and still.entropy == pytest.approx(1)


@pytest.mark.parametrize("eta", [1e6, 1e300])
@pytest.mark.parametrize("normalisation", CHOICES["score_normalisation"])
@pytest.mark.parametrize("score", CHOICES["score"])
def test_huge_eta_is_greedy_without_overflow(score, normalisation, eta):
    options = {"score": score, "score_normalisation": normalisation, "eta": eta}
    tracker = tracker_with_scores([1e-9, 1.0, 2.0, 1e-9], [1] * 4, 1, **options)
    if eta == 1e6:
        assert tracker.probabilities == (0.0, 0.0, 1.0, 0.0) and tracker.entropy == 0
        assert all(tracker.draw() == (2,) for _ in range(50))
    extreme = tracker_with_scores([1e-9, 1e200, 1e308, 1e-9], [1] * 4, 4, **options)
    assert sum(extreme.probabilities) == pytest.approx(1) and extreme.entropy >= 0
    assert sorted(extreme.draw()) == [0, 1, 2, 3]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_norms_are_counted_and_never_enter_a_score(poison):
    tracker = ImportanceTracker([1, 1], 2, MisaConfig(cold_start="none"))
    tracker.draw()
    measure(tracker, [1.0, 2.0])
    before = tracker.scores
    tracker.draw()
    tracker.update([poison, poison], [50, 0])
    assert tracker.scores == before and tracker.refused_sums == 2
    assert all(map(math.isfinite, tracker.probabilities))


def test_unit_without_measured_steps_keeps_its_score():
    tracker = ImportanceTracker([1, 1], 2, MisaConfig(cold_start="none"))
    tracker.draw()
    measure(tracker, [1.0, 2.0])
    before = tracker.scores
    tracker.draw()
    kept = tracker.active[0]
    tracker.update([0.0, 500.0], [0, 50])
    assert tracker.scores[kept] == before[kept] and tracker.scores[1 - kept] != before[1 - kept]


@pytest.mark.parametrize(("sums", "steps"), [([1.0], [1, 1]), ([1.0, 1.0], [1]), ([1.0], [1])])
def test_update_wants_one_entry_per_active_unit(sums, steps):
    tracker = ImportanceTracker([1, 1], 2, MisaConfig())
    tracker.draw()
    with pytest.raises(ValueError, match="each of the 2 active units"):
        tracker.update(sums, steps)


# --- what is reported ------------------------------------------------------------------------------------------------


def test_visits_and_staleness_are_counted_in_rounds():
    tracker = ImportanceTracker([1, 1, 1], 1, MisaConfig(rule="cyclic"))
    assert tracker.round == -1 and tracker.stale_rounds == [0, 0, 0] and tracker.coverage == 0
    for _ in range(5):
        tracker.draw()
    assert tracker.visits == [2, 2, 1] and tracker.last_visit == [3, 4, 2]
    assert tracker.stale_rounds == [1, 0, 2] and tracker.coverage == 1
    other = ImportanceTracker([1, 1, 1], 1, MisaConfig(rule="cyclic"))
    other.draw()
    assert other.stale_rounds == [0, 1, 1] and other.coverage == pytest.approx(1 / 3)


def test_starvation_is_reported_after_ten_times_the_mean_wait():
    tracker = ImportanceTracker([1] * 3, 1, MisaConfig(rule="top_k", cold_start="none", ema="plain"))
    tracker.load_state_dict({**tracker.state_dict(), "ema": [1.0, 0.0, 0.0]})
    for _ in range(30):  # 10 · 3 units / 1 per round
        tracker.draw()
        assert tracker.starved() == []
    tracker.draw()
    assert tracker.starved() == [1, 2] and tracker.stale_rounds == [0, 31, 31]


def test_starvation_threshold_follows_the_mean_units_per_round():
    options: dict[str, Any] = {"rule": "top_k", "cold_start": "none", "ema": "plain"}
    large = ImportanceTracker([1, 1, 1, 1], 3, MisaConfig(**options))
    large.load_state_dict({**large.state_dict(), "ema": [1.0, 1.0, 1.0, 0.0]})
    for _ in range(13):  # 10 · 4 / 3 = 13.3
        large.draw()
    assert large.starved() == []
    large.draw()
    assert large.starved() == [3]


def test_entropy_is_normalised():
    assert ImportanceTracker([1], 1, MisaConfig()).entropy == 1
    assert ImportanceTracker([1] * 9, 1, MisaConfig()).entropy == pytest.approx(1)
    half = ImportanceTracker([1] * 4, 1, MisaConfig(rule="static"), [1.0, 1.0, 1e-300, 1e-300])
    assert half.entropy == pytest.approx(0.5)


def test_unit_larger_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="unit 1 has 1,000 parameters, more than the budget of 999"):
        ImportanceTracker([10, 1000], 999, MisaConfig())


@pytest.mark.parametrize("sizes", [[], [0, 3], [-1]])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="one positive number of parameters per unit"):
        ImportanceTracker(sizes, 5, MisaConfig())

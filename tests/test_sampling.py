"""Scores, draws and guarantees of the sampler, against hand-computed numbers and exact enumeration."""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from misa_engine.method.config import CHOICES, PRESETS, MisaConfig
from misa_engine.method.rules import RULES, log_gamma_variates, race
from misa_engine.method.sampling import ImportanceTracker, fill_budget

Outcome = tuple[tuple[int, ...], int | None]  # active units in order, refused unit
WEIGHTED = ("importance", "uniform", "static", "epsilon_greedy")
LAYER = (16, 4, 4, 16, 56, 56, 56)  # q k v o gate up down of Llama-3-8B, in 2**20 parameters
SMALL_SIZES = LAYER * 3


def tracker_with_scores(scores: Sequence[float], sizes: Sequence[int], budget: int, **options) -> ImportanceTracker:
    """A tracker past its cold start, whose plain EMA holds `scores`."""
    tracker = ImportanceTracker(sizes, budget, MisaConfig(ema="plain", **options))
    count = len(sizes)
    past = {"ema": list(scores), "updates": [1] * count, "visits": [1] * count, "last_visit": [0] * count, "round": 0}
    tracker.load_state_dict({**tracker.state_dict(), **past})
    return tracker


def measure(tracker: ImportanceTracker, mean_square: Sequence[float] | None = None) -> None:
    """Close the round as if unit u's gradients had the given mean square (1 + u % 3 by default)."""
    steps = tracker.round_length
    values = [1.0 + unit % 3 if mean_square is None else mean_square[unit] for unit in tracker.active]
    sums = [steps * value * tracker.sizes[unit] for unit, value in zip(tracker.active, values, strict=True)]
    if tracker.config.score == "squared_mean_norm":
        sums = [steps * value for value in values]
    tracker.update(sums, [steps] * len(sums))


def exact_outcomes(
    weights: Sequence[float], sizes: Sequence[int], budget: int, fill: str, first: int | None = None
) -> dict[Outcome, float]:
    """Probability of each (active units in order, refused unit), by walking every sequence of draws."""
    outcomes: dict[Outcome, float] = defaultdict(float)

    def walk(taken: tuple[int, ...], passed: frozenset[int], room: int, probability: float) -> None:
        candidates = [unit for unit in range(len(sizes)) if unit not in taken and unit not in passed]
        if not candidates or room < min(sizes):
            outcomes[taken, None] += probability
            return
        total = sum(weights[unit] for unit in candidates)
        for unit in candidates:
            share = probability * weights[unit] / total
            if sizes[unit] <= room:
                walk((*taken, unit), passed, room - sizes[unit], share)
            elif fill == "skip":
                walk(taken, passed | {unit}, room, share)
            else:
                outcomes[taken, unit] += share

    start = () if first is None else (first,)
    walk(start, frozenset(), budget - sum(sizes[unit] for unit in start), 1.0)
    return outcomes


def chi_square_excess(observed: Counter, expected: dict) -> float:
    """Pearson's statistic of counts against probabilities, over its 99.9% quantile (Wilson and Hilferty)."""
    total = sum(observed.values())
    assert set(observed) <= {key for key, p in expected.items() if p > 0}
    kept = {key: p for key, p in expected.items() if p * total >= 5}
    statistic = sum((observed[key] - p * total) ** 2 / (p * total) for key, p in kept.items())
    degrees = max(1, len(kept) - 1)
    return statistic / (degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3)


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


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sizes_and_budget_keep_the_guarantees(data):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    budget = data.draw(st.integers(max(sizes), 2 * sum(sizes)))
    rule, preset = data.draw(st.sampled_from(list(RULES))), data.draw(st.sampled_from(list(PRESETS)))
    fill, last = data.draw(st.sampled_from(CHOICES["fill"])), data.draw(st.integers(0, 3))
    config = MisaConfig(rule=rule, preset=preset, fill=fill, sample_last=last, seed=data.draw(st.integers(0, 99)))
    tracker = ImportanceTracker(sizes, budget, config)
    for _ in range(12):
        carried = tracker.state_dict()["carried"]
        active = tracker.draw()
        room = budget - sum(sizes[unit] for unit in active)
        assert active and room >= 0 and len(set(active)) == len(active)
        assert not carried or active[0] == carried[0]
        assert sum(tracker.probabilities) == pytest.approx(1, abs=1e-12) and 0 <= tracker.entropy <= 1
        if fill == "skip" and rule in WEIGHTED and tracker.round_length > 1:
            assert all(sizes[unit] > room for unit in range(len(sizes)) if unit not in active)
        measure(tracker)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_fill_budget_takes_what_its_rule_says(data):
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=10))
    order = data.draw(st.permutations(range(len(sizes))))
    budget, fill = data.draw(st.integers(0, sum(sizes))), data.draw(st.sampled_from(CHOICES["fill"]))
    taken, refused = fill_budget(order, sizes, budget, fill, min(sizes))
    room = budget - sum(sizes[unit] for unit in taken)
    assert room >= 0
    assert taken == [unit for unit in order if unit in taken]
    if fill == "skip":
        assert refused is None and all(sizes[unit] > room for unit in order if unit not in taken)
    else:
        assert taken == list(order[: len(taken)])
        if refused is None:
            assert len(taken) == len(order) or room < min(sizes)
        else:
            assert order[len(taken)] == refused and min(sizes) <= room < sizes[refused]


# --- frequencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", WEIGHTED)
def test_one_unit_a_round_is_drawn_with_its_probability(rule):
    visits, weights = [1, 2, 3, 9, 0, 4], [1.0, 2.0, 3.0, 4.0, 0.5, 0.25]
    # Equal sizes with room for 1.9 units: even fill="carry" refuses nobody, so rounds are independent.
    config = MisaConfig(rule=rule, ema="plain", cold_start="none", fill="carry", epsilon=0.3, seed=5)
    tracker = ImportanceTracker([7] * 6, 13, config, weights)
    tracker.load_state_dict({**tracker.state_dict(), "ema": [0.0, 0.5, 1.0, 2.0, 3.0, 0.1], "visits": visits})
    expected = {
        "importance": torch.softmax(torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 0.1]).double() / 1.1, dim=0).tolist(),
        "uniform": [1 / 6] * 6,
        "static": [weight / 10.75 for weight in weights],
        "epsilon_greedy": [0.3 / 6 + 0.7 * (count + 1) / 25 for count in visits],
    }[rule]
    assert tracker.probabilities == pytest.approx(expected, abs=1e-7)
    observed: Counter[int] = Counter()
    for _ in range(4000):
        (unit,) = tracker.draw()
        observed[unit] += 1
        tracker.visits[unit] -= 1  # epsilon_greedy looks at them: keep the distribution in place
    assert chi_square_excess(observed, dict(enumerate(expected))) < 1


def test_probabilities_are_the_softmax_of_relative_scores():
    scores = [1.0, 2.0, 3.0]
    tracker = tracker_with_scores(scores, [1, 1, 1], 1, eta=0.5)
    weights = [math.exp(0.5 * score / 2.0) for score in scores]
    assert tracker.probabilities == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-15)


@pytest.mark.parametrize("fill", ["stop", "skip"])
def test_several_units_a_round_match_exact_enumeration(fill):
    weights, sizes, budget = [1.0, 2.0, 4.0, 0.5, 1.5], [1, 2, 3, 2, 4], 5
    tracker = ImportanceTracker(sizes, budget, MisaConfig(rule="static", fill=fill, seed=2), weights)
    observed = Counter(tracker.draw() for _ in range(5000))
    expected: dict[tuple[int, ...], float] = defaultdict(float)
    for (taken, _), probability in exact_outcomes(weights, sizes, budget, fill).items():
        expected[taken] += probability
    assert sum(expected.values()) == pytest.approx(1)
    assert chi_square_excess(observed, expected) < 1


def test_carry_matches_its_markov_chain():
    weights, sizes, budget = [1.0, 2.0, 4.0, 0.5, 1.5], [1, 2, 3, 2, 4], 5
    tracker = ImportanceTracker(sizes, budget, MisaConfig(rule="static", fill="carry", seed=4), weights)
    observed: dict[int | None, Counter] = {}
    for _ in range(8000):
        carried = (tracker.state_dict()["carried"] or [None])[0]
        drawn = tracker.draw()
        refused = (tracker.state_dict()["carried"] or [None])[0]
        observed.setdefault(carried, Counter())[drawn, refused] += 1
    assert len(observed) == 5  # nothing carried, or one of the four units that can be refused
    for carried, counts in observed.items():
        assert chi_square_excess(counts, exact_outcomes(weights, sizes, budget, "carry", carried)) < 1


def test_exact_carry_frequencies_are_closer_to_the_weights_than_stop_and_skip():
    sizes, budget = [1, 1, 1, 1, 4, 4, 4, 4], 6
    uniform = [1.0] * 8

    def small_over_large(frequencies: Sequence[float]) -> float:
        return frequencies[0] / frequencies[-1]

    def included(outcomes: dict[Outcome, float]) -> list[float]:
        return [sum(p for (taken, _), p in outcomes.items() if unit in taken) for unit in range(8)]

    # Stationary distribution of the carried unit, by power iteration.
    states: list[int | None] = [None, *range(8)]
    moves = {state: exact_outcomes(uniform, sizes, budget, "carry", state) for state in states}
    at = dict.fromkeys(states, 1 / 9)
    for _ in range(200):
        at = {new: sum(at[s] * p for s in states for (_, r), p in moves[s].items() if r == new) for new in states}
    given = {state: included(outcomes) for state, outcomes in moves.items()}
    carry = [sum(at[state] * given[state][unit] for state in states) for unit in range(8)]
    stop = small_over_large(included(exact_outcomes(uniform, sizes, budget, "stop")))
    skip = small_over_large(included(exact_outcomes(uniform, sizes, budget, "skip")))
    # All that is left is that a unit cannot be drawn twice in a round. It shrinks with (units a round)/B: 2/8 here.
    assert skip > 1.9 and stop > 1.4
    assert small_over_large(carry) == pytest.approx(1.0537, abs=1e-4)
    tracker = ImportanceTracker(sizes, budget, MisaConfig(rule="uniform", seed=8))
    for _ in range(4000):
        tracker.draw()
    for visits, frequency in zip(tracker.visits, carry, strict=True):
        assert visits == pytest.approx(4000 * frequency, abs=4 * math.sqrt(4000 * frequency))


def frequencies_by_kind(fill: str, delta: float, rounds: int) -> tuple[list[float], int]:
    """Visits of q k v o gate up down relative to uniform, drawn with equal weights at Llama-3-8B's sizes."""
    total = 8_030_261_248
    sizes = [size << 20 for size in LAYER] * 32
    tracker = ImportanceTracker(sizes, int(delta * total), MisaConfig(rule="uniform", fill=fill))
    for _ in range(rounds):
        tracker.draw()
    visits = sum(tracker.visits)
    return [7 * sum(tracker.visits[kind::7]) / visits for kind in range(7)], visits


def test_carry_selects_all_kinds_of_an_8b_model_equally_often():
    relative, visits = frequencies_by_kind("carry", 0.03, 4000)
    sigma = math.sqrt(6 / visits)  # of a binomial share 1/7, relative to 1/7: 1.5% here
    assert relative == pytest.approx([1.0] * 7, abs=3 * sigma)
    # 20,000 rounds gave small/large 2.47 with skip, 1.25 with stop, 1.00 with carry (δ=1%: 4.99, 1.81, 1.00).
    skip, _ = frequencies_by_kind("skip", 0.03, 1000)
    stop, _ = frequencies_by_kind("stop", 0.03, 1000)
    assert skip[1] / skip[4] > 2.2 and stop[1] / stop[4] > 1.1


def test_race_draws_underflowing_weights_in_fair_order():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.tensor([-1e4, 0.0, -1e4, -1e18, -1e18, -1e18], dtype=torch.float64)
    second: Counter[int] = Counter()
    last: Counter[tuple[int, ...]] = Counter()
    for _ in range(1500):
        order = race(log_weights, generator)
        assert order[0] == 1 and sorted(order) == list(range(6)) and set(order[1:3]) == {0, 2}
        second[order[1]] += 1
        last[tuple(order[3:])] += 1
    assert chi_square_excess(second, {0: 0.5, 2: 0.5}) < 1
    assert len(last) == 6 and chi_square_excess(last, dict.fromkeys(last, 1 / 6)) < 1


def test_race_keeps_differences_between_huge_weights():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.tensor([1e16, 1e16 + 2], dtype=torch.float64)
    first = Counter(race(log_weights, generator)[0] for _ in range(2000))
    assert chi_square_excess(first, {0: 1 / (1 + math.exp(2)), 1: 1 / (1 + math.exp(-2))}) < 1


def test_gamma_variates_have_the_right_moments():
    generator = torch.Generator().manual_seed(0)
    for shape in (1.0, 2.0, 50.0):
        values = log_gamma_variates(torch.full((20000,), shape, dtype=torch.float64), generator).exp()
        assert values.mean().item() == pytest.approx(shape, abs=4 * math.sqrt(shape / 20000))
        # Var of the sample variance of Gamma(a) is (2a² + 6a)/n
        assert values.var().item() == pytest.approx(shape, abs=4 * math.sqrt((2 * shape**2 + 6 * shape) / 20000))


# --- each rule -------------------------------------------------------------------------------------------------------


def test_cyclic_goes_round_in_order_and_repeats_nobody_within_a_pass():
    tracker = ImportanceTracker([2, 2, 3, 2, 2], 5, MisaConfig(rule="cyclic"))
    assert [tracker.draw() for _ in range(5)] == [(0, 1), (2, 3), (4, 0), (1, 2), (3, 4)]
    assert tracker.probabilities == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert tracker.entropy == 0 and tracker.visits == [2] * 5


@pytest.mark.parametrize("fill", CHOICES["fill"])
@pytest.mark.parametrize("rule", ["cyclic", "shuffle"])
def test_a_pass_visits_every_unit_once_whatever_the_fill(rule, fill):
    tracker = ImportanceTracker(SMALL_SIZES, 100, MisaConfig(rule=rule, fill=fill))
    for _ in range(200):
        tracker.draw()
        assert max(tracker.visits) - min(tracker.visits) <= 1


def test_shuffle_makes_a_new_permutation_for_each_pass():
    tracker = ImportanceTracker([1] * 6, 1, MisaConfig(rule="shuffle", seed=1))
    assert tracker.probabilities == pytest.approx([1 / 6] * 6)
    passes = [[tracker.draw()[0] for _ in range(6)] for _ in range(3)]
    assert all(sorted(units) == list(range(6)) for units in passes)
    assert len({tuple(units) for units in passes}) == 3
    left = set(range(6)) - set(tracker.draw())
    assert tracker.probabilities == tuple(1 / 5 if unit in left else 0.0 for unit in range(6))
    assert tracker.draw()[0] in left


def test_top_k_takes_the_best_and_breaks_ties_by_least_recent_visit_then_index():
    tracker = tracker_with_scores([1.0, 5.0, 3.0, 3.0, 3.0], [1] * 5, 2, rule="top_k")
    assert tracker.probabilities == (0.0, 1.0, 0.0, 0.0, 0.0)
    assert [tracker.draw() for _ in range(4)] == [(1, 2), (1, 3), (1, 4), (1, 2)]


def test_top_k_does_not_carry_what_did_not_fit():
    tracker = tracker_with_scores([3.0, 2.0, 1.0], [3, 3, 1], 5, rule="top_k", fill="carry")
    assert tracker.draw() == (0,) == tracker.draw()


def test_static_weights_may_differ_by_many_orders_of_magnitude():
    tracker = ImportanceTracker([1, 1, 1], 2, MisaConfig(rule="static"), [1.0, 1e-300, 1e-320])
    assert tracker.draw() == (0, 1)
    assert tracker.probabilities == pytest.approx((1.0, 1e-300, 1e-320))


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 2.0, 0.0], [1.0, 2.0, -1.0], [1.0, math.inf, 1.0]])
def test_unusable_static_weights_are_refused(weights):
    with pytest.raises(ValueError, match="one positive, finite number for each of the 3 units"):
        ImportanceTracker([1, 1, 1], 2, MisaConfig(rule="static"), weights)


def test_epsilon_greedy_mixes_uniform_draws_with_visit_counts():
    def share_of_first(epsilon: float) -> float:
        config = MisaConfig(rule="epsilon_greedy", epsilon=epsilon, seed=6, cold_start="none")
        tracker = ImportanceTracker([1] * 10, 1, config)
        hits = 0
        for _ in range(1000):
            tracker.visits = [990] + [0] * 9  # Dirichlet mean of the first: 991/1000
            hits += tracker.draw() == (0,)
        return hits / 1000

    assert share_of_first(0.0) == pytest.approx(0.991, abs=0.015)
    assert share_of_first(1.0) == pytest.approx(0.1, abs=0.04)
    assert share_of_first(0.5) == pytest.approx(0.5455, abs=0.065)


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

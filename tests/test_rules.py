"""The rules: frequencies, order, ties, and how a draw fills its budget."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draws import LAYER, SMALL_SIZES, WEIGHTED, Outcome, chi_square_excess, exact_outcomes, measure, tracker_with_scores
from misa_engine.method.config import CHOICES, PRESETS, MisaConfig
from misa_engine.method.rules import RULES, log_gamma_variates, race
from misa_engine.method.sampling import ImportanceTracker, fill_budget


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
    config = MisaConfig(
        rule=rule, ema="plain", cold_start="none", fill="carry", epsilon=0.3, probability_floor=0, seed=5
    )
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

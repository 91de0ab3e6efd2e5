"""Visits a weight: the arithmetic, what the commands say of it, and the cold start's share of a run."""

import json
import math
from collections import Counter
from itertools import islice

import pytest
import torch

from command import make_workplace, words
from draws import measure
from misa_engine import MISA, MisaConfig
from misa_engine.cli.main import main
from misa_engine.cli.preview import coverage_of
from misa_engine.method.sampling import COLLAPSED, ImportanceTracker
from misa_engine.planner.coverage import ENOUGH, FEW, Coverage
from misa_engine.report.log import RunLog
from training import batches, tiny, train, weights

pytest_plugins = ["trainer_cases"]
pytestmark = pytest.mark.filterwarnings("ignore")


def coverage(steps=600, delta=0.03, inner_steps=50, drawable=1000, budget=30, **options):
    misa = MisaConfig(delta=delta, inner_steps=inner_steps, **{"rest": "none", **options})
    return Coverage.of(misa, steps, drawable=drawable, budget=budget)


# ---- the arithmetic ----


def test_visits_are_delta_steps_over_t():
    assert coverage().visits == pytest.approx(0.36)
    assert coverage().untouched == pytest.approx(0.97**12)


@pytest.mark.parametrize(
    ("steps", "delta", "inner_steps"), [(600, 0.03, 50), (70, 0.2, 8), (100, 0.03, 50), (7, 1.0, 3)]
)
def test_each_recommendation_alone_gives_enough_visits(steps, delta, inner_steps):
    found = coverage(steps, delta, inner_steps)
    enough = found.enough
    for option, value in enough.items():
        changed = coverage(**{"steps": steps, "delta": delta, "inner_steps": inner_steps, option: value})
        assert changed.visits >= ENOUGH * (1 - 1e-9)
    if "inner_steps" in enough:
        assert coverage(steps, delta, enough["inner_steps"] + 1).visits < ENOUGH
    else:
        assert delta * steps < ENOUGH
    assert coverage(enough["steps"] - 1, delta, inner_steps).visits < ENOUGH
    assert ("delta" in enough) == (ENOUGH * inner_steps <= steps)


def test_few_visits_are_warned_of_and_enough_are_not():
    short, middle, long = (coverage(steps).describe() for steps in (3333, 3334, 5000))
    assert f"warning: fewer than {FEW:g} visits" in short and "inner_steps 33, or delta 0.046, or 5,000 steps" in short
    assert "warning" not in middle and "inner_steps 33" in middle
    assert "3.00 visits a weight" in long and "warning" not in long and "or delta" not in long
    assert "(does not fit)" in coverage().describe(fits=False) and "(fits)" in coverage().describe(fits=True)


def test_what_moves_by_the_rest_rule_needs_no_warning():
    text = coverage(rest="sign").describe()
    assert "warning" not in text and "moves by sign" in text and "0.36 visits" in text


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 600, 34),
        ({}, 100, 10),
        ({}, 5, 1),
        ({"cold_start_share": 1.0}, 100, 34),
        ({"cold_start": "none"}, 100, 0),
        ({"rule": "uniform"}, 100, 0),
        ({"rest": "sign", "rest_scores": True}, 600, 1),
    ],
    ids=str,
)
def test_the_cold_starts_part_is_known_before(options, steps, expected):
    assert coverage(steps, **options).cold_steps == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("batch", "accumulation", "epochs", "steps"), [(2, 1, 3, -1), (5, 2, 1.5, -1), (3, 3, 2, 4)])
def test_the_runs_length_is_the_trainers(misa_trainer, drop_last, batch, accumulation, epochs, steps):
    training = misa_trainer(
        max_steps=steps,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last,
    )
    before = coverage_of(training).steps
    training.train()
    assert before == training.state.max_steps == training.misa.config.run_steps


# ---- the cold start's share ----


def rounds(tracker, count, steps=1):
    """Lengths and units of the next rounds; every unit's gradient is as large as its number."""
    found = []
    for _ in range(count):
        active = tracker.draw()
        found.append((tracker.round_length, active))
        tracker.update([float(unit + 1) for unit in active], [steps] * len(active))
    return found


def tracker(**options):
    return ImportanceTracker([1] * 40, 2, MisaConfig(delta=0.05, inner_steps=5, **options))


@pytest.mark.parametrize(("run_steps", "expected"), [(None, 20), (1000, 20), (100, 10), (55, 5), (3, 1)])
def test_one_step_rounds_end_at_their_share_of_the_run(run_steps, expected):
    lengths = [length for length, _ in rounds(tracker(run_steps=run_steps), 25)]
    assert lengths == [1] * expected + [5] * (25 - expected)


@pytest.mark.parametrize("preset", ["engine", "official"])
def test_a_known_length_changes_nothing_before_the_share_is_used_up(preset):
    options = {"preset": preset, "cold_start": "probe"}
    free, capped = (rounds(tracker(run_steps=steps, **options), 12) for steps in (None, 100))
    assert free[:10] == capped[:10]
    assert (free[10:] == capped[10:]) == (preset == "official")  # the published code has no limit


def test_what_the_cold_start_did_not_see_counts_as_average():
    found = tracker(run_steps=50)
    seen = {unit for _, active in rounds(found, 5) for unit in active}
    assert len(seen) == 10
    scores = found.scores
    mean = sum(scores[unit] for unit in seen) / len(seen)
    below = max((unit for unit in seen if scores[unit] <= mean), key=lambda unit: scores[unit])
    above = min((unit for unit in seen if scores[unit] > mean), key=lambda unit: scores[unit])
    p = found.probabilities
    unseen = {p[unit] for unit in range(40) if unit not in seen}
    assert len(unseen) == 1 and p[below] <= unseen.pop() <= p[above]


def test_the_cold_start_does_not_return_in_a_longer_run():
    first = tracker(run_steps=50)
    rounds(first, 8)
    longer = tracker(run_steps=500)
    longer.load_state_dict(first.state_dict())
    assert [length for length, _ in rounds(longer, 4)] == [5] * 4


@pytest.mark.parametrize("stop", [1, 3, 5, 9])
def test_a_capped_run_resumes_to_the_same_bits(stop):
    data = list(islice(batches(), 20))

    def start():
        torch.manual_seed(0)
        model = tiny()
        return model, MISA(model, lr=1e-2, delta=0.1, inner_steps=4, run_steps=30)

    model, optimizer = start()
    train(model, optimizer, iter(data), 20)
    assert optimizer.round == 3 + 17 // 4  # three rounds of one step
    half, first = start()
    train(half, first, iter(data), stop)
    other, second = start()
    other.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    train(other, second, iter(data[stop:]), 20 - stop)
    assert second.active == optimizer.active
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(other).values(), strict=True))


def test_a_checkpoint_without_a_length_loads_into_a_run_with_one_and_back():
    state = MISA(tiny(), delta=0.2, probability_floor=0).state_dict()
    for name in ("run_steps", "cold_start_share", "probability_floor"):
        state["misa"]["config"].pop(name, None)
    other = MISA(tiny(), delta=0.2, run_steps=100, probability_floor=0)
    other.load_state_dict(state)
    MISA(tiny(), delta=0.2, run_steps=50, probability_floor=0).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="probability_floor"):  # that run had none: another sampler
        MISA(tiny(), delta=0.2).load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("run_steps", 0, "run_steps is the number of optimizer steps"),
        ("run_steps", 1.5, "run_steps is the number of optimizer steps"),
        ("cold_start_share", 0, "cold_start_share must be in"),
        ("cold_start_share", 1.1, "cold_start_share must be in"),
        ("probability_floor", -0.1, "probability_floor must be in"),
        ("probability_floor", math.nan, "probability_floor must be in"),
    ],
)
def test_values_out_of_range_are_refused(option, value, said):
    with pytest.raises(ValueError, match=said):
        MisaConfig(**{option: value})


# ---- collapse ----


@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_no_unit_falls_below_the_floor_and_neither_does_the_entropy(floor):
    free, held = (tracker(probability_floor=value, eta=40.0) for value in (0.0, floor))
    for found in (free, held):
        rounds(found, 20)
    p, q = torch.tensor(free.probabilities), torch.tensor(held.probabilities)
    assert free.entropy < COLLAPSED and held.entropy >= floor
    assert torch.allclose(q, (1 - floor) * p + floor / 40, atol=1e-12) and q.min() >= floor / 40 * (1 - 1e-9)


def test_the_default_cannot_collapse():
    """Scores as far apart as they can be: every unit keeps half of a uniform draw's chance, and comes up."""
    found = ImportanceTracker([1] * 40, 2, MisaConfig(inner_steps=5, cold_start="none"))
    visits = Counter()
    for _ in range(400):
        visits.update(found.draw())
        measure(found, [1e12 if unit == 0 else 1e-12 for unit in range(40)])
    assert found.entropy >= 0.5 and min(found.probabilities) >= 0.5 / 40 * (1 - 1e-9)
    assert len(visits) == 40


def test_a_collapse_is_said_once_with_its_remedy(caplog):
    rounds(tracker(), 30)
    assert not caplog.records
    found = tracker(eta=40.0, probability_floor=0.0)
    rounds(found, 20)
    assert not caplog.records  # the cold start draws by no probabilities
    rounds(found, 10)
    (record,) = caplog.records
    assert "probability_floor=0.5" in record.getMessage() and "eta (now 40)" in record.getMessage()
    rounds(tracker(eta=40.0), 30)
    rounds(tracker(eta=40.0, rule="uniform"), 30)
    assert len(caplog.records) == 1


# ---- the commands ----


def test_plan_says_how_often_weights_are_visited(capsys):
    plan = ["plan", "--model", "tinyllama", "--length", "256", "--rest", "none"]
    assert main([*plan, "--steps", "600"]) == 0
    shown = capsys.readouterr().out
    assert "600 steps, delta 0.03, inner_steps 50: 0.36 visits a weight" in shown
    assert "inner_steps 6, or delta 0.25 (fits), or 5,000 steps" in shown and "warning: fewer than 2" in shown
    assert main([*plan, "--records", "1001", "--batch", "4", "--accumulation", "2", "--epochs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["coverage"]
    assert found["steps"] == 2 * 126 and found["visits"] == pytest.approx(0.03 * 252 / 50) and found["warning"]
    assert main([*plan, "--json"]) == 0
    assert "coverage" not in json.loads(capsys.readouterr().out)
    assert main([*plan, "--epochs", "2"]) == 2
    assert "needs --records" in capsys.readouterr().err
    assert main([*plan, "--steps", "5000", "--inner_steps", "20", "--max_vram_gb", "24"]) == 0
    shown = capsys.readouterr().out
    assert "warning" not in shown and "--inner_steps 20" in shown and "--max_steps 5000" in shown


def test_a_recommended_delta_that_does_not_fit_is_marked(capsys):
    assert main(["plan", "--model", "llama-3-8b", "--gpu", "rtx4090", "--steps", "600", "--rest", "none"]) == 0
    assert "delta 0.25 (does not fit)" in capsys.readouterr().out


def test_train_says_it_before_and_the_report_after(tmp_path, tmp_path_factory, capsys):
    place = make_workplace(tmp_path, tmp_path_factory.mktemp("cache"))
    out = tmp_path / "out"
    assert main(words(place, out, "--dry_run", "--rest", "none", max_steps=6)) == 0
    shown = capsys.readouterr().out
    assert "6 steps, delta 0.2, inner_steps 2: 0.60 visits a weight" in shown and "warning: fewer than 2" in shown
    assert main(words(place, out, max_steps=None, num_train_epochs=2)) == 0  # 24 records in pairs
    shown = capsys.readouterr().out
    assert "24 steps, delta 0.2, inner_steps 2: 2.40 visits" in shown and "warning: fewer" not in shown
    assert "visits (steps/T): min " in shown and "never trained: " in shown and "entropy of draws" in shown
    run = RunLog.read(out)[0]
    assert run["config"]["run_steps"] == 24
    switches = [entry for entry in RunLog.read(out) if entry["type"] == "switch"]
    assert switches[2]["step"] == 2 and switches[3]["step"] == 4  # a tenth of the run in rounds of one step


def test_adamw_has_no_visits(tmp_path, tmp_path_factory, capsys):
    place = make_workplace(tmp_path, tmp_path_factory.mktemp("cache"))
    assert main(words(place, tmp_path / "out", "--dry_run", "--optimizer", "adamw", inner_steps=None, delta=None)) == 0
    assert "visits" not in capsys.readouterr().out

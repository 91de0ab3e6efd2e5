"""The presets against the method written down plainly in float64 (tests/reference.py)."""

import copy

import pytest
import torch

from misa_engine import MISA
from reference import OfficialMisa, PaperMisa
from training import batches, loss_of, tiny

ROUNDS, INNER = 6, 4


def twin_of(model):
    return copy.deepcopy(model).double().requires_grad_(True)


@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_paper_preset_follows_algorithm_1(granularity):
    # The reference restarts from the engine's weights at each round: Adam divides by the root of a tiny v, so fp32
    # rounding grows chaotically over rounds. Within one round 3e-5 is ~5x the worst difference seen.
    model = tiny()
    optimizer = MISA(
        model, lr=1e-3, delta=0.6, inner_steps=INNER, preset="paper", eta=50.0, granularity=granularity, seed=5
    )
    members = {unit.name: unit.params for unit in optimizer.units}
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    scores = dict.fromkeys(members, 0.0)
    data = batches()
    for _ in range(ROUNDS):
        twin = twin_of(model)
        parameters = [name for names in members.values() for name in names]
        reference = PaperMisa(twin, parameters, lr=1e-3, eta=50.0)
        active = optimizer.active
        reference.start_round([name for unit in active for name in members[unit]])
        for _ in range(INNER):
            ids = next(data)
            twin.zero_grad()
            loss_of(twin, ids).backward()
            reference.step()
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        reference.end_round()
        for unit in active:
            total = sum(numel[name] for name in members[unit])
            mean_square = sum(reference.sums[name] * numel[name] for name in members[unit]) / total / INNER
            scores[unit] = 0.8 * scores[unit] + 0.2 * mean_square
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).double(), parameter, rtol=0, atol=3e-5)
        assert optimizer.scores == pytest.approx(scores, rel=1e-4)
        exponents = torch.tensor([50.0 * score for score in scores.values()], dtype=torch.float64)
        expected = dict(zip(scores, torch.softmax(exponents, 0).tolist(), strict=True))
        assert optimizer.probabilities == pytest.approx(expected, abs=1e-6)
    assert len(set(optimizer.probabilities.values())) > 1


@pytest.mark.parametrize("clip", [None, 0.05])
def test_official_preset_follows_the_published_code(clip):
    model = tiny()
    optimizer = MISA(model, lr=1e-3, delta=0.4, inner_steps=INNER, preset="official", weight_decay=0.01, seed=5)
    twin = twin_of(model)
    reference = OfficialMisa(twin, [unit.name for unit in optimizer.units], 1e-3, INNER, wd=0.01)
    data = batches()
    visited: set[str] = set()
    while optimizer.round < 16:
        active, this_round = optimizer.active, optimizer.round
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(model.get_parameter(name))
        reference.start_round(list(active))
        steps = 0
        while optimizer.round == this_round:
            ids = next(data)
            twin.zero_grad()
            loss_of(twin, ids).backward()
            loss_of(model, ids).backward()
            if clip is not None:  # as the Trainer does: in place, over whatever is active
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                torch.nn.utils.clip_grad_norm_([twin.get_parameter(name) for name in active], clip)
            reference.step()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        reference.end_round()
        assert steps == (1 if len(visited) < len(optimizer.units) else INNER)
        visited |= set(active)
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).double(), parameter, rtol=0, atol=3e-5)
        assert optimizer.scores == pytest.approx(reference.scores, rel=1e-4)
        assert optimizer.probabilities == pytest.approx(reference.probabilities, abs=1e-6)
    assert visited == set(reference.units)


def test_official_preset_with_its_own_clipping_reads_the_clipped_norm():
    def scores(**options):
        model = tiny()
        optimizer = MISA(model, lr=1e-3, delta=0.4, inner_steps=2, preset="official", **options)
        loss_of(model, next(batches())).backward()
        if not options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        return optimizer.scores

    assert scores(max_grad_norm=0.05) == pytest.approx(scores(), rel=1e-5)


def test_closing_momentum_pays_back_what_is_left_in_the_first_moment():
    # With a constant gradient g and no bias correction, T steps move by lr·Σ m_t/(√v_t+ε); line 16 adds the rest.
    model = tiny()
    lr, beta1, beta2 = 1e-3, 0.9, 0.999
    optimizer = MISA(model, lr=lr, delta=0.3, inner_steps=3, preset="paper")
    active = optimizer.active
    before = {name: model.get_parameter(name).detach().clone() for name in active}
    for _ in range(3):
        for name in active:
            model.get_parameter(name).grad = torch.full_like(model.get_parameter(name), 0.5)
        optimizer.step()
    m = v = moved = 0.0
    for _ in range(3):
        m, v = beta1 * m + (1 - beta1) * 0.5, beta2 * v + (1 - beta2) * 0.25
        moved += lr * m / (v**0.5 + 1e-8)
    moved += lr * beta1 / (1 - beta1) * m / (v**0.5 + 1e-8)
    for name in active:
        torch.testing.assert_close(model.get_parameter(name), before[name] - moved, rtol=0, atol=2e-7)

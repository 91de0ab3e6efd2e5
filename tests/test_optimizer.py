import copy
import io
import math
import statistics

import pytest
import torch
from torch import nn

from misa_engine import MISA, MisaConfig
from misa_engine.engine.arena import arena_bytes
from misa_engine.method.config import PRESETS
from misa_engine.method.partition import check_budget, partition
from misa_engine.method.rules import RULES
from misa_engine.method.sampling import ImportanceTracker
from models import TINY
from training import batches, changed, loss_of, tiny, train, weights

DELTA = 0.3  # the tiny models' largest matrix is 8% of the whole


def test_only_active_matrices_change_and_only_they_hold_gradients():
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=3)
    data = batches()
    for _ in range(40):
        active, before = set(optimizer.active), weights(model)
        loss_of(model, next(data)).backward()
        assert {name for name, p in model.named_parameters() if p.requires_grad} == active
        assert {name for name, p in model.named_parameters() if p.grad is not None} == active
        optimizer.step()
        assert changed(before, model) == active
        optimizer.zero_grad()


def test_a_frozen_matrix_is_drawn_later_and_learns():
    model = tiny()
    start = weights(model)
    optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=2)
    train(model, optimizer, batches(), 60)
    assert changed(start, model) == {unit.name for unit in optimizer.units}


def test_training_lowers_the_loss_on_a_repeated_batch():
    model = tiny()
    ids = next(batches())
    optimizer = MISA(model, lr=1e-2, delta=0.5, inner_steps=5, include_outside=True)
    losses = train(model, optimizer, iter([ids] * 100), 100)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("granularity", ["module", "block", "layer"])
@pytest.mark.parametrize("family", list(TINY))
def test_no_draw_of_any_rule_exceeds_the_budget(family, granularity):
    parts = partition(TINY[family](), granularity)
    delta = 2.5 * max(unit.numel for unit in parts.units) / parts.total
    delta = min(1.0, delta)
    budget = check_budget(parts, delta)
    for rule in RULES:
        tracker = ImportanceTracker(
            [unit.numel for unit in parts.units], budget, MisaConfig(rule=rule, delta=delta, inner_steps=1)
        )
        noise = torch.Generator().manual_seed(0)
        for _ in range(1000 // len(RULES) + 1):
            active = tracker.draw()
            held = sum(parts.units[index].numel for index in active)
            assert 0 < held <= delta * parts.total
            assert len(set(active)) == len(active)
            tracker.update(torch.rand(len(active), generator=noise).tolist(), [1] * len(active))


@pytest.mark.parametrize("rule", list(RULES))
def test_a_thousand_rounds_of_training_stay_within_the_budget_and_allocate_nothing(rule):
    model = tiny(num_hidden_layers=1)
    optimizer = MISA(model, lr=1e-3, delta=0.35, inner_steps=1, rule=rule)
    pointers = {name: buffer.data_ptr() for name, buffer in optimizer.arena.buffers().items()}
    held = optimizer.memory()
    sizes = {unit.name: unit.numel for unit in optimizer.units}
    rounds = 1000 if rule == "importance" else 100
    ids = next(batches(length=4))
    for _ in range(rounds):
        train(model, optimizer, iter([ids]), 1)
        assert sum(sizes[name] for name in optimizer.active) <= 0.35 * optimizer.partition.total
    assert optimizer.round == rounds
    assert {name: buffer.data_ptr() for name, buffer in optimizer.arena.buffers().items()} == pointers
    assert optimizer.memory() == held
    assert len(optimizer.events) <= 1000


def test_switching_allocates_nothing_once_every_unit_has_left_once():
    model = tiny("llama", torch.bfloat16, num_hidden_layers=1)
    kept = {"state_dtype": "int8", "revisit": "offload", "leave_rounding": "keep"}
    optimizer = MISA(model, lr=1e-3, delta=0.35, inner_steps=1, rule="shuffle", **kept)
    pointers = {name: buffer.data_ptr() for name, buffer in optimizer.arena.buffers().items()}
    ids = next(batches(length=4))
    train(model, optimizer, iter([ids] * 30), 30)
    held = optimizer.memory()
    train(model, optimizer, iter([ids] * 200), 200)
    assert optimizer.memory() == held and held["host_moments"] > 0 and held["host_residual_bits"] > 0
    assert {name: buffer.data_ptr() for name, buffer in optimizer.arena.buffers().items()} == pointers


def test_arena_bytes_are_known_without_allocating():
    for dtype, options in [
        (torch.float32, {}),
        (torch.bfloat16, {"state_dtype": "int8"}),
        (torch.bfloat16, {"grad_dtype": "float32", "master": "none"}),
        (torch.bfloat16, {"update_in": "backward"}),
    ]:
        optimizer = MISA(tiny(dtype=dtype), delta=DELTA, **options)
        arena = optimizer.arena
        predicted = arena_bytes(
            arena.capacity,
            arena.table.slot_group.numel(),
            dtype=dtype,
            split=dtype == torch.bfloat16 and options.get("master") != "none",
            state_dtype=options.get("state_dtype", "float32"),
            grad_dtype=torch.float32 if "grad_dtype" in options else None,
            hold_gradients="update_in" not in options,
        )
        assert predicted == arena.bytes()
        tensors = [*vars(arena).values(), *vars(arena.table).values()]
        assert sum(predicted.values()) == sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


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
    optimizer = MISA(model, delta=DELTA)
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


@pytest.mark.parametrize("family", list(TINY))
def test_every_family_trains_in_both_dtypes(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family, dtype)
        largest = max(unit.numel for unit in partition(model).units) / sum(p.numel() for p in model.parameters())
        optimizer = MISA(model, lr=1e-3, delta=min(1.0, 3 * largest), inner_steps=1, weight_decay=0.1)
        losses = train(model, optimizer, batches(), 3)
        assert all(map(math.isfinite, losses)) and optimizer.skipped_steps == 0


def test_tied_embeddings_get_one_step():
    model = tiny(tie_word_embeddings=True)
    optimizer = MISA(model, lr=1e-2, delta=1.0, inner_steps=2, always_train=("embed_tokens",))
    before = weights(model)
    train(model, optimizer, batches(), 1)
    shift = (model.get_input_embeddings().weight - before["model.embed_tokens.weight"]).abs()
    assert 0 < shift.max() <= 1.01e-2  # one bias-corrected Adam step moves no weight by more than lr


def test_always_trained_parameters_train_in_every_round_and_are_not_decayed():
    model = tiny()
    optimizer = MISA(
        model, lr=1e-2, delta=DELTA, inner_steps=2, always_train=("norm", "embed_tokens"), weight_decay=0.5
    )
    always = set(optimizer.partition.always)
    assert "model.norm.weight" in always and "model.embed_tokens.weight" in always
    data = batches()
    for _ in range(6):
        before = weights(model)
        active = set(optimizer.active)
        train(model, optimizer, data, 1)
        assert changed(before, model) == active | always
    for group in optimizer.param_groups:
        plain = any(parameter.ndim < 2 for parameter in group["params"])
        embedding = any(parameter is model.get_input_embeddings().weight for parameter in group["params"])
        assert (group["weight_decay"] == 0) == (plain or embedding)


def test_weight_decay_reaches_active_units_only():
    model = tiny()
    optimizer = MISA(model, lr=0.1, delta=DELTA, inner_steps=10, weight_decay=0.5)
    before, active = weights(model), optimizer.active
    for name in active:
        parameter = model.get_parameter(name)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in active else before[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0)


def test_parameter_groups_by_pattern():
    model = tiny()
    groups = ({"pattern": "*.mlp.*", "lr": 1e-3, "weight_decay": 0.1}, {"pattern": "q_proj", "lr": 0.0})
    optimizer = MISA(model, lr=1e-2, delta=1.0, parameter_groups=groups)
    before = weights(model)
    train(model, optimizer, batches(), 1)
    for name, parameter in model.named_parameters():
        shift = (parameter - before[name]).abs().max().item()
        if "q_proj" in name:
            assert shift == 0
        elif "mlp" in name:
            assert 0.9e-3 < shift < 1.1e-3
        elif "_proj" in name:
            assert 0.9e-2 < shift < 1.1e-2


@pytest.mark.parametrize(
    "build",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    ],
)
def test_schedulers_move_the_learning_rate_that_is_used(build):
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=100, cold_start="none")
    scheduler = build(optimizer)
    twin_model = tiny()
    names = optimizer.active
    twin = torch.optim.AdamW([twin_model.get_parameter(name) for name in names], lr=1e-2, weight_decay=0.0)
    twin_scheduler = build(twin)
    data, twin_data = batches(), batches()
    for _ in range(6):
        loss_of(model, next(data)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss_of(twin_model, next(twin_data)).backward()
        twin.step()
        twin_scheduler.step()
        twin_model.zero_grad()
    for name in names:  # rounding differs from torch's order of operations: ~20x the worst seen
        torch.testing.assert_close(model.get_parameter(name), twin_model.get_parameter(name), rtol=0, atol=2e-5)


def test_delta_one_is_adamw():
    model, twin_model = tiny(), tiny()
    optimizer = MISA(model, lr=1e-3, delta=1.0, inner_steps=100, include_outside=True, weight_decay=0.01)
    names = optimizer.active
    decayed = [twin_model.get_parameter(name) for name in names if "embed_tokens" not in name]
    twin = torch.optim.AdamW(
        [{"params": decayed}, {"params": [twin_model.model.embed_tokens.weight], "weight_decay": 0.0}],
        lr=1e-3,
        weight_decay=0.01,
    )
    data, twin_data = batches(), batches()
    for _ in range(5):
        train(model, optimizer, data, 1)
        train(twin_model, twin, twin_data, 1)
        twin_model.zero_grad()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name), twin_model.get_parameter(name), rtol=0, atol=1e-5)


def test_bf16_split_master_follows_the_fp32_model():
    # The same gradients into a bf16 model with split masters and into fp32 copies of its weights: after any number of
    # steps the bf16 weights are the fp32 ones rounded half away from zero.
    model = tiny(dtype=torch.bfloat16)
    optimizer = MISA(model, lr=1e-4, delta=DELTA, inner_steps=30, cold_start="none", bias_correction=True)
    names = optimizer.active
    masters = {name: model.get_parameter(name).detach().float() for name in names}
    moments = {
        name: (torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64))
        for name, w in masters.items()
    }
    exact = {name: w.double() for name, w in masters.items()}
    data = batches()
    for step in range(1, 20):
        loss_of(model, next(data)).backward()
        for name in names:
            g = model.get_parameter(name).grad.double()
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            exact[name] -= 1e-4 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
    for name in names:
        # within half a bf16 ulp of the float64 trajectory (and a hair for fp32 arithmetic): nothing was lost
        ulp = 2.0 ** (torch.floor(torch.log2(exact[name].abs().clamp_min(1e-30))) - 7)
        assert ((model.get_parameter(name).double() - exact[name]).abs() <= 0.501 * ulp + 1e-9).all()
        assert not torch.equal(model.get_parameter(name), masters[name].bfloat16())


def test_events_tell_who_left_and_who_came():
    model = tiny()
    optimizer = MISA(model, delta=DELTA, inner_steps=2)
    seen = []
    handle = optimizer.on_switch(seen.append)
    before = optimizer.active
    train(model, optimizer, batches(), 12)
    for event in seen:
        assert set(event.left) == set(before) - set(event.active)
        assert set(event.came) == set(event.active) - set(before)
        assert set(event.kept) == set(event.active) & set(before)
        assert 0 < event.budget_share <= 1 and 0 <= event.entropy <= 1 and 0 < event.coverage <= 1
        before = event.active
    assert seen == list(optimizer.events)[1:] and before == optimizer.active
    handle.remove()
    train(model, optimizer, batches(), 4)
    assert len(seen) < len(optimizer.events) - 1


def test_the_switch_happens_inside_the_last_step_of_a_round():
    model = tiny()
    optimizer = MISA(model, delta=DELTA, inner_steps=3, cold_start="none")
    rounds = []
    for _ in range(7):
        rounds.append((optimizer.round, optimizer.inner_step))
        train(model, optimizer, batches(), 1)
    assert rounds == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_the_probe_sees_every_unit_in_rounds_of_one_step():
    model = tiny()
    optimizer = MISA(model, delta=DELTA, inner_steps=4)
    steps = 0
    while optimizer.tracker.round_length == 1:
        train(model, optimizer, batches(), 1)
        steps += 1
    assert steps < 3 / DELTA + len(optimizer.units) // 3
    assert all(score > 0 for score in optimizer.scores.values())


def test_global_generators_are_untouched():
    model = tiny()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    optimizer = MISA(model, delta=DELTA, inner_steps=1)
    train(model, optimizer, batches(), 5)
    assert torch.equal(torch.rand(3), expected)


def test_remove_gives_the_model_back():
    model = tiny()
    optimizer = MISA(model, delta=DELTA)
    train(model, optimizer, batches(), 2)
    optimizer.remove()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    loss_of(model, next(batches())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    MISA(model, delta=DELTA)


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
    optimizer = MISA(model, delta=DELTA, inner_steps=2, seed=1)
    train(model, optimizer, batches(), 9)
    saved = copy.deepcopy(optimizer.state_dict())
    other = tiny()
    resumed = MISA(other, delta=DELTA, inner_steps=2, seed=1)
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


def test_8_bit_moments_learn_like_float32_ones():
    # Three seeds each, a Markov chain over 64 tokens: the difference of the means must be within the spread of seeds.
    ends = {"float32": [], "int8": []}
    for state_dtype, losses in ends.items():
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            successor = torch.randint(3, 64, (64, 2), generator=torch.Generator().manual_seed(9))
            model = tiny("llama", torch.bfloat16)
            options = {"lr": 3e-3, "delta": 0.4, "inner_steps": 10, "include_outside": True, "seed": seed}
            optimizer = MISA(model, state_dtype=state_dtype, max_grad_norm=1.0, **options)

            def chain(generator=generator, successor=successor):
                while True:
                    ids = torch.randint(3, 64, (16, 1), generator=generator)
                    for _ in range(23):
                        choice = torch.randint(2, (16, 1), generator=generator)
                        ids = torch.cat([ids, successor[ids[:, -1:].squeeze(1)].gather(1, choice)], 1)
                    yield ids

            losses.append(statistics.mean(train(model, optimizer, chain(), 150)[-10:]))
    plain, eight = ends["float32"], ends["int8"]
    assert max(plain) < 2.5  # from log 64 = 4.16: it has learnt, and the floor is log 2 = 0.69
    assert abs(statistics.mean(plain) - statistics.mean(eight)) < max(plain) - min(plain) + 0.02


@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_a_round_that_ends_early_is_a_round_with_fewer_steps(update_in):
    def run(inner_steps, by_hand):
        model = tiny()
        optimizer = MISA(model, lr=1e-2, delta=DELTA, inner_steps=inner_steps, cold_start="none", update_in=update_in)
        data = batches()
        for _ in range(4):
            train(model, optimizer, data, 3)
            if by_hand:
                optimizer.end_round()
        return optimizer, weights(model)

    (early, a), (timely, b) = run(100, True), run(3, False)
    assert early.round == timely.round == 4 and early.inner_step == timely.inner_step == 0
    assert early.active == timely.active and early.scores == timely.scores
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_round_that_ends_without_a_step_leaves_scores_and_weights_alone():
    model = tiny()
    optimizer = MISA(model, delta=DELTA, inner_steps=5, cold_start="none")
    before, scores = weights(model), optimizer.scores
    loss_of(model, next(batches())).backward()
    optimizer.end_round()
    assert optimizer.round == 1 and optimizer.scores == scores and not changed(before, model)
    assert all(parameter.grad is None for parameter in model.parameters())

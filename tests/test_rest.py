"""The rest rule in the optimizer: what moves, when, by how much, and that it resumes exactly."""

import copy
import io

import pytest
import torch

from misa_engine.method.config import REST_RATES
from resting import active, backward, build, matrices, moved_in_one_pass
from training import batches, changed, loss_of, tiny, train, weights

RULES = tuple(REST_RATES)


@pytest.mark.parametrize("update_in", ["step", "backward"])
@pytest.mark.parametrize("rule", RULES)
def test_each_resting_matrix_takes_the_rules_step_and_nothing_else_moves(rule, update_in):
    model, twin = tiny(), tiny()
    optimizer = build(model, rest=rule, update_in=update_in)
    data = batches()
    loss_of(twin, next(batches())).backward()
    before, drawn = weights(model), active(optimizer)
    backward(model, data)
    resting = matrices(model, optimizer) - drawn
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in drawn)
    optimizer.step()
    assert changed(before, model) == resting | drawn  # embeddings, head and norms stay
    rate = 1e-3 * REST_RATES[rule]
    for name in resting:
        gradient = twin.get_parameter(name).grad
        moved = before[name] - model.get_parameter(name).detach()
        if rule == "sign":
            expected = gradient.sign() * rate
        elif rule == "row_norm":
            expected = rate * gradient / gradient.square().mean(1, keepdim=True).sqrt()
        elif rule == "sgd":
            expected = rate * gradient
        else:
            continue  # tests/test_rest_kernels.py holds it to its formula
        # one rounding of a weight of about 0.1
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=2e-8)


def test_rest_none_moves_nothing_but_what_is_drawn():
    model = tiny()
    optimizer, data = build(model, rest="none"), batches()
    for _ in range(7):
        before, drawn = weights(model), active(optimizer)
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == drawn
        train(model, optimizer, data, 1)
        assert changed(before, model) == drawn


@pytest.mark.parametrize("rule", RULES)
def test_the_drawn_part_is_trained_as_ever(rule):
    """In the first step, before the rest has changed the model, active matrices move as they do without a rule."""
    plain, resting = tiny(), tiny()
    without, with_rule = build(plain, rest="none"), build(resting, rest=rule)
    assert without.active == with_rule.active
    for model, optimizer in ((plain, without), (resting, with_rule)):
        backward(model, batches())
        optimizer.step()
    for name in active(without):
        assert torch.equal(plain.get_parameter(name), resting.get_parameter(name))


def test_embeddings_and_head_move_with_rest_outside_and_patterns_stay_frozen():
    model = tiny()
    optimizer = build(model, rest_outside=True, frozen=("*.mlp.*",))
    before = weights(model)
    train(model, optimizer, batches(), 1)
    moved = changed(before, model)
    assert {"model.embed_tokens.weight"} <= moved and not any(".mlp." in name for name in moved)
    assert not any("norm" in name for name in moved)
    batch = set(next(batches())[:, :-1].flatten().tolist())  # nothing follows a last token
    embedding, untouched = model.get_parameter("model.embed_tokens.weight"), before["model.embed_tokens.weight"]
    rows = {row for row in range(len(embedding)) if not torch.equal(embedding[row], untouched[row])}
    if not model.config.tie_word_embeddings:
        assert rows == batch  # the others' rows have no gradient


def test_a_tied_head_moves_once_by_the_sum_of_both_uses():
    name = "model.embed_tokens.weight"
    _, optimizer, moved, twin = moved_in_one_pass(architecture={"tie_word_embeddings": True}, rest_outside=True)
    gradient = twin.get_parameter(name).grad
    torch.testing.assert_close(moved[name], gradient.sign() * 3e-4, rtol=1e-4, atol=2e-8)
    optimizer.step()


def test_scope_above_moves_only_what_lies_above_the_lowest_trained_matrix():
    model = tiny(num_hidden_layers=4)
    order = [name for name, _ in model.named_parameters()]
    optimizer = build(model, rest_scope="above", rule="static", static_weights={"*.layers.2.*": 1e12})
    lowest = min(order.index(name) for name in active(optimizer))
    before = weights(model)
    train(model, optimizer, batches(), 1)
    moved = changed(before, model) - active(optimizer)
    assert moved == {n for n in matrices(model, optimizer) - active(optimizer) if order.index(n) > lowest} and moved
    seen = []
    for _ in range(12):
        train(model, optimizer, batches(), 1)
        low = min(order.index(name) for name in active(optimizer))
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(order.index(name) >= low for name in trainable)
        seen.append(low)


def test_every_k_steps_they_move_k_times_as_far_and_cost_nothing_in_between():
    model = tiny()
    optimizer = build(model, rest_every=3, inner_steps=100)
    data, resting = batches(), matrices(model, optimizer) - active(optimizer)
    for step in range(1, 7):
        before = weights(model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == (active(optimizer) | resting if step % 3 == 0 else active(optimizer))
        train(model, optimizer, data, 1)
        moved = changed(before, model) - active(optimizer)
        assert moved == (resting if step % 3 == 0 else set())
    name = next(iter(resting))
    step = (before[name] - model.get_parameter(name)).abs().max().item()
    assert step == pytest.approx(3 * 3e-4, rel=1e-3)


def test_with_accumulation_the_last_micro_batch_moves_them_once():
    model, twin = tiny(), tiny()
    optimizer = build(model)
    first, last = (next(batches(seed)) for seed in (1, 2))
    before, drawn = weights(model), active(optimizer)
    optimizer.last_micro_batch = False
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == drawn
    (loss_of(model, first) / 2).backward()
    assert changed(before, model) == set()
    optimizer.last_micro_batch = True
    (loss_of(model, last) / 2).backward()
    loss_of(twin, last).backward()
    name = sorted(matrices(model, optimizer) - drawn)[0]
    moved = before[name] - model.get_parameter(name).detach()
    torch.testing.assert_close(moved, 3e-4 * twin.get_parameter(name).grad.sign(), rtol=1e-4, atol=2e-8)
    optimizer.step()


def test_where_nobody_names_the_last_micro_batch_the_first_moves_them():
    model = tiny()
    optimizer = build(model)
    data, before = batches(), weights(model)
    backward(model, data)
    after_first = weights(model)
    moved = changed(before, model)
    assert moved == matrices(model, optimizer) - active(optimizer)
    backward(model, data)
    assert changed(after_first, model) == set()
    optimizer.step()
    before = weights(model)
    backward(model, data)
    assert changed(before, model)  # the next step begins anew


def test_a_gradient_that_is_not_finite_moves_only_what_is_finite():
    model = tiny()
    optimizer = build(model)
    target = sorted(matrices(model, optimizer) - active(optimizer))[0]
    model.get_parameter(target).register_hook(lambda gradient: gradient * torch.nan)
    before = weights(model)
    train(model, optimizer, batches(), 1)
    assert target not in changed(before, model) and len(changed(before, model)) > 3


@pytest.mark.parametrize("options", [{}, {"rest": "row_norm", "rest_every": 2}, {"rest_scope": "above"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_run(dtype, options):
    model = tiny(dtype=dtype)
    optimizer = build(model, rest_outside=True, **options)
    data = batches()
    train(model, optimizer, data, 4)  # in the midst of a round, and of a pair of steps
    stored = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], stored)
    train(model, optimizer, data, 6)

    again = tiny(dtype=dtype)
    resumed = build(again, rest_outside=True, seed=0, **options)
    stored.seek(0)
    model_state, optimizer_state = torch.load(stored, weights_only=True)
    again.load_state_dict(model_state)
    resumed.load_state_dict(optimizer_state)
    rest = batches()
    for _ in range(4):
        next(rest)
    train(again, resumed, rest, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_state_from_before_the_rest_rule_loads_and_another_rule_is_refused():
    model = tiny()
    optimizer = build(model, rest="none")
    state = copy.deepcopy(optimizer.state_dict())
    for option in ("rest", "rest_lr", "rest_scope", "rest_every", "rest_outside"):
        state["misa"]["config"].pop(option, None)
    optimizer.load_state_dict(state)
    optimizer.remove()
    with pytest.raises(ValueError, match="rest: 'none' in the checkpoint, 'sign' here"):
        build(model).load_state_dict(state)


def test_two_seeds_round_differently_and_one_seed_alike():
    def run(seed):
        model = tiny(dtype=torch.bfloat16)
        # drawn uniformly and cyclically: the seed decides the rounding alone
        train(model, build(model, rule="cyclic", seed=seed, leave_rounding="nearest"), batches(), 3)
        return weights(model)

    first, same, other = run(1), run(1), run(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_conv1d_normalises_its_columns():
    model, optimizer, moved, twin = moved_in_one_pass("gpt2", rest="row_norm")
    name = sorted(n for n in matrices(model, optimizer) - active(optimizer) if "c_" in n)[0]
    gradient = twin.get_parameter(name).grad
    expected = 3e-4 * gradient / gradient.square().mean(0, keepdim=True).sqrt()
    torch.testing.assert_close(moved[name], expected, rtol=1e-3, atol=2e-8)
    optimizer.step()


def test_checkpointing_changes_nothing():
    plain, checkpointed = tiny(), tiny()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        train(model, build(model, rest_outside=True), batches(), 5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True))


def test_learning_rates_come_from_the_groups_and_the_scheduler():
    model = tiny()
    optimizer = build(model, parameter_groups=({"pattern": "*.mlp.*", "lr": 5e-3},))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    data = batches()
    for step in range(3):
        before, resting = weights(model), matrices(model, optimizer) - active(optimizer)
        train(model, optimizer, data, 1)
        for name in resting:
            lr = (5e-3 if ".mlp." in name else 1e-3) * 0.5**step
            assert (before[name] - model.get_parameter(name)).abs().max().item() == pytest.approx(0.3 * lr, rel=1e-2)
        scheduler.step()


def test_remove_and_memory():
    model = tiny()
    optimizer = build(model, rest_outside=True)
    largest = max(parameter.shape[0] for parameter in model.parameters()), max(p.shape[-1] for p in model.parameters())
    numbers = sum(largest) + max(largest) + 3 * sum(p.ndim >= 2 for p in model.parameters()) + 1
    assert optimizer.memory()["rest"] == 4 * numbers
    optimizer.remove()
    before = weights(model)
    backward(model, batches())
    assert changed(before, model) == set() and all(p.grad is not None for p in model.parameters())
    assert "rest" not in build(tiny(), rest="none").memory()


def test_only_one_gradient_of_what_rests_is_alive_at_a_time():
    model = tiny()
    optimizer = build(model)
    alive, most = set(), 0

    def watch(name):
        def hook(parameter):
            nonlocal most
            alive.add(name) if parameter.grad is not None else alive.discard(name)
            most = max(most, sum(model.get_parameter(n).grad is not None for n in resting))

        return hook

    resting = matrices(model, optimizer) - active(optimizer)
    for name in resting:
        model.get_parameter(name).register_post_accumulate_grad_hook(watch(name))
    train(model, optimizer, batches(), 1)
    assert most <= 1 and not alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("revisit", ["clear", "keep", "offload"])
def test_it_goes_with_every_way_to_keep_moments(revisit, dtype):
    model = tiny(dtype=dtype)
    optimizer = build(model, rest="row_norm", revisit=revisit, inner_steps=1, rest_outside=True)
    losses = train(model, optimizer, batches(), 12)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and losses[-1] < losses[0] + 1


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_in_units_of_several_parameters_only_matrices_rest(granularity):
    model = tiny(num_hidden_layers=4)
    optimizer = build(model, granularity=granularity, delta=0.5, rest_scores=True)
    before, drawn = weights(model), active(optimizer)
    train(model, optimizer, batches(), 1)
    resting = changed(before, model) - drawn
    assert resting == matrices(model, optimizer) - drawn and resting
    train(model, optimizer, batches(), 5)


def test_a_loss_that_is_not_a_number_moves_nothing():
    model = tiny()
    optimizer = build(model, rest_outside=True)
    before = weights(model)
    (loss_of(model, next(batches())) * torch.nan).backward()
    optimizer.step()
    assert changed(before, model) == set()


def test_a_graph_from_before_the_move_is_refused_by_torch():
    model = tiny()
    build(model)
    loss = loss_of(model, next(batches()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stacked_experts_are_normalised_one_by_one():
    model, optimizer, moved, twin = moved_in_one_pass("mixtral", rest="sinkhorn")
    stacked = [n for n in sorted(matrices(model, optimizer) - active(optimizer)) if moved[n].ndim == 3]
    for name in stacked:
        gradient = twin.get_parameter(name).grad
        step = moved[name] / (1e-3 * REST_RATES["sinkhorn"])
        for expert in range(len(gradient)):
            if gradient[expert].abs().sum() > 0:  # an expert that saw tokens
                assert step[expert].square().mean().sqrt().item() == pytest.approx(1.0, abs=0.05)
    assert stacked
    optimizer.step()


def test_generation_and_evaluation_do_not_move_anything():
    model = tiny()
    build(model, rest_outside=True)
    before = weights(model)
    with torch.no_grad():
        loss_of(model, next(batches()))
    torch.autograd.grad(loss_of(model, next(batches())), [p for p in model.parameters() if p.requires_grad])
    assert changed(before, model) == set()


def test_a_grad_scaler_is_refused_for_sgd_and_makes_no_difference_to_the_others():
    def run(scaled, rule):
        model = tiny()
        optimizer = build(model, rest=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        scaler.scale(loss_of(model, next(batches()))).backward()
        scaler.step(optimizer)
        scaler.update()
        return weights(model)

    plain, scaled = run(False, "row_norm"), run(True, "row_norm")
    # 1024 is a power of two: the same bits
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)
    with pytest.raises(ValueError, match="rest='sgd'"):
        run(True, "sgd")

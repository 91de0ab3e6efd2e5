"""update_in="backward": the same updates, made as the gradients arrive, with no gradient held."""

import math

import pytest
import torch
from torch import nn

from misa_engine import MISA, MisaConfig
from misa_engine.method.config import PRESETS
from training import batches, changed, loss_of, tiny, train, weights


def both(dtype=torch.float32, family="llama", **options):
    pair = []
    for update_in in ("step", "backward"):
        model = tiny(family, dtype)
        pair.append((model, MISA(model, lr=1e-2, update_in=update_in, gemm_gradients=False, **options)))
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_both_schedules_give_the_same_bits(preset, dtype):
    (a, step), (b, backward) = both(dtype, delta=0.3, inner_steps=3, preset=preset, always_train=("*norm*",))
    for model, optimizer in ((a, step), (b, backward)):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=30)
        data = batches()
        for _ in range(40):
            loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert step.active == backward.active and step.scores == backward.scores
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert float(step.grad_norm) == pytest.approx(float(backward.grad_norm), rel=1e-6)


def test_no_gradient_outlives_its_arrival_and_no_slot_is_allocated():
    model = tiny()
    optimizer = MISA(model, rest="none", lr=1e-2, delta=0.5, update_in="backward", cold_start="none")
    most = 0

    def watch(_):
        nonlocal most
        most = max(most, sum(p.grad.numel() for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(watch)
    before = weights(model)
    loss_of(model, next(batches())).backward()
    assert changed(before, model) == set(optimizer.active)  # before step()
    assert most == 0 and all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert "gradients" not in optimizer.memory() and optimizer.arena.grad is None


def test_accumulation_uses_the_sum_in_the_last_pass():
    (a, step), (b, backward) = both(delta=0.3, inner_steps=2)
    for model, optimizer in ((a, step), (b, backward)):
        data = batches()
        for _ in range(10):
            for micro in range(3):
                optimizer.last_micro_batch = micro == 2
                loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_of_unfinished_accumulation_are_used_by_step():
    (a, step), (b, backward) = both(delta=0.3, inner_steps=5)
    for model, optimizer in ((a, step), (b, backward)):
        optimizer.last_micro_batch = False  # nobody ever says which pass is the last
        train(model, optimizer, batches(), 7)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_second_gradient_in_one_step_is_refused():
    model = tiny()
    MISA(model, lr=1e-2, delta=0.3, update_in="backward")
    loss_of(model, next(batches())).backward()
    with pytest.raises(RuntimeError, match="last_micro_batch"):
        loss_of(model, next(batches())).backward()


def test_clipping_is_refused_wherever_it_is_asked_for():
    with pytest.raises(ValueError, match="max_grad_norm"):
        MisaConfig(update_in="backward", max_grad_norm=1.0)
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=0.3, update_in="backward")
    loss_of(model, next(batches())).backward()
    with pytest.raises(ValueError, match="update_in='step'"):
        optimizer.clip_grad_norm_(1.0)
    assert float(optimizer.clip_grad_norm_(math.inf)) > 0  # measuring is free
    with pytest.raises(ValueError, match="grad_dtype"):
        MisaConfig(update_in="backward", grad_dtype="float32")


def test_a_non_finite_gradient_skips_its_matrix_and_no_other():
    model = tiny()
    optimizer = MISA(model, rest="none", lr=1e-2, delta=0.3, inner_steps=4, update_in="backward", cold_start="none")
    bad = optimizer.active[0]
    handle = model.get_parameter(bad).register_hook(lambda gradient: gradient * math.nan)
    before = weights(model)
    train(model, optimizer, batches(), 3)
    assert changed(before, model) == set(optimizer.active) - {bad}
    handle.remove()
    train(model, optimizer, batches(), 1)
    assert optimizer.skipped_steps == 3
    assert all(math.isfinite(score) for score in optimizer.scores.values())


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_is_bitwise_exact_and_may_change_the_schedule(stop, tmp_path):
    def run(schedules):
        model, optimizer, data = tiny("llama", torch.bfloat16), None, batches()
        for update_in, steps in schedules:
            state = optimizer and optimizer.state_dict()
            if optimizer is not None:
                torch.save(state, tmp_path / "state.pt")
                optimizer.remove()
            optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=4, update_in=update_in, gemm_gradients=False)
            if state is not None:
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            train(model, optimizer, data, steps)
        return weights(model)

    whole = run([("backward", 20)])
    for schedules in ([("backward", stop), ("backward", 20 - stop)], [("step", stop), ("backward", 20 - stop)]):
        parts = run(schedules)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_used_twice_are_updated_after_their_last_use():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for layer in (*self.layers, *self.layers):
                x = layer(x).tanh()
            return x

    results = []
    for update_in in ("step", "backward"):
        model = Reused()
        optimizer = MISA(model, lr=1e-2, delta=1.0, update_in=update_in, gemm_gradients=False, cold_start="none")
        for k in range(5):
            model(torch.full((2, 8), 0.1 * k)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_trainer_says_which_micro_batch_is_the_last(tmp_path):
    transformers = pytest.importorskip("transformers")
    from misa_engine.trainer import MisaMixin

    class MisaTrainer(MisaMixin, transformers.Trainer):
        pass

    rows = [{"input_ids": row, "labels": row} for row in next(batches(size=24))]
    results = []
    for update_in in ("step", "backward"):
        model = tiny()
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / update_in),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            learning_rate=1e-2,
            max_grad_norm=0,
            max_steps=4,
            report_to=[],
            use_cpu=True,
        )
        misa = {"delta": 0.3, "inner_steps": 2, "update_in": update_in, "gemm_gradients": False}
        MisaTrainer(model=model, args=args, misa=misa, train_dataset=rows).train()
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    args.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        MisaTrainer(model=tiny(), args=args, misa={"delta": 0.3, "update_in": "backward"}, train_dataset=rows)

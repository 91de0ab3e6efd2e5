"""MISA inside what people put around an optimizer: checkpointing, torch.compile, accelerate."""

import pytest
import torch
from accelerate import Accelerator

from misa_engine import MISA
from training import batches, loss_of, tiny, train, weights


def enable_checkpointing(model):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_recomputes_no_layer_below_the_lowest_active_one(when):
    model = tiny(num_hidden_layers=6)
    if when == "before":
        enable_checkpointing(model)
    optimizer = MISA(model, rest="none", lr=1e-3, delta=0.1, inner_steps=1, seed=2)
    if when == "after":
        enable_checkpointing(model)
    calls = [0] * 6
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    layers = {unit.name: unit.layer for unit in optimizer.units}
    lowest_seen = set()
    for _ in range(8):
        lowest = min(layers[name] for name in optimizer.active)
        lowest_seen.add(lowest)
        calls[:] = [0] * 6
        train(model, optimizer, batches(), 1)
        assert calls == [1] * lowest + [2] * (6 - lowest)
    assert max(lowest_seen) > 0


def test_checkpointing_changes_no_weight():
    def run(checkpointing):
        model = tiny()
        if checkpointing:
            enable_checkpointing(model)
        train(model, MISA(model, lr=1e-2, delta=0.3, inner_steps=2), batches(), 8)
        return weights(model)

    a, b = run(False), run(True)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_layers_compiled_one_by_one_follow_the_active_set():
    # aot_eager: the guards on requires_grad and the traced backward are what could go wrong, not the code generator
    def run(compiled):
        torch._dynamo.reset()
        model = tiny()
        optimizer = MISA(model, lr=1e-3, delta=0.3, inner_steps=1)
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        train(model, optimizer, batches(), 12)
        return weights(model)

    eager, compiled = run(False), run(True)
    for name in eager:  # decomposed operations round differently, and Adam amplifies it; ~10x the worst seen
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=1e-4)


def test_a_model_compiled_as_a_whole_is_told_what_that_costs(caplog, monkeypatch):
    from torch._dynamo.backends.common import aot_autograd

    from misa_engine.engine.gemm_gradients import GemmGradients

    torch._dynamo.reset()
    compiled_at, written, rounds = [], [], []
    write = GemmGradients.write
    monkeypatch.setattr(GemmGradients, "write", lambda self, *given: written.append(1) or write(self, *given))
    model = torch.compile(tiny(), backend=aot_autograd(fw_compiler=lambda graph, _: compiled_at.append(1) or graph))
    optimizer = MISA(model, lr=1e-3, delta=0.3, inner_steps=1)
    (told,) = [record.getMessage() for record in caplog.records if "compiled as a whole" in record.getMessage()]
    limit = torch._dynamo.config.recompile_limit  # 8, unless somebody has set it, as another test may
    assert f"after {limit} of them" in told and "copied into their slots" in told and "layer.compile()" in told
    assert "\n" not in told
    for _ in range(3):  # what is said is what happens
        before = len(compiled_at)
        train(model, optimizer, batches(), 1)
        rounds.append(len(compiled_at) > before)
    assert all(rounds) and not written
    torch._dynamo.reset()


def test_a_plain_model_is_told_nothing_of_compilation(caplog):
    MISA(tiny(), lr=1e-3, delta=0.3)
    assert not any("compiled" in record.getMessage() for record in caplog.records)


def test_accelerate_prepares_and_steps_it():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny()
    optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)
    plain = tiny()
    twin = MISA(plain, lr=1e-2, delta=0.3, inner_steps=2)
    data, twin_data = batches(), batches()
    for update in range(5):
        for _ in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, next(data)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
        for group in twin.param_groups:
            group["lr"] = 1e-2 * 0.5**update
        for _ in range(2):
            (loss_of(plain, next(twin_data)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        twin.step()
        twin.zero_grad()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert optimizer.total_steps == 5

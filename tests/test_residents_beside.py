"""Residents beside everything else: checkpointing, schedules, autocast, generation, transforms, what always trains."""

import pytest
import torch

from misa_engine.engine.residents import rest
from resident_models import of, optimizer_for, resting, snapshot, twin
from training import batches, loss_of, tiny, train, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_and_accumulation_change_nothing(dtype):
    results = []
    for recompute in (False, True):
        model = resting("int8", dtype)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, data = optimizer_for(model), batches()
        for _ in range(6):
            for last in (False, True):
                optimizer.last_micro_batch = last
                loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_both_schedules_make_the_same_bits():
    results = []
    for when in ("step", "backward"):
        model = resting("int8", torch.bfloat16)
        train(model, optimizer_for(model, update_in=when), batches(), 7)
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_generation_and_evaluation_in_mid_run_equal_the_plain_model():
    model = resting()
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(), 5)
    plain, ids = twin(model).eval(), next(batches())
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    made = [m.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*made)
    model.train()
    train(model, optimizer, batches(), 5)


@pytest.mark.parametrize(("dtype", "auto"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_autocast_multiplies_in_its_own_dtype(dtype, auto):
    model = resting("int8", dtype)
    optimizer_for(model)
    plain, ids = twin(model), next(batches())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    losses = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype=auto):
            loss = loss_of(m, ids)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad)


def test_a_wrong_input_dtype_fails_as_in_a_plain_layer():
    model = resting("int8", torch.bfloat16)
    layer = model.get_submodule(of(model).names[0].removesuffix(".weight"))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.zeros(2, layer.in_features))


def test_second_derivatives_and_transforms():
    model = resting()
    optimizer_for(model)
    layer = model.get_submodule(of(model).resting[0].removesuffix(".weight"))
    w = of(model).expanded(of(model).resting[0])
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 3 * (x @ w.T) ** 2 @ w)
    (again,) = torch.autograd.grad(dx.sum(), x)
    (expected,) = torch.autograd.grad((3 * (x @ w.T) ** 2 @ w).sum(), x)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x.detach()), x.detach() @ w.T)
    torch.testing.assert_close(torch.func.jvp(layer, (x.detach(),), (x.detach(),))[1], x.detach() @ w.T)
    torch.testing.assert_close(layer(x[0]), w @ x[0])  # one token


def test_a_compiled_layer_breaks_its_graph_at_what_rests():
    model = resting()
    plain, x = twin(model).model.layers[0].mlp, torch.randn(2, 3, 32)
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


def test_biases_train_beside_resting_weights():
    model = tiny("qwen2")
    rest(model, "int8")
    optimizer = optimizer_for(model, always_train=("bias",))
    before = weights(model)
    train(model, optimizer, batches(), 3)
    moved = [name for name, p in model.named_parameters() if name.endswith("bias") and not torch.equal(p, before[name])]
    assert moved


def test_a_matrix_that_is_always_trained_does_not_rest():
    model = resting()
    optimizer = optimizer_for(model, always_train=("*.0.self_attn.q_proj.weight",))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name not in of(model) and name not in of(model).names
    before = weights(model)
    train(model, optimizer, batches(), 6)
    assert not torch.equal(model.get_parameter(name), before[name])

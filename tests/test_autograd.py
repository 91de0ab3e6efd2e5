"""A gradient enters a slot only when autograd would have accumulated it: entry points give plain torch's numbers."""

import copy

import pytest
import torch
from torch import nn

from misa_engine import MISA
from misa_engine.engine import update
from training import batches, loss_of, tiny, train

EVERYTHING = {"delta": 1.0, "inner_steps": 100, "cold_start": "none", "lr": 1e-3}


class Net(nn.Module):
    """Two layers that can be drawn, smooth, so that second derivatives are something."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def pair(always=("bias",)):
    """The same network twice: under MISA with everything active, and alone."""
    torch.manual_seed(0)
    ours = Net()
    plain = copy.deepcopy(ours)
    return ours, MISA(ours, always_train=always, **EVERYTHING), plain


def sample():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()


def loss(model, x):
    return model(x).square().sum()


def gradients(model):
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_same(ours, plain):
    a, b = gradients(ours), gradients(plain)
    for name in b:
        assert (a[name] is None) == (b[name] is None), name
        if b[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_network_of_these_tests_uses_the_gemm_path():
    ours, optimizer, _ = pair()
    loss(ours, sample()).backward()
    low = optimizer.arena.grad.data_ptr()
    for module in ours.modules():
        if isinstance(module, nn.Linear):
            assert "forward" in module.__dict__
            assert low <= module.weight.grad.data_ptr() < low + optimizer.arena.grad.nbytes


ENTRIES = {
    "grad of the input": lambda model, x: torch.autograd.grad(loss(model, x), x),
    "backward into the input": lambda model, x: loss(model, x).backward(inputs=[x]),
    "grad of a weight": lambda model, x: torch.autograd.grad(loss(model, x), model.layers[0][0].weight),
    "grad of everything": lambda model, x: torch.autograd.grad(loss(model, x), [x, *model.parameters()]),
    "backward into one weight": lambda model, x: loss(model, x).backward(inputs=[model.layers[1][2].weight]),
    "retained graph": lambda model, x: [(y := loss(model, x)).backward(retain_graph=True), y.backward()],
    "batched gradients": lambda model, x: torch.autograd.grad(
        model(x), model.layers[0][2].weight, torch.eye(30).view(30, 5, 6), is_grads_batched=True
    ),
    "jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x[0]),
    "hessian": lambda model, x: torch.autograd.functional.hessian(lambda x: loss(model, x), x[0]),
    "forward mode": lambda model, x: torch.autograd.functional.jvp(model, x, x.detach()),
    "dual numbers": lambda model, x: dual(model, x),
    "func.grad": lambda model, x: torch.func.grad(lambda x: loss(model, x))(x),
    "func.vmap": lambda model, x: torch.func.vmap(model)(x),
    "func.jacrev": lambda model, x: torch.func.jacrev(model)(x[0]),
    "func.jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "per-sample gradients": lambda model, x: torch.func.vmap(
        torch.func.grad(lambda w, x: torch.func.functional_call(model, w, (x,)).square().sum()), (None, 0)
    )({name: p.detach() for name, p in model.named_parameters()}, x.detach()),
    "trace": lambda model, x: torch.jit.trace(model, x)(x),
}


def dual(model, x):
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(model(made)).tangent.clone()


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_point_gives_what_plain_torch_gives_and_leaves_the_rest_alone(entry):
    ours, _, plain = pair()
    for model in (ours, plain):  # gradients of an earlier micro-batch, to be left alone or added to
        loss(model, sample() / 2).backward()
    x, y = sample(), sample()
    found, expected = ENTRIES[entry](ours, x), ENTRIES[entry](plain, y)
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert_same(ours, plain)
    assert (x.grad is None) == (y.grad is None)
    for model in (ours, plain):
        loss(model, sample()).backward()
    assert_same(ours, plain)


def test_adversarial_pass_between_two_backwards_does_not_count():
    ours, optimizer, plain = pair()
    twin = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(4):
        for model, stepper in ((ours, optimizer), (plain, twin)):
            x = sample()
            (delta,) = torch.autograd.grad(loss(model, x), x)
            loss(model, x.detach() + 0.1 * delta.sign()).backward()
            stepper.step()
            stepper.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_other_weights_get_their_own_gradients():
    ours, _, plain = pair()
    for model in (ours, plain):
        others = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        torch.func.functional_call(model, others, (sample(),)).square().sum().backward()
        model.others = others
    assert all(p.grad is None for p in ours.parameters())
    for name, tensor in plain.others.items():
        torch.testing.assert_close(ours.others[name].grad, tensor.grad)


def test_second_derivatives_are_right():
    def penalised(model):
        x = sample()
        (slope,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
        (loss(model, x) + slope.square().sum()).backward()

    def trace_of_hessian(model):
        weight = model.layers[1][2].weight
        (slope,) = torch.autograd.grad(loss(model, sample()), weight, create_graph=True)
        return sum(
            torch.autograd.grad(g, weight, retain_graph=True)[0].view(-1)[i] for i, g in enumerate(slope.view(-1))
        )

    ours, _, plain = pair()
    torch.testing.assert_close(trace_of_hessian(ours), trace_of_hessian(plain))
    penalised(ours), penalised(plain)
    assert_same(ours, plain)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradient_with_a_graph_can_be_differentiated_and_is_used_by_the_step():
    ours, optimizer, plain = pair()
    twin = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for model in (ours, plain):
        loss(model, sample()).backward(create_graph=True)
        sum(p.grad.square().sum() for p in model.parameters()).backward()
    assert_same(ours, plain)
    optimizer.step(), twin.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_hook_of_the_user_on_a_weight_sees_and_changes_the_gradient(micro_batches):
    ours, _, plain = pair()
    seen = {}
    for model in (ours, plain):
        mask = torch.ones(6, 6).tril()
        handle = model.layers[0][0].weight.register_hook(lambda g, m=model, mask=mask: seen.setdefault(m, g) * mask)
        for _ in range(micro_batches):
            loss(model, sample()).backward()
        handle.remove()
    assert_same(ours, plain)
    torch.testing.assert_close(seen[ours], seen[plain])
    assert not ours.layers[0][0].weight.grad.triu(1).any()


def test_hooks_after_accumulation_and_multi_grad_hooks_are_served():
    ours, _, plain = pair()
    for model in (ours, plain):
        model.seen, weight = [], model.layers[0][0].weight
        weight.register_post_accumulate_grad_hook(lambda p, m=model: m.seen.append(p.grad.sum()))
        torch.autograd.graph.register_multi_grad_hook(
            (weight, model.layers[1][0].weight), lambda found, m=model: m.seen.extend(g.sum() for g in found)
        )
        loss(model, sample()).backward()
    assert len(ours.seen) == 3
    torch.testing.assert_close(ours.seen, plain.seen)


def test_gradient_tensor_of_the_caller_is_added_to():
    ours, _, plain = pair()
    for model in (ours, plain):
        model.layers[0][0].weight.grad = torch.full((6, 6), 3.0)
        loss(model, sample()).backward()
    assert_same(ours, plain)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_graph_from_before_a_step_is_refused_as_by_torch(update_in, by_kernel, monkeypatch):
    if by_kernel:  # one writes through addresses, and autograd does not see it

        def write(gradient, m, v, residual, sums, table, **rest):
            for slot in table.slots:
                slot.weight.data.add_(1.0)

        monkeypatch.setattr(update, "adamw", write)
    torch.manual_seed(0)
    model = Net()
    optimizer = MISA(model, update_in=update_in, always_train=("bias",), **EVERYTHING)
    old = loss(model, sample())
    versions = [p._version for p in model.parameters()]
    loss(model, sample()).backward()
    optimizer.step()
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_graph_that_needs_no_changed_weight_is_walked_as_by_torch():
    ours, optimizer, plain = pair()
    twin = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for model, stepper in ((ours, optimizer), (plain, twin)):
        old = model.layers[0][0](sample().detach()).sum()  # nn.Linear keeps its weight only for the input's gradient
        loss(model, sample()).backward()
        stepper.step()
        stepper.zero_grad()
        old.backward()
    assert_same(ours, plain)


@pytest.mark.parametrize("gemm", [True, False])
def test_graph_from_before_a_switch_is_an_error_of_torch_or_one_that_says_so(gemm):
    model = tiny()
    optimizer = MISA(model, delta=0.3, inner_steps=1, gemm_gradients=gemm, rule="cyclic")
    data = batches()
    for _ in range(6):
        old = loss_of(model, next(data))
        train(model, optimizer, data, 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation|is from before the last switch"):
            old.backward()
        model.zero_grad()


def test_graph_from_before_removal_is_plain_torch():
    ours, optimizer, plain = pair()
    old, expected = loss(ours, sample()), loss(plain, sample())
    optimizer.remove()
    old.backward(), expected.backward()
    assert_same(ours, plain)

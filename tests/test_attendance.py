"""Models that skip layers, and active matrices that never receive a gradient."""

import warnings

import pytest
import torch
from torch import nn

from misa_engine import MISA
from misa_engine.engine.attendance import GraphAnchor
from training import batches, loss_of, tiny, train, weights


@pytest.mark.parametrize("gemm", [True, False])
@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_step_in_which_all_active_layers_are_skipped_is_empty_and_counted(update_in, gemm):
    model = tiny("opt", layerdrop=0.5)
    optimizer = MISA(model, rest="none", lr=1e-2, delta=0.15, inner_steps=3, update_in=update_in, gemm_gradients=gemm)
    torch.manual_seed(0)
    data, empty = batches(), 0
    for _ in range(60):
        before = weights(model)
        loss_of(model, next(data)).backward()
        here = any(p.grad is not None for p in model.parameters())
        same = all(torch.equal(before[name], p) for name, p in model.named_parameters())
        if update_in == "step":
            optimizer.clip_grad_norm_(1.0)
            empty += not here
            assert same
        else:
            empty += same
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < empty == optimizer.empty_steps < 60
    assert optimizer.events[-1].empty_steps <= empty and max(event.empty_steps for event in optimizer.events) > 0
    assert any(event.without_gradient for event in optimizer.events)


def test_empty_steps_survive_a_checkpoint():
    model = tiny("opt", layerdrop=1.0)
    optimizer = MISA(model, delta=0.15, inner_steps=3)
    train(model, optimizer, batches(), 5)
    assert optimizer.empty_steps == 5 and optimizer.total_steps == 5
    state = optimizer.state_dict()
    other = MISA(tiny("opt"), delta=0.15, inner_steps=3)
    other.load_state_dict(state)
    assert other.empty_steps == 5


@pytest.mark.parametrize("view", [True, False])
def test_anchored_output_keeps_its_values_and_may_be_changed_in_place(view):
    class Frozen(nn.Module):
        def forward(self, x):
            y = x * 2
            return {"loss": y.sum(), "logits": y[1:] if view else y, "tokens": torch.arange(3)}

    model = Frozen()
    GraphAnchor(model)
    found = model(torch.ones(3))
    assert found["logits"].requires_grad and found["loss"].item() == 6 and found["logits"].unique().item() == 2
    assert not found["tokens"].requires_grad
    found["loss"] /= 2
    (found["loss"] + found["logits"].mul_(0.5).sum()).backward()
    with torch.no_grad():
        assert not model(torch.ones(3))["loss"].requires_grad
    assert not model.eval()(torch.ones(3))["loss"].requires_grad


class TwoHeads(nn.Module):
    """The second head runs and nothing depends on it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer[0](x) + layer[1](x).detach()
        return x


OPTIONS = {"delta": 1.0, "cold_start": "none", "lr": 1e-3}


@pytest.mark.parametrize("update_in", ["step", "backward"])
def test_round_in_which_an_active_matrix_ran_without_a_gradient_is_an_error(update_in):
    model = TwoHeads()
    optimizer = MISA(model, inner_steps=3, update_in=update_in, **OPTIONS)
    for step in range(3):
        model(torch.randn(4, 6)).sum().backward()
        if step < 2:
            optimizer.step()
    with pytest.raises(ValueError, match=r"2 active parameters received no gradient.*layers\.[01]\.1\.weight.*frozen="):
        optimizer.step()


def test_round_of_one_step_warns_once_for_each():
    model = TwoHeads()
    optimizer = MISA(model, inner_steps=1, **OPTIONS)
    with pytest.warns(UserWarning, match="received no gradient"):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert optimizer.events[-1].without_gradient == {"layers.0.1.weight": 1, "layers.1.1.weight": 1}


def test_round_in_which_nothing_reached_the_loss_is_an_error():
    model = TwoHeads()
    optimizer = MISA(model, inner_steps=2, frozen=("*.0.*",), **OPTIONS)  # only the second heads can be drawn
    with pytest.raises(ValueError, match="active parameters received no gradient"):
        for _ in range(2):
            model(torch.randn(4, 6)).sum().backward()
            optimizer.step()


def test_gradients_that_the_caller_drops_have_arrived():
    model = TwoHeads()
    optimizer = MISA(model, inner_steps=3, frozen=("*.1.*",), **OPTIONS)
    for _ in range(3):
        model(torch.randn(4, 6)).sum().backward()
        model.layers[0][0].weight.grad = None  # legal: not this one now
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.events[-1].without_gradient == {"layers.0.0.weight": 3}


def test_gradients_that_the_caller_puts_there_are_gradients():
    model = TwoHeads()
    optimizer = MISA(model, inner_steps=2, **OPTIONS)
    for _ in range(2):
        model(torch.randn(4, 6)).sum().backward()
        for layer in model.layers:
            layer[1].weight.grad = torch.ones_like(layer[1].weight)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.round == 1 and optimizer.events[-1].without_gradient == {}


class Skipping(nn.Module):
    """Leaves its first layer out unless asked."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x, first=False):
        return self.layers[1](self.layers[0](x) if first else x)


def test_passes_for_something_else_do_not_make_a_skipped_layer_a_failed_one():
    model = Skipping()
    optimizer = MISA(model, inner_steps=3, **OPTIONS)
    for _ in range(3):
        x = torch.randn(4, 6, requires_grad=True)
        torch.autograd.grad(model(x, first=True).sum(), x)  # a saliency map
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.events[-1].without_gradient == {"layers.0.0.weight": 3}


def test_layer_that_the_caller_runs_alone_is_warned_of():
    model = Skipping()
    optimizer = MISA(model, inner_steps=2, **OPTIONS)
    with pytest.warns(UserWarning, match="layers.0.0.weight first"):
        for _ in range(2):
            x = torch.randn(4, 6, requires_grad=True)
            torch.autograd.grad(model.layers[0](x).sum(), x)
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_matrix_in_a_compiled_module_counts_as_failed_after_ten_steps():
    def run(inner_steps):
        model = TwoHeads()
        for layer in model.layers:
            layer[1]._compiled_call_impl = layer[1]._call_impl  # as after compile(), without the minutes
        optimizer = MISA(model, inner_steps=inner_steps, **OPTIONS)
        for _ in range(inner_steps):
            model(torch.randn(4, 6)).sum().backward()
            optimizer.step()

    run(9)
    with pytest.raises(ValueError, match="compiled module"):
        run(10)


def test_forward_hooks_are_gone_after_removal():
    model = tiny()
    optimizer = MISA(model, delta=0.3)
    optimizer.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

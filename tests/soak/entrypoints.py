"""Autograd's entry points as a user calls them between two steps, for the engine's model and for plain torch's.

Every function takes the model, the batch and the names of some active weights, and gives named tensors to compare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Results = dict[str, Tensor]


def plain_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    if hasattr(model, "config"):
        return model(input_ids=ids, labels=ids).loss
    return plain_loss(model(ids), ids)


def embedded_loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the embedded input that it is a function of."""
    table = model[0] if isinstance(model, nn.Sequential) else model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        x = F.embedding(ids, table.weight)  # type: ignore[arg-type]
    x.requires_grad_(True)
    if isinstance(model, nn.Sequential):
        out = x
        for layer in list(model)[1:]:
            out = layer(out)
        return plain_loss(out, ids), x
    if hasattr(model, "config"):
        return model(inputs_embeds=x, labels=ids).loss, x
    return plain_loss(model(inputs_embeds=x), ids), x


def _functional(model: nn.Module, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    if hasattr(model, "config"):
        return torch.func.functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss
    return plain_loss(torch.func.functional_call(model, weights, (ids,)), ids)


def _others(model: nn.Module) -> dict[str, Tensor]:
    """Other weights of the same shapes."""
    return {name: (p.detach() * 1.01).requires_grad_(True) for name, p in model.named_parameters()}


def grad_inputs(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    loss, x = embedded_loss(model, ids)
    return {"x": torch.autograd.grad(loss, x)[0]}


def backward_inputs(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    loss, x = embedded_loss(model, ids)
    loss.backward(inputs=[x])
    assert x.grad is not None
    return {"x": x.grad}


def grad_weights(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = [model.get_parameter(name) for name in names]
    return dict(zip(names, torch.autograd.grad(loss_of(model, ids), weights), strict=True))


def functional_call(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = _others(model)
    _functional(model, weights, ids).backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def func_grad(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = {name: weight.detach() for name, weight in _others(model).items()}
    return torch.func.grad(lambda w: _functional(model, w, ids))(weights)


def vmap(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = {name: weight.detach() for name, weight in _others(model).items()}
    one = torch.func.grad(lambda w, row: _functional(model, w, row[None]))
    return torch.func.vmap(one, in_dims=(None, 0))(weights, ids)


def jvp(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = {name: weight.detach() for name, weight in _others(model).items()}
    value, tangent = torch.func.jvp(lambda w: _functional(model, w, ids), (weights,), (weights,))
    return {"value": value, "tangent": tangent}


def jacrev(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = {name: weight.detach() for name, weight in _others(model).items()}
    return torch.func.jacrev(lambda w: _functional(model, w, ids))(weights)


def hessian_vector(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = [model.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(loss_of(model, ids), weights, create_graph=True)
    product = sum((g * g.detach().sign()).sum() for g in gradients)
    assert isinstance(product, Tensor)
    second = torch.autograd.grad(product, weights)
    return {f"H {name}": s for name, s in zip(names, second, strict=True)}


def penalty(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    loss, x = embedded_loss(model, ids)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    return {}


def twice(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    loss = loss_of(model, ids)
    loss.backward(retain_graph=True)
    loss.backward()
    return {}


def partial_backward(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    loss_of(model, ids).backward(inputs=[model.get_parameter(name) for name in names[:1]])
    return {}


def regulariser(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    weights = sum(model.get_parameter(name).square().sum() for name in names)
    (loss_of(model, ids) + 1e-2 * weights).backward()
    return {}


def layer_alone(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    """Influence of single layers: an active layer called by itself, differentiated by its input only."""
    found = {}
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            x = (
                torch.linspace(-1, 1, 3 * module.in_features, dtype=module.weight.dtype)
                .view(3, -1)
                .requires_grad_(True)
            )
            found[name] = torch.autograd.grad(module(x).float().square().sum(), x)[0]
    return found


def evaluate(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, ids)
    model.train()
    return {"loss": loss}


def copied(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Results:
    clone = copy.deepcopy(model).requires_grad_(True)
    clone.zero_grad()
    loss_of(clone, ids).backward()
    return {name: p.grad.clone() for name, p in clone.named_parameters() if p.grad is not None}


TABLE: dict[str, Callable[[nn.Module, Tensor, Sequence[str]], Any]] = {
    function.__name__: function
    for function in (
        *(grad_inputs, backward_inputs, grad_weights, functional_call, func_grad, vmap, jvp, jacrev),
        *(hessian_vector, penalty, twice, partial_backward, regulariser, layer_alone, evaluate, copied),
    )
}

"""What the tests of the rest rule share."""

from __future__ import annotations

from misa_engine import MISA
from training import batches, loss_of, tiny, weights

DELTA = 0.3


def build(model, **options):
    """MISA with a rest rule on a tiny model, whose largest matrix is 8% of the whole."""
    return MISA(
        model, **{"lr": 1e-3, "delta": DELTA, "inner_steps": 3, "cold_start": "none", "rest": "sign", **options}
    )


def matrices(model, optimizer):
    return {name for unit in optimizer.units for name in unit.params if model.get_parameter(name).ndim >= 2}


def active(optimizer):
    return {name for unit in optimizer.units if unit.name in optimizer.active for name in unit.params}


def backward(model, data):
    loss_of(model, next(data)).backward()


def moved_in_one_pass(family="llama", architecture=None, **options):
    """One backward pass with a rest rule: the model, its optimizer, name -> how far each moved, and a plain twin."""
    model, twin = (tiny(family, **(architecture or {})) for _ in range(2))
    optimizer = build(model, **options)
    before = weights(model)
    backward(model, batches())
    backward(twin, batches())
    moved = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    return model, optimizer, moved, twin

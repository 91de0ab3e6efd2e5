"""What the tests of the rest rule share."""

from __future__ import annotations

from misa_engine import MISA
from training import loss_of

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

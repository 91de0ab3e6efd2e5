"""What the rest rule adds to a run: which matrices, the optimizer's bytes, and the share of a step's arithmetic.

forward 2 and backward 2 operations for each weight and token, 2 more where layers are computed again; a weight gradient
is 2 more, which the rest rule asks for in one micro-batch of each ``rest_every``-th step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from misa_engine.engine.rest import can_rest
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition


def resting(model: nn.Module, can: Sequence[str], misa: MisaConfig, trained: Collection[str]) -> tuple[str, ...]:
    """Those of ``can`` (see ``can_rest``) that rest while ``trained`` holds the slots, as the engine chooses them."""
    taken = set(trained)
    if misa.rest_scope == "above":
        order = [name for name, _ in model.named_parameters()]
        lowest = min(order.index(name) for name in taken)
        taken |= set(order[:lowest])
    return tuple(name for name in can if name not in taken)


def rest_bytes(model: nn.Module, parts: Partition, misa: MisaConfig) -> int:
    """Bytes of the optimizer's own buffers for what rests: factors of the largest rows and columns, norms."""
    named = dict(model.named_parameters())
    shapes = [
        (named[name].numel() // named[name].shape[-1], named[name].shape[-1]) for name in can_rest(model, parts, misa)
    ]
    if not shapes:
        return 0
    rows, cols = (max(sizes) for sizes in zip(*shapes, strict=True))
    return 4 * (rows + cols + max(rows, cols) + 3 * len(shapes) + 1)


def step_cost(
    model: nn.Module, parts: Partition, misa: MisaConfig, budget: int, *, checkpointing: bool, accumulation: int = 1
) -> float:
    """Arithmetic of a step over that without a rest rule, on average over draws; attention's products left out.

    Args:
        model: with its input embedding known to transformers, which multiplies nothing unless it is also the head.
        parts: its partition.
        misa: the rest rule.
        budget: parameters that are drawn at a time.
        checkpointing: layers are computed again.
        accumulation: micro-batches of a step.
    """
    can = set(can_rest(model, parts, misa))
    if not can:
        return 1.0
    ends = (getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None))
    embedding, head = (getattr(get() if get else None, "weight", None) for get in ends)
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and (parameter is not embedding or parameter is head)
    }
    drawn = min(budget, sum(unit.numel for unit in parts.units))
    rests = max(0, sum(sizes.get(name, 0) for name in can) - drawn)
    without = (6 if checkpointing else 4) * sum(sizes.values()) + 2 * drawn
    return 1 + 2 * rests / without / accumulation / misa.rest_every

"""What the rest rule adds to a run: which matrices, the optimizer's bytes, and the share of a step's arithmetic.

forward 2 and backward 2 operations for each weight and token, 2 more where layers are computed again; a weight gradient
is 2 more, which the rest rule asks for in one micro-batch of each ``rest_every``-th step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from misa_engine.engine.rest import RestBuffers, can_rest, exchange_bytes
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition


def rest_bytes(model: nn.Module, can: Sequence[str], gpus: int = 1) -> int:
    """Bytes that the optimizer holds for the matrices ``can`` (see ``can_rest``), without allocating anything.

    On several cards one gradient lives while it is averaged and the next is computed.
    """
    if not can:
        return 0
    named = dict(model.named_parameters())
    matrices = [named[name] for name in can]
    return RestBuffers.allocate(matrices, "meta").nbytes + (exchange_bytes(matrices) if gpus > 1 else 0)


def resting_elements(model: nn.Module, parts: Partition, misa: MisaConfig) -> int:
    """Elements of all matrices that can rest."""
    named = dict(model.named_parameters())
    return sum(named[name].numel() for name in can_rest(model, parts, misa))


def step_cost(
    model: nn.Module,
    parts: Partition,
    can: Sequence[str],
    misa: MisaConfig,
    budget: int,
    *,
    checkpointing: bool,
    accumulation: int = 1,
) -> float:
    """Arithmetic of a step over that without a rest rule, on average over draws; attention's products left out.

    Args:
        model: with its input embedding known to transformers, which multiplies nothing unless it is also the head.
        parts: its partition.
        can: what can rest (``can_rest``).
        misa: the rest rule.
        budget: parameters that are drawn at a time.
        checkpointing: layers are computed again.
        accumulation: micro-batches of a step.
    """
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

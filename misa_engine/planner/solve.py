"""Choose the options of a run so that it fits: what ``misa plan --max_vram_gb`` and ``misa train --max_vram_gb`` do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from misa_engine.errors import UserError
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import check_budget
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import Card
from misa_engine.planner.plan import WEIGHTS, Plan, most_that_fits, plan
from misa_engine.planner.worst_case import MetaModel, WorstCase

#: Steps down from the δ that was asked for.
DELTAS = (0.03, 0.02, 0.015, 0.01, 0.0075, 0.005)
#: Format of the residents that are proposed where nobody names one: the most accurate at these bytes.
RESIDENTS = "int8"
#: Tokens of a micro-batch from which on a GPU is busy, so that doing without checkpointing is worth a smaller one.
BUSY_TOKENS = 2048
#: A 4-bit base's scales, adapters and passes beside its weights, roughly.
LORA_EXTRA_BYTES = 4 * 2**30
#: Categories that grow with the micro-batch.
_PASSING = ("activations", "cross_entropy", "temporaries")


@dataclass(frozen=True)
class Wishes:
    """What ``solve`` may choose; None is free."""

    delta: float | None = None
    state_dtype: str | None = None
    checkpointing: bool | None = None
    batch: int | None = None
    length: int = 2048
    most_sequences: int = 64
    """Sequences of a micro-batch at most: the effective batch of the run."""
    residents: str | None = None
    """"none" keeps all weights on the card as they are; otherwise the format in which what is not drawn rests."""
    gpus: int = 1
    """Cards that train together, a whole model on each; not a choice. Residents are not proposed for several."""


def solve(meta: MetaModel, limit: Card, misa: MisaConfig, micro_batch: MicroBatch, wishes: Wishes) -> Plan:
    """The best plan within ``limit``: least is given up first.

    All weights in bfloat16 before residents in 8 bits, δ as asked for (3% by default) before a smaller one, float32
    moments before 8-bit ones, no checkpointing where a micro-batch of 2,048 tokens fits without, and then the largest
    micro-batch.

    Raises:
        UserError: nothing fits; the message names the smallest card and the largest δ that would.
    """
    smallest: Plan | None = None
    for residents in _formats(meta, misa, wishes):
        found, least = _solve(meta, limit, misa, micro_batch, wishes, residents)
        if found is not None:
            return found
        if least is not None and (smallest is None or least.total_bytes < smallest.total_bytes):
            smallest = least
    if smallest is None:
        check_budget(meta.partition(misa), min(_deltas(misa, wishes)))  # raises, and says which δ works
        raise AssertionError("a budget was refused and then accepted")
    raise UserError(impossible(meta, limit, smallest))


def _formats(meta: MetaModel, misa: MisaConfig, wishes: Wishes) -> list[str]:
    """Formats to try, in order; residents are not proposed with many cards, a rest rule, or in float32."""
    if wishes.residents is not None:
        return [wishes.residents]
    if wishes.gpus > 1 or misa.without_own_rest().rest != "none" or meta.dtype != torch.bfloat16:
        return ["none"]
    return ["none", RESIDENTS] if meta.resident_matrices else ["none"]


def _deltas(misa: MisaConfig, wishes: Wishes) -> list[float]:
    """δ as asked for, and where the choice is free the smaller ones."""
    if wishes.delta is not None:
        return [wishes.delta]
    return [misa.delta, *(delta for delta in DELTAS if delta < misa.delta)]


def _solve(
    meta: MetaModel, limit: Card, misa: MisaConfig, micro_batch: MicroBatch, wishes: Wishes, residents: str
) -> tuple[Plan | None, Plan | None]:
    """The best plan with this format of residents, None where none fits; and the smallest of those that were tried."""
    states = [wishes.state_dtype] if wishes.state_dtype else ["float32", "int8"]
    modes = [wishes.checkpointing] if wishes.checkpointing is not None else [False, True]
    smallest: Plan | None = None
    for delta, state_dtype, checkpointing in product(_deltas(misa, wishes), states, modes):
        options = misa.altered(delta=delta, state_dtype=state_dtype)
        shape = replace(micro_batch, checkpointing=checkpointing, length=wishes.length, batch=wishes.batch or 1)
        try:
            candidate = plan(meta, misa=options, micro_batch=shape, residents=residents, gpus=wishes.gpus)
            candidate = replace(candidate, card=limit)
        except UserError:
            raise
        except ValueError:  # δ is smaller than the largest unit
            continue
        if smallest is None or candidate.total_bytes < smallest.total_bytes:
            smallest = candidate
        if candidate.fits and wishes.batch is None:
            candidate = _with_largest_batch(meta, candidate, wishes.most_sequences)
            # Without checkpointing a step takes 3/4 of the time, which too small a micro-batch loses again.
            busy = min(BUSY_TOKENS, wishes.most_sequences * wishes.length)
            if not checkpointing and len(modes) > 1 and candidate.micro_batch.tokens < busy:
                continue
        if candidate.fits:
            return candidate, smallest
    return None, smallest


def _with_largest_batch(meta: MetaModel, fitting: Plan, most: int) -> Plan:
    """The same plan with as many sequences in a micro-batch as fit."""
    assert fitting.card is not None
    passing = sum(fitting.bytes.get(name, 0) for name in _PASSING)
    room = fitting.card.total_bytes - (fitting.total_bytes - passing)
    worst = WorstCase(meta, fitting.misa, fitting.micro_batch)
    batch = most_that_fits(worst, fitting.micro_batch, room, "batch", most)
    larger = again(meta, fitting, micro_batch=replace(fitting.micro_batch, batch=max(1, batch)))
    return replace(larger, card=fitting.card)


def again(meta: MetaModel, before: Plan, **changes: Any) -> Plan:
    """The same plan with other options (``misa``), another micro-batch or for a card."""
    options: dict[str, Any] = {"misa": before.misa, "micro_batch": before.micro_batch, "gpus": before.gpus}
    options["residents"] = before.residents.format if before.residents else None
    return plan(meta, **{**options, **changes})


def impossible(meta: MetaModel, limit: Card, smallest: Plan) -> str:
    """Why nothing fits, and the smallest card and largest δ that would."""
    needed, micro_batch = smallest.total_bytes, smallest.micro_batch
    weights = sum(smallest.bytes.get(name, 0) for name in WEIGHTS)
    card = Card.smallest(needed)
    text = (
        f"{meta.name} does not fit into {_gib(limit.total_bytes)}: with delta {smallest.misa.delta:g}, "
        f"{smallest.misa.state_dtype} moments, {'' if micro_batch.checkpointing else 'no '}gradient checkpointing and "
        f"{micro_batch.batch} x {micro_batch.length} tokens it needs {_gib(needed)}, of which the weights take "
        f"{_gib(weights)}{f' with residents {smallest.residents.format}' if smallest.residents else ''}."
    )
    text += f" The smallest card that works is {card.name}." if card else " No known card works."
    if smallest.residents is None and RESIDENTS in _formats(meta, smallest.misa, Wishes(gpus=smallest.gpus)):
        resting = again(meta, smallest, residents=RESIDENTS).total_bytes
        text += f" With --residents {RESIDENTS} it needs {_gib(resting)}." if resting < needed else ""
    delta = _largest_delta(meta, limit, smallest)
    if delta is not None:
        return f"{text} Here the largest delta that works is {delta:.4g}."
    if micro_batch.length > 256:
        shorter = replace(micro_batch, length=256, batch=1)
        if again(meta, smallest, micro_batch=shorter).total_bytes <= limit.total_bytes:
            return f"{text} Shorter sequences (max_length) or a smaller micro-batch would fit."
    if weights > 0.9 * limit.total_bytes:
        return (
            f"{text} MISA keeps all weights on one card, so next: a smaller model, a card with more "
            "memory, or LoRA on a 4-bit base (QLoRA, about "
            f"{_gib(meta.weight_bytes // 4 + LORA_EXTRA_BYTES)}) with another trainer."
        )
    return text


def _largest_delta(meta: MetaModel, limit: Card, smallest: Plan) -> float | None:
    """The largest δ below the planned one that fits ``limit``; None when no permitted δ does."""
    parts = meta.partition(smallest.misa)
    low = math.nextafter(max(unit.numel for unit in parts.units) / parts.total, 1.0) * 1.0001

    def fits(delta: float) -> bool:
        candidate = again(meta, smallest, misa=smallest.misa.altered(delta=delta))
        return candidate.total_bytes <= limit.total_bytes

    if low >= smallest.misa.delta or not fits(low):
        return None
    high = smallest.misa.delta
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return math.floor(low * 1e4) / 1e4 or low


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

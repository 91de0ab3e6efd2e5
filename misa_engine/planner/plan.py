"""What a training run will need, before anything is loaded.

weights                     from the model on the meta device
resident_codes, ...         what rests in 8 bits, and what that takes (``residents.py``)
gradients, moments, ...     ``arena_bytes``: the optimizer's own account
activations, cross-entropy  the worst draw's peak (``worst_case.py``)
context, slack              constants of ``activations.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from misa_engine.engine.arena import arena_bytes, arena_options, capacity_for, capacity_of_rows, padded
from misa_engine.engine.own_state.arena import own_arena
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition, check_budget
from misa_engine.planner import activations
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import NO_BFLOAT16, Card
from misa_engine.planner.residents import ResidentPlan, resident_plan, without_rest
from misa_engine.planner.resting import rest_bytes, step_cost
from misa_engine.planner.versions import other_versions
from misa_engine.planner.worst_case import MetaModel, WorstCase

#: Categories of what the optimizer holds on the device.
OPTIMIZER = ("gradients", "first_moment", "second_moment", "moment_scales", "residual_bits", "tables", "rest")
#: Categories of the weights; all but the first exist only with residents.
WEIGHTS = ("weights", "resident_codes", "resident_steps", "resident_workspace", "active_weights")
#: Order of the categories in tables and pictures.
CATEGORIES = (
    *WEIGHTS,
    *OPTIMIZER,
    "activations",
    "cross_entropy",
    "temporaries",
    "cuda_context",
    "slack",
)
#: Tokens beyond which no plan looks.
LONGEST = 1 << 17


@dataclass(frozen=True)
class Plan:
    """Bytes of a run at its largest moment, and what a card has room for."""

    model: str
    parameters: int
    """N, tied ones counted once."""
    delta_parameters: int
    """floor(δ·N): the most that trains at a time, without what is always trained."""
    misa: MisaConfig
    micro_batch: MicroBatch
    bytes: Mapping[str, int]
    """By category, see CATEGORIES."""
    moment: str
    """Where in a step the peak is."""
    worst_draw: tuple[str, ...]
    """The active parameters for which this is the peak."""
    resting: tuple[str, ...]
    """What moves by the rest rule beside them."""
    step_cost: float
    """Arithmetic of a step with one micro-batch over that without a rest rule."""
    method: str
    """How activations were found: closed form, or measured on fake tensors."""
    notes: tuple[str, ...] = ()
    residents: ResidentPlan | None = None
    """How the undrawn matrices rest in 8 bits; None where all weights are on the card as they are."""
    card: Card | None = None
    max_tokens_per_micro_batch: int | None = None
    """Most tokens of a micro-batch that fit the card, in sequences of the given length or one longer; 0 = none."""
    max_length: int | None = None
    """Longest single sequence that fits the card, also by what the model takes."""
    gpus: int = 1
    """Cards that train together, a whole model on each: a rest rule then keeps one more gradient for the exchange."""

    @property
    def total_bytes(self) -> int:
        """All categories together."""
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the total is within the card."""
        return self.card is not None and self.total_bytes <= self.card.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "delta": self.misa.delta,
            "delta_parameters": self.delta_parameters,
            "granularity": self.misa.granularity,
            "state_dtype": self.misa.state_dtype,
            "update_in": self.misa.update_in,
            "master": self.misa.master,
            "grad_dtype": self.misa.grad_dtype,
            **asdict(self.micro_batch),
            "bytes": dict(self.bytes),
            "total_bytes": self.total_bytes,
            "moment": self.moment,
            "worst_draw": list(self.worst_draw),
            "rest": self.misa.rest,
            "resting": len(self.resting),
            "step_cost": self.step_cost,
            "method": self.method,
            "notes": list(self.notes),
            "residents": self.residents.to_dict() if self.residents else None,
            "card": asdict(self.card) if self.card else None,
            "fits": self.fits if self.card else None,
            "unused_bytes": max(0, self.card.total_bytes - self.total_bytes) if self.card else None,
            "max_tokens_per_micro_batch": self.max_tokens_per_micro_batch,
            "max_length": self.max_length,
        }


def plan(
    model: Any,
    *,
    card: Card | str | None = None,
    misa: MisaConfig | None = None,
    micro_batch: MicroBatch | None = None,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "",
    residents: str | None = None,
    gpus: int = 1,
    **options: Any,
) -> Plan:
    """Predict the memory of a run.

    Args:
        model: a transformers configuration, or a ``MetaModel`` made from one before.
        card: a ``Card``, its name or its memory ("rtx4090", "24GiB"); None leaves out what fits.
        misa: MISA's options; or give single ones by keyword, not both.
        micro_batch: how a micro-batch is run; None is one sequence of 2,048 tokens with checkpointing.
        dtype: of the weights; the formulas are for bfloat16, float32 is measured on fake tensors.
        name: what to call the model.
        residents: format in which undrawn matrices rest in 8 bits (``residents.FORMATS``); None or "none" keeps all
            weights on the card as they are.
        gpus: cards that train together, a whole model on each; the bytes are those of one of them.
        **options: single fields of MisaConfig, instead of ``misa``.

    Returns:
        The plan for the worst of the draws that ``worst_case.draws`` looks at: a search over orders of filling the
        budget, not over all draws. Where all can be tried, it is within 2% (tests/test_worst_case.py).

    Raises:
        ValueError: an option is invalid, δ is smaller than the largest unit (the message says which δ works),
            ``misa`` and single options are both given, or residents with a rest rule.
    """
    if misa is not None and options:
        raise ValueError(f"plan() got a MisaConfig and also {', '.join(options)}: give either, not both")
    meta = model if isinstance(model, MetaModel) else MetaModel(model, dtype, name)
    misa = misa or MisaConfig.from_dict(options)
    micro_batch = micro_batch or MicroBatch()
    micro_batch = replace(micro_batch, gemm_gradients=misa.gemm_gradients and misa.update_in == "step")
    card = Card.of(card) if isinstance(card, str) else card
    rested = None
    if residents not in (None, "none"):
        misa = without_rest(misa)
        rested = resident_plan(meta, misa, str(residents), micro_batch, card, gpus)
    parts = meta.partition(misa)
    budget = check_budget(parts, misa.delta)
    worst = WorstCase(meta, misa, micro_batch)
    peak, draw = worst.peak(micro_batch)
    reserve = {"cuda_context": activations.CONTEXT_BYTES, "slack": activations.SLACK_BYTES}
    ours = {
        **optimizer_bytes(parts, misa, meta.dtype, residents=rested is not None, gpus=gpus),
        "rest": rest_bytes(meta.model, worst.can_rest, gpus),
    }
    weights = dict(rested.card_bytes) if rested else {"weights": meta.weight_bytes}
    fixed = {**weights, **ours, **reserve}
    found = fixed | {name: getattr(peak, name) for name in ("activations", "cross_entropy", "temporaries")}
    result = Plan(
        model=meta.name,
        parameters=parts.total,
        delta_parameters=budget,
        misa=misa,
        micro_batch=micro_batch,
        bytes={category: found[category] for category in CATEGORIES if found.get(category)},
        moment=peak.moment,
        worst_draw=draw,
        resting=worst.resting(draw),
        step_cost=step_cost(meta.model, parts, worst.can_rest, misa, budget, checkpointing=micro_batch.checkpointing),
        method="closed form" if meta.shape is not None else "fake tensors",
        notes=_notes(meta, card),
        residents=rested,
        card=card,
        gpus=gpus,
    )
    return result if card is None else _with_room(result, meta, worst, card.total_bytes - sum(fixed.values()))


def _notes(meta: MetaModel, card: Card | None) -> tuple[str, ...]:
    """What the reader of a plan should know of how it was made."""
    notes = []
    if meta.shape is None:
        notes.append("no formulas for this family: activations were measured on two shallow models with fake tensors")
    elif (other := other_versions()) is not None:
        notes.append(other)
    if getattr(meta.model.config, "_attn_implementation", None) == "eager":
        notes.append("eager attention: memory grows with the square of the sequence length")
    if card is not None and card.name in NO_BFLOAT16:
        notes.append(f"{card.name} has no bfloat16 arithmetic: it fits what the plan says, but computes slowly")
    return tuple(notes)


def _with_room(result: Plan, meta: MetaModel, worst: WorstCase, room: int) -> Plan:
    """The plan with what fits into ``room`` bytes beside weights, arena, context and slack."""
    micro_batch = result.micro_batch
    limit = getattr(meta.config, "max_position_embeddings", None) or LONGEST
    longest = most_that_fits(worst, micro_batch, room, "length", LONGEST)
    batch = most_that_fits(worst, micro_batch, room, "batch", max(1, LONGEST // micro_batch.length))
    longest = min(longest, limit)
    return replace(result, max_tokens_per_micro_batch=max(batch * micro_batch.length, longest), max_length=longest)


def optimizer_bytes(
    parts: Partition,
    misa: MisaConfig,
    dtype: torch.dtype,
    *,
    residents: bool = False,
    rows: Mapping[str, int] | None = None,
    gpus: int = 1,
) -> dict[str, int]:
    """Bytes that the optimizer will hold on the device, by category, without allocating anything.

    Args:
        parts: the model's partition under MISA's options.
        misa: budget and precisions.
        dtype: of the weights.
        residents: the drawn ones' weights lie in the arena, too.
        rows: elements of each parameter that a process holds, where weights are sharded.
        gpus: processes that share the state, with ``shard_state``: the bytes are those of the one that holds most.

    Raises:
        ValueError: δ is smaller than the largest unit.
    """
    names = [name for unit in parts.units for name in unit.params], parts.always
    budget, options = check_budget(parts, misa.delta), arena_options(misa, dtype)
    if rows is not None:
        pairs = [[(parts.numels[name], rows[name]) for name in group] for group in names]
        return arena_bytes(*capacity_of_rows(budget, *pairs), **options)
    sampled, always = ([parts.numels[name] for name in group] for group in names)
    if misa.shard_state and gpus > 1:
        return own_arena(budget, sampled, always, gpus, None, device=torch.device("meta"), **options).bytes()
    weights_from = sum(map(padded, always)) if residents else None
    return arena_bytes(*capacity_for(budget, sampled, always), weights_from=weights_from, **options)


def most_that_fits(worst: WorstCase, micro_batch: MicroBatch, room: int, what: str, most: int) -> int:
    """The largest batch of sequences of that length, or length of a single sequence, whose peak is within ``room``.

    Args:
        worst: the peaks.
        micro_batch: how the micro-batch is run.
        room: bytes beside weights, arena, context and slack.
        what: "batch" or "length".
        most: where to stop looking.

    Returns:
        0 when not even one fits.
    """
    base = replace(micro_batch, batch=1)

    def total(value: int) -> int:
        sized = replace(base, batch=value) if what == "batch" else replace(base, length=value)
        return worst.peak(sized)[0].total

    if worst.exact:
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(middle) <= room else (low, middle)
        return low
    # A pass takes half a second and every look two. Those of the plan itself (batch 1, its length) have been made, so
    # they are used again, and where only the number of tokens matters one more length, at half, is enough for both
    # questions: 5 passes a plan instead of 12 (16 with a length of its own). Otherwise a line through two batches or,
    # since eager attention is quadratic in the length, a parabola through three lengths.
    unit = 1
    longest = min(max(1024, base.length), worst.positions or LONGEST)
    places: tuple[int, ...] = (longest // 4, longest // 2, longest)
    if worst.grows_with_tokens(base, places):
        unit = base.length if what == "batch" else 1
        what, places, most = "length", places[1:], most * unit
    elif what == "batch":
        places = (1, 2)
    curve = np.polyfit(places, [total(place) for place in places], len(places) - 1)
    curve[-1] -= room
    found = [root.real for root in np.roots(curve) if abs(root.imag) < 1e-9 and root.real > 0]
    return min(int(min(found)), most) // unit if found else 0

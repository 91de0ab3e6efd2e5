"""What a training run will need, before anything is loaded.

weights                     from the model on the meta device
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

from misa_engine.engine.arena import arena_bytes, capacity_for
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import check_budget
from misa_engine.planner import activations
from misa_engine.planner.activations import Pass
from misa_engine.planner.cards import Card
from misa_engine.planner.worst_case import Subject, WorstCase

#: Order of the categories in tables and pictures.
CATEGORIES = (
    "weights",
    "gradients",
    "first_moment",
    "second_moment",
    "moment_scales",
    "residual_bits",
    "tables",
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
    run: Pass
    bytes: Mapping[str, int]
    """By category, see CATEGORIES."""
    moment: str
    """Where in a step the peak is."""
    worst_draw: tuple[str, ...]
    """The active parameters for which this is the peak."""
    method: str
    """How activations were found: closed form, or measured on fake tensors."""
    notes: tuple[str, ...] = ()
    card: Card | None = None
    max_tokens_per_micro_batch: int | None = None
    """Most tokens of a micro-batch that fit the card with sequences of ``run.length``, or one longer one; 0 = none."""
    max_length: int | None = None
    """Longest single sequence that fits the card, also by what the model takes."""

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
            **asdict(self.run),
            "bytes": dict(self.bytes),
            "total_bytes": self.total_bytes,
            "moment": self.moment,
            "worst_draw": list(self.worst_draw),
            "method": self.method,
            "notes": list(self.notes),
            "card": asdict(self.card) if self.card else None,
            "fits": self.fits if self.card else None,
            "max_tokens_per_micro_batch": self.max_tokens_per_micro_batch,
            "max_length": self.max_length,
        }


def plan(
    model: Any,
    *,
    card: Card | str | None = None,
    misa: MisaConfig | None = None,
    run: Pass | None = None,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "",
    **options: Any,
) -> Plan:
    """Predict the memory of a run.

    Args:
        model: a transformers configuration, or a ``Subject`` made from one before.
        card: a ``Card``, its name or its memory ("rtx4090", "24GiB"); None leaves out what fits.
        misa: MISA's options, or
        run: how a micro-batch is run; None is one sequence of 2,048 tokens with checkpointing.
        dtype: of the weights; the formulas are for bfloat16, float32 is measured on fake tensors.
        name: what to call the model.
        **options: single fields of MisaConfig, instead of ``misa``.

    Raises:
        ValueError: an option is invalid, or δ is smaller than the largest unit (the message says which δ works).
    """
    subject = model if isinstance(model, Subject) else Subject(model, dtype, name)
    misa = misa or MisaConfig.from_dict(options)
    run = run or Pass()
    run = replace(run, gemm_gradients=misa.gemm_gradients and misa.update_in == "step")
    card = Card.of(card) if isinstance(card, str) else card
    parts = subject.partition(misa)
    budget = check_budget(parts, misa.delta)
    sampled = [parts.numels[name] for unit in parts.units for name in unit.params]
    capacity, slots = capacity_for(budget, sampled, [parts.numels[name] for name in parts.always])
    arena = arena_bytes(
        capacity,
        slots,
        dtype=subject.dtype,
        split=subject.dtype == torch.bfloat16 and misa.master == "split",
        state_dtype=misa.state_dtype,
        grad_dtype=torch.float32 if misa.grad_dtype == "float32" else None,
        hold_gradients=misa.update_in == "step",
    )
    worst = WorstCase(subject, misa, run)
    peak, draw = worst.peak(run)
    fixed = {"weights": subject.weight_bytes, **arena}
    fixed |= {"cuda_context": activations.CONTEXT_BYTES, "slack": activations.SLACK_BYTES}
    found = {
        **fixed,
        "activations": peak.activations,
        "cross_entropy": peak.cross_entropy,
        "temporaries": peak.temporaries,
    }
    notes = []
    if subject.shape is None:
        notes.append("no formulas for this family: activations were measured on two shallow models with fake tensors")
    if getattr(subject.model.config, "_attn_implementation", None) == "eager":
        notes.append("eager attention: memory grows with the square of the sequence length")
    result = Plan(
        model=subject.name,
        parameters=parts.total,
        delta_parameters=budget,
        misa=misa,
        run=run,
        bytes={category: found[category] for category in CATEGORIES if found.get(category)},
        moment=peak.moment,
        worst_draw=draw,
        method="closed form" if subject.shape is not None else "fake tensors",
        notes=tuple(notes),
        card=card,
    )
    if card is None:
        return result
    room = card.total_bytes - sum(fixed.values())
    limit = getattr(subject.config, "max_position_embeddings", None) or LONGEST
    longest = most_that_fits(worst, run, room, "length", LONGEST)
    batch = most_that_fits(worst, run, room, "batch", max(1, LONGEST // run.length))
    return replace(result, max_tokens_per_micro_batch=max(batch * run.length, longest), max_length=min(longest, limit))


def most_that_fits(worst: WorstCase, run: Pass, room: int, what: str, most: int) -> int:
    """The largest batch of sequences of ``run.length``, or length of a single sequence, whose peak is within ``room``.

    Args:
        worst: the peaks.
        run: how the micro-batch is run.
        room: bytes beside weights, arena, context and slack.
        what: "batch" or "length".
        most: where to stop looking.

    Returns:
        0 when not even one fits.
    """
    base = replace(run, batch=1)

    def total(value: int) -> int:
        sized = replace(base, batch=value) if what == "batch" else replace(base, length=value)
        return worst.peak(sized)[0].total

    if worst.exact:
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(middle) <= room else (low, middle)
        return low
    # Each look takes half a second: a line through two of them, or, since eager attention is quadratic in the length, a
    # parabola through three.
    places = (1, 2) if what == "batch" else (512, 1024, 2048)
    curve = np.polyfit(places, [total(place) for place in places], len(places) - 1)
    curve[-1] -= room
    found = [root.real for root in np.roots(curve) if abs(root.imag) < 1e-9 and root.real > 0]
    return min(int(min(found)), most) if found else 0

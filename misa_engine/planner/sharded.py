"""What sharded weights need on each card and exchange: arithmetic on paper, to be replaced by measurements.

K cards that hold the rows of one model gather every layer in the forward pass and again in the backward pass (what lies
outside the layers, embeddings and head, once), and reduce the gradients of the active matrices, in every micro-batch.
A ring sends (K-1)/K of these bytes from every card. FSDP2 gathers a layer while the one before is computed: between all
of it and none is hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from misa_engine.method.config import MisaConfig
from misa_engine.planner.plan import CATEGORIES, OPTIMIZER, Plan, optimizer_bytes
from misa_engine.planner.replicas import LINKS, MEETING_SECONDS, SHOWN
from misa_engine.planner.worst_case import MetaModel

#: Share of a card's published FLOP/s that a training step gets; a guess for paper.
UTILISATION = 0.5
#: Arithmetic of a step for each weight and token with checkpointing: forward, again in backward, and the gradients of
#: activations, 2 each; those of δ of the weights do not count.
FLOP_PER_WEIGHT_AND_TOKEN = 6


@dataclass(frozen=True)
class ShardedPlan:
    """One of K cards that hold a model together."""

    gpus: int
    bytes: Mapping[str, int]
    """On each card at the largest moment, by category."""
    gathered_bytes: int
    """Weights that are put together in a micro-batch."""
    reduced_bytes: int
    """Gradients of the largest draw that are reduced in a micro-batch."""
    inner_steps: int
    card_bytes: int | None
    """Memory of the card."""

    @property
    def total_bytes(self) -> int:
        """All categories together."""
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the total is within the card."""
        return self.card_bytes is not None and self.total_bytes <= self.card_bytes

    @property
    def sent_bytes(self) -> int:
        """What a card sends in a micro-batch, and receives: the ring's share."""
        return (self.gathered_bytes + self.reduced_bytes) * (self.gpus - 1) // self.gpus

    def seconds(self, bandwidth: float) -> float:
        """Time of a micro-batch's exchange over a link of so many bytes a second, were nothing computed beside it."""
        return self.sent_bytes / bandwidth + 2 * self.gpus * MEETING_SECONDS

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "gpus": self.gpus,
            "bytes": dict(self.bytes),
            "total_bytes": self.total_bytes,
            "fits": self.fits if self.card_bytes is not None else None,
            "gathered_bytes": self.gathered_bytes,
            "reduced_bytes": self.reduced_bytes,
            "sent_bytes": self.sent_bytes,
            "round_bytes": self.sent_bytes * self.inner_steps,
            "seconds_a_micro_batch": {link: self.seconds(LINKS[link]) for link in SHOWN},
        }

    def describe(self) -> str:
        """Lines for people."""
        times = ", ".join(f"{1e3 * self.seconds(LINKS[link]):,.0f} ms over {link}" for link in SHOWN)
        width = max(map(len, self.bytes))
        held = [f"  {name.replace('_', ' '):<{width}}  {size / 2**30:8.2f} GiB" for name, size in self.bytes.items()]
        verdict = "" if self.card_bytes is None else f": {'fits' if self.fits else 'does not fit'}"
        return "\n".join(
            [
                f"{self.gpus} cards, rows of the weights on each{verdict}",
                *held,
                f"  {'together':<{width}}  {self.total_bytes / 2**30:8.2f} GiB",
                f"a micro-batch gathers {self.gathered_bytes / 2**30:.2f} GiB of weights and reduces "
                f"{self.reduced_bytes / 2**30:.2f} GiB of gradients; a card sends {self.sent_bytes / 2**30:.2f} GiB",
                f"  estimated {times}; a part of it beside the computation",
            ]
        )


def sharded_plan(meta: MetaModel, result: Plan, gpus: int) -> ShardedPlan:
    """Divide a plan for one card over ``gpus``.

    Args:
        meta: the model.
        result: its plan for one card, without a rest rule.
        gpus: cards, one process each; at least 2.

    Raises:
        ValueError: fewer than 2 cards, or an option that sharded weights do not have.
    """
    misa: MisaConfig = result.misa
    if gpus < 2:
        raise ValueError(f"sharded weights need at least 2 cards (--gpus); got {gpus}")
    if misa.rest != "none" or misa.update_in == "backward":
        option = f"rest={misa.rest!r}" if misa.rest != "none" else "update_in='backward'"
        raise ValueError(f"{option} is not there with sharded weights; use rest='none' and update_in='step'")
    parts, size = meta.partition(misa), meta.dtype.itemsize
    layers: dict[int | None, int] = defaultdict(int)
    for name, parameter in meta.model.named_parameters():
        layers[next((int(word) for word in name.split(".") if word.isdigit()), None)] += parameter.nbytes
    root = layers.pop(None, 0)
    layer = max(layers.values(), default=0)
    shares = {name: _rows(p, gpus) for name, p in meta.model.named_parameters()}
    buffers = sum(buffer.nbytes for buffer in meta.model.buffers())
    in_a_layer = min(result.delta_parameters * size, layer)
    held = {
        **result.bytes,
        "weights": sum(shares.values()) * size + buffers,
        **optimizer_bytes(parts, misa, meta.dtype, rows=shares),
        # this layer and the next one, beside what lies outside the layers; a layer's gradients whole, and once as rows
        "gathered": 2 * layer + root,
        "reduced": in_a_layer + in_a_layer // gpus,
    }
    order = ("weights", "gathered", *OPTIMIZER, "reduced", *(name for name in CATEGORIES if name not in OPTIMIZER))
    active = result.delta_parameters + sum(parts.numels[name] for name in parts.always)
    return ShardedPlan(
        gpus=gpus,
        bytes={name: held[name] for name in dict.fromkeys(order) if held.get(name)},
        gathered_bytes=2 * sum(layers.values()) + root,
        reduced_bytes=active * size,
        inner_steps=misa.inner_steps,
        card_bytes=None if result.card is None else result.card.total_bytes,
    )


def _rows(parameter: Tensor, gpus: int) -> int:
    """Elements that the first process holds."""
    rows, *others = parameter.shape
    return -(-rows // gpus) * prod(others)


def enough_tokens(active_share: float | None, flops: float, bandwidth: float, gpus: int) -> float:
    """Tokens of a card from which on a step's arithmetic takes as long as its exchange; the model's size cancels out.

    Args:
        active_share: of the weights that train, for replicas (tokens of a step); None: sharded (of a micro-batch).
        flops: of a card.
        bandwidth: of its link, bytes a second.
        gpus: cards.
    """
    # bfloat16: an all-reduce sends its bytes twice; two gathers and a reduce-scatter once each
    bytes_a_weight = 2 * 2 * (gpus - 1) / gpus * (1.0 if active_share is None else active_share)
    return bytes_a_weight * flops / (FLOP_PER_WEIGHT_AND_TOKEN * bandwidth)

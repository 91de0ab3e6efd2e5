"""What replicas exchange, and how long that takes: arithmetic on paper, to be replaced by measurements.

K cards that each hold the whole model average the gradients of the active matrices once a step. A ring sends
2·(K-1)/K times these bytes from every card, so the time hardly depends on K, and most of it passes beside the backward
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition, check_budget

#: Link -> bytes a second in one direction that an all-reduce gets of it, about two thirds of what the link is sold as
#: (15.75, 31.5 and 300 GB/s; 25 and 100 Gbit/s). Cards without direct access to each other (RTX 40 and 50) get half.
LINKS: dict[str, float] = {
    "NVLink": 200e9,
    "PCIe 4 x16": 20e9,
    "PCIe 4 x8": 10e9,
    "100 Gbit Ethernet": 8e9,
    "25 Gbit Ethernet": 2e9,
}
#: Of these, what a plan shows.
SHOWN = ("PCIe 4 x8", "PCIe 4 x16", "NVLink")
#: One meeting of all hosts, for each process that takes part: two a step.
MEETING_SECONDS = 5e-5


@dataclass(frozen=True)
class ReplicaTraffic:
    """Bytes that each of K processes gives to be averaged."""

    gpus: int
    step_bytes: int
    """Gradients of the largest draw and of what is always trained."""
    round_bytes: int
    """The same over T steps; the comparisons at a switch are some bytes."""
    full_bytes: int
    """What data-parallel training of all weights would exchange in a step."""

    @property
    def sent_bytes(self) -> int:
        """What a card sends in a step, and receives: the ring's share."""
        return self.step_bytes * 2 * (self.gpus - 1) // self.gpus

    def seconds(self, bandwidth: float) -> float:
        """Time of a step's averages over a link of so many bytes a second, were nothing computed beside them."""
        return self.sent_bytes / bandwidth + 2 * self.gpus * MEETING_SECONDS

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        times = {link: self.seconds(LINKS[link]) for link in SHOWN}
        return {**asdict(self), "sent_bytes": self.sent_bytes, "seconds_a_step": times}

    def describe(self) -> str:
        """Two lines for people."""
        times = ", ".join(f"{1e3 * self.seconds(LINKS[link]):,.0f} ms over {link}" for link in SHOWN)
        return (
            f"{self.gpus} cards, a whole model on each: {self.step_bytes / 2**30:.2f} GiB of gradients a step, "
            f"{self.round_bytes / 2**30:.1f} GiB a round (all weights: {self.full_bytes / 2**30:.2f} GiB a step)\n"
            f"  estimated {times}, most of it beside the backward pass"
        )


def replica_traffic(parts: Partition, misa: MisaConfig, dtype: torch.dtype, gpus: int) -> ReplicaTraffic:
    """Count what replicas exchange.

    Args:
        parts: the model's partition under MISA's options.
        misa: budget, T and precision of the gradients.
        dtype: of the weights.
        gpus: cards, one process each; at least 2.

    Raises:
        ValueError: fewer than 2 cards, a rest rule, or a δ smaller than the largest unit.
    """
    if gpus < 2:
        raise ValueError(f"gpus is the number of cards that train together, at least 2; got {gpus}")
    if misa.for_processes().rest != "none":
        raise ValueError(f"rest={misa.rest!r} is for one process; several cards need rest='none'")
    size = 4 if misa.grad_dtype == "float32" else dtype.itemsize
    active = check_budget(parts, misa.delta) + sum(parts.numels[name] for name in parts.always)
    return ReplicaTraffic(gpus, active * size, active * size * misa.inner_steps, parts.total * size)


def scaling(traffic: ReplicaTraffic, compute_seconds: float, links: Mapping[str, float] = LINKS) -> dict[str, float]:
    """Link -> samples a second of K cards over K times those of one, were nothing computed beside the averages.

    Args:
        traffic: of K cards.
        compute_seconds: of a step on one card.
        links: name -> bytes a second.
    """
    return {name: compute_seconds / (compute_seconds + traffic.seconds(speed)) for name, speed in links.items()}

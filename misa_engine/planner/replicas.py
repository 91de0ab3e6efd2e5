"""What replicas exchange, and how long that takes: arithmetic on paper, to be replaced by measurements.

K cards that each hold the whole model average the gradients of the active matrices once a step, and in the steps in
which the rest rule moves those of all that rests: about all weights. A ring sends 2·(K-1)/K times these bytes from
every card, and with ``shard_state`` (K-1)/K times the active weights, so the time hardly depends on K. Most of it
passes beside the backward pass; the weights are sent after the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
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
    """Gradients of the largest draw, of what is always trained and, in a step in which it moves, of what rests."""
    round_bytes: int
    """The same over T steps, on average; the comparisons at a switch are some bytes."""
    full_bytes: int
    """What data-parallel training of all weights would exchange in a step."""
    rest: str = "none"
    """The rest rule."""
    rest_bytes: int = 0
    """Of ``step_bytes``, what rests (at most, with scope "above")."""
    rest_every: int = 1
    """It moves in every k-th step."""
    weight_bytes: int = 0
    """With ``shard_state``, the active weights that are put together from everybody's parts after an update."""

    @property
    def sent_bytes(self) -> int:
        """What a card sends in a step, and receives: the ring's share."""
        return (2 * self.step_bytes + self.weight_bytes) * (self.gpus - 1) // self.gpus

    def seconds(self, bandwidth: float) -> float:
        """Time of a step's averages over a link of so many bytes a second, were nothing computed beside them."""
        meetings = 2 + (self.rest_bytes > 0)  # a pass in which what rests takes part is announced
        return self.sent_bytes / bandwidth + meetings * self.gpus * MEETING_SECONDS

    def mean_seconds(self, bandwidth: float) -> float:
        """The same on average over steps with and without a move of what rests."""
        still, every = self.without_rest.seconds(bandwidth), self.rest_every
        return (self.seconds(bandwidth) + (every - 1) * still) / every

    @property
    def without_rest(self) -> ReplicaTraffic:
        """The same run with ``rest="none"``, or a step in which nothing that rests moves."""
        active = self.step_bytes - self.rest_bytes
        steps = (self.round_bytes - active) * self.rest_every // self.rest_bytes if self.rest_bytes else 0
        return replace(self, step_bytes=active, round_bytes=active * steps, rest="none", rest_bytes=0, rest_every=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        times = {link: self.seconds(LINKS[link]) for link in SHOWN}
        return {**asdict(self), "sent_bytes": self.sent_bytes, "seconds_a_step": times}

    def describe(self) -> str:
        """Two lines for people; two more where what rests is most of it."""

        def times(seconds: Callable[[float], float]) -> str:
            return ", ".join(f"{1e3 * seconds(LINKS[link]):,.0f} ms over {link}" for link in SHOWN)

        lines = [
            f"{self.gpus} cards, a whole model on each: {self.step_bytes / 2**30:.2f} GiB of gradients a step, "
            f"{self.round_bytes / 2**30:.1f} GiB a round (all weights: {self.full_bytes / 2**30:.2f} GiB a step)",
            f"  estimated {times(self.seconds)}, most of it beside the backward pass",
        ]
        if self.weight_bytes:
            lines.append(
                f"  shard_state: each keeps 1/{self.gpus} of moments and residual bits; "
                f"{self.weight_bytes / 2**30:.2f} GiB of updated weights are sent after each step, with nothing beside "
                "them (in the estimate)"
            )
        if self.rest_bytes:
            often = "every step" if self.rest_every == 1 else f"every {self.rest_every}th step"
            fewer = replace(self, rest_every=max(4, 4 * self.rest_every))
            lines += [
                f"  of these {self.rest_bytes / 2**30:.2f} GiB in {often} are of what moves by rest={self.rest!r}; "
                f"without them (rest='none') {self.without_rest.step_bytes / 2**30:.2f} GiB and "
                f"{times(self.without_rest.seconds)}",
                f"  rest_every={fewer.rest_every} instead, on average: {times(fewer.mean_seconds)}; accumulation "
                "divides the share of the exchange, which is once a step",
            ]
        return "\n".join(lines)


def replica_traffic(
    parts: Partition, misa: MisaConfig, dtype: torch.dtype, gpus: int, can_rest: int = 0
) -> ReplicaTraffic:
    """Count what replicas exchange.

    Args:
        parts: the model's partition under MISA's options.
        misa: budget, T, rest rule and precision of the gradients.
        dtype: of the weights.
        gpus: cards, one process each; at least 2.
        can_rest: elements of all matrices that can rest (``engine.rest.can_rest``); 0 without a rest rule.

    Raises:
        ValueError: fewer than 2 cards, or a δ smaller than the largest unit.
    """
    if gpus < 2:
        raise ValueError(f"gpus is the number of cards that train together, at least 2; got {gpus}")
    size = 4 if misa.grad_dtype == "float32" else dtype.itemsize
    drawn = min(check_budget(parts, misa.delta), sum(unit.numel for unit in parts.units))
    active = (drawn + sum(parts.numels[name] for name in parts.always)) * size
    rests = max(0, can_rest - drawn) * dtype.itemsize  # what a smaller draw leaves out rests, and costs no more
    return ReplicaTraffic(
        gpus,
        step_bytes=active + rests,
        round_bytes=active * misa.inner_steps + rests * misa.inner_steps // misa.rest_every,
        full_bytes=parts.total * size,
        rest=misa.rest if rests else "none",
        rest_bytes=rests,
        rest_every=misa.rest_every if rests else 1,
        weight_bytes=active // size * dtype.itemsize if misa.shard_state else 0,
    )


def scaling(traffic: ReplicaTraffic, compute_seconds: float, links: Mapping[str, float] = LINKS) -> dict[str, float]:
    """Link -> samples a second of K cards over K times those of one, were nothing computed beside the averages.

    Args:
        traffic: of K cards.
        compute_seconds: of a step on one card.
        links: name -> bytes a second.
    """
    return {name: compute_seconds / (compute_seconds + traffic.mean_seconds(speed)) for name, speed in links.items()}

"""What matrices that rest in 8 bits change in a plan: bytes on the card and on the host, and the time of dequantising.

card   resident_codes, resident_steps   every matrix that can rest, drawn ones included
       resident_workspace               one, in the weights' dtype, as large as the largest of them
       weights                          what cannot rest: head, norms, biases, what is no linear layer
host   masters                          what rests, exactly
       embedding                        the frozen one, whose rows are looked up there
       residual_bits, moments           as in any run with leave_rounding="keep", revisit="keep" or "offload"
       each process of a run on several cards holds its own
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from misa_engine.engine.residents.lookup import host_embedding
from misa_engine.errors import UserError
from misa_engine.kernels.resident8 import FORMATS
from misa_engine.method.config import MisaConfig, check_choice
from misa_engine.method.partition import check_budget
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.replicas import LINKS
from misa_engine.planner.speeds import SPEEDS, peak_flops

if TYPE_CHECKING:
    from misa_engine.planner.cards import Card
    from misa_engine.planner.worst_case import MetaModel

#: Bytes on the host for each element of an inactive matrix: two float32 moments, or two in 8 bits with their scales.
HOST_MOMENTS = {"keep": 8.0, "offload": 2.125}
#: Of ``replicas.LINKS``, over which masters come and go.
LINK = "PCIe 4 x16"


@dataclass(frozen=True)
class Dequantisation:
    """What it costs to write the matrices that rest into the workspace, for one micro-batch; computed, not measured."""

    passes: int
    """Forward and input gradient, and with checkpointing the forward again."""
    bytes: int
    """Read as payload and scales, written to the workspace, read from there by the GEMM."""
    operations: int
    """Of the micro-batch's matrix products."""
    card: str | None = None
    """Whose published speeds the times below are from; None where they are unknown."""
    seconds: float | None = None
    """Of ``bytes`` at the card's full memory speed."""
    gemm_seconds: float | None = None
    """Of ``operations`` at its full arithmetic speed."""

    def describe(self) -> str:
        """One line for people."""
        text = f"dequantising: {self.bytes / 1e9:,.1f} GB read and written a micro-batch, in {self.passes} passes"
        if self.seconds is None or self.gemm_seconds is None:
            return f"{text} (computed; --gpu with a card's name adds the time)"
        share = self.seconds / self.gemm_seconds
        return (
            f"{text}: {1e3 * self.seconds:,.0f} ms beside {1e3 * self.gemm_seconds:,.0f} ms of matrix products, "
            f"{share:.0%} (computed from the published speeds of {self.card}, not measured)"
        )


@dataclass(frozen=True)
class SwitchCopies:
    """What a switch copies between host and card; computed, not measured."""

    bytes: int
    """Exact weights of what leaves and of what comes, and what is kept of both on the host."""
    seconds: float
    """Of ``bytes`` over LINK, one after the other."""
    inner_steps: int
    round_seconds: float | None = None
    """Of the round's matrix products at the card's full arithmetic speed, one micro-batch a step; None if unknown."""

    def describe(self) -> str:
        """One line for people."""
        text = f"a switch copies {_gib(self.bytes)} between host and card: {1e3 * self.seconds:,.0f} ms over {LINK}"
        if self.round_seconds is None:
            return f"{text}, once in {self.inner_steps} steps (computed)"
        share = self.seconds / self.round_seconds
        return f"{text}, {share:.2%} of the matrix products of {self.inner_steps} steps (computed, not measured)"


@dataclass(frozen=True)
class ResidentPlan:
    """How the model lies on the card and on the host while its undrawn matrices rest in 8 bits."""

    format: str
    matrices: tuple[str, ...]
    """Names of those that rest."""
    stays: tuple[str, ...]
    """Names of the matrices that stay as they are."""
    on_host: str | None
    """Name of the frozen embedding, whose rows are looked up on the host; None where it is on the card."""
    card_bytes: Mapping[str, int]
    """By category of ``plan.CATEGORIES``, "weights" among them: what a plan without residents counts as weights."""
    host_bytes: Mapping[str, int]
    """Of one process, by category."""
    dequantisation: Dequantisation
    switch: SwitchCopies
    processes: int = 1
    """Replicas on one host, each of which holds its own."""

    @property
    def host_total_bytes(self) -> int:
        """Of all processes."""
        return self.processes * sum(self.host_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": self.format,
            "matrices": len(self.matrices),
            "stays": list(self.stays),
            "on_host": self.on_host,
            "host_bytes": dict(self.host_bytes),
            "host_total_bytes": self.host_total_bytes,
            "processes": self.processes,
            "dequantisation": {**asdict(self.dequantisation), "basis": "computed, not measured"},
            "switch": {**asdict(self.switch), "basis": "computed, not measured"},
        }

    def describe(self) -> list[str]:
        """Lines for people."""
        packed = self.card_bytes["resident_codes"] + self.card_bytes["resident_steps"]
        host = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in self.host_bytes.items())
        if self.processes > 1:
            host += f" in each of {self.processes} processes, if they share a host"
        shown = ", ".join(self.stays[:3]) + (f" and {len(self.stays) - 3} more" if len(self.stays) > 3 else "")
        return [
            f"residents {self.format}: {len(self.matrices)} matrices rest in {_gib(packed)}; as they are: "
            f"{shown or 'none'}",
            f"host memory: {_gib(self.host_total_bytes)} ({host})",
            self.dequantisation.describe(),
            self.switch.describe(),
        ]


def without_rest(misa: MisaConfig) -> MisaConfig:
    """The options for a model with residents: the preset's rest rule, which moves weights in place, is off.

    Raises:
        UserError: a rest rule was asked for, or the state is divided over processes.
    """
    if misa.shard_state:
        raise UserError("residents with shard_state: drawn weights lie in the arena whole; leave out one of the two.")
    found = misa.without_own_rest()
    if found.rest != "none":
        raise UserError(
            f"rest={misa.rest!r} moves every matrix in place, which residents in 8 bits cannot take: leave out "
            "residents, or use rest='none'."
        )
    return found


def resident_plan(
    meta: MetaModel, misa: MisaConfig, kind: str, micro_batch: MicroBatch, card: Card | None, processes: int = 1
) -> ResidentPlan:
    """Bytes and time of a run with residents, without allocating anything.

    Args:
        meta: the model.
        misa: budget, what always trains and what is kept of inactive matrices; without a rest rule.
        kind: the format, one of FORMATS.
        micro_batch: how it is run.
        card: for the time.
        processes: that train replicas on one host.

    Raises:
        ValueError: unknown format, or a model none of whose matrices can rest.
    """
    check_choice("residents", kind, FORMATS)
    parts = meta.partition(misa)
    named = dict(meta.model.named_parameters())
    awake = set(parts.always)  # on the card in full, for good
    resting = [name for name in meta.resident_matrices if name not in awake]
    if not resting:
        raise UserError(f"no matrix of {meta.name} can rest in 8 bits: leave out residents.")
    sizes = {name: named[name].numel() for name in resting}
    packed = [FORMATS[kind].bytes(tuple(named[name].shape)) for name in resting]
    codes, steps = (sum(each) for each in zip(*packed, strict=True))
    size, total = meta.dtype.itemsize, sum(sizes.values())
    sampled = [name for unit in parts.units for name in unit.params]
    budget = check_budget(parts, misa.delta)
    on_host = embedding_on_host(meta, misa)
    lookup = named[on_host].nbytes if on_host else 0
    drawable = sum(parts.numels[name] for name in sampled)
    card_bytes = {
        "weights": meta.weight_bytes - size * total - lookup,
        "resident_codes": codes,
        "resident_steps": steps,
        "resident_workspace": size * max(named[name].numel() for name in meta.resident_matrices),
    }
    kept = {  # bytes an element
        "residual_bits": 2 if misa.leave_rounding == "keep" and size == 2 else 0,
        "moments": HOST_MOMENTS.get(misa.revisit, 0.0),
    }
    host_bytes = {
        "masters": size * total,
        "embedding": lookup,
        **{name: round(each * drawable) for name, each in kept.items()},
    }
    drawn = min(budget, sum(sizes.get(name, 0) for name in sampled))
    dequantisation = _dequantisation(meta, total, codes + steps, drawn, micro_batch, card)
    copied = round(2 * drawn * (size + sum(kept.values())))
    products = dequantisation.gemm_seconds
    round_seconds = None if products is None else misa.inner_steps * products
    switch = SwitchCopies(copied, copied / LINKS[LINK], misa.inner_steps, round_seconds)
    return ResidentPlan(
        kind,
        tuple(resting),
        tuple(name for name, tensor in named.items() if tensor.ndim > 1 and name not in sizes),
        on_host,
        card_bytes,
        {name: count for name, count in host_bytes.items() if count},
        dequantisation,
        switch,
        processes,
    )


def embedding_on_host(meta: MetaModel, misa: MisaConfig) -> str | None:
    """Name of the input embedding where its rows are looked up on the host, as it never trains; else None."""
    found = host_embedding(meta.model)
    return found[0] if found is not None and found[0] in meta.partition(misa).frozen else None


def _dequantisation(
    meta: MetaModel, total: int, packed: int, drawn: int, micro_batch: MicroBatch, card: Card | None
) -> Dequantisation:
    """The cost of one micro-batch, as if the backward pass went down to the lowest layer.

    Args:
        meta: the model.
        total: elements of what rests.
        packed: bytes of payload and scales.
        drawn: elements that are active, and so not dequantised.
        micro_batch: tokens, and whether the forward pass is made again.
        card: whose speeds count, if they are known.
    """
    passes = 3 if micro_batch.checkpointing else 2
    moved = passes * (total - drawn) / total * (packed + 2 * meta.dtype.itemsize * total)
    model: Any = meta.model
    head = model.get_output_embeddings()
    others = 2 * head.weight.numel() if head is not None else 0  # its forward and its input gradient
    operations = 2 * micro_batch.tokens * (passes * total + others + drawn)
    speed = SPEEDS.get(card.name) if card is not None else None
    if speed is None or card is None:
        return Dequantisation(passes, round(moved), operations)
    memory, arithmetic = speed[0] * 1e9, peak_flops(card.name)
    return Dequantisation(passes, round(moved), operations, card.name, moved / memory, operations / arithmetic)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

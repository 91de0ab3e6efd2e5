"""The arena as the kernels see it: slots, the tiles they are cut into, and the control block of a step.

The arena is a set of flat buffers (gradient, moments, residual bits) of the same ``capacity``. A *slot* is the stretch
that belongs to one active parameter; it starts at a multiple of BLOCK and its last tile is padded. A *tile* is BLOCK
consecutive elements; one Triton program handles one tile. The weights stay in the model and are reached through a
table of addresses, one a tile, so that a switch of the active set rewrites a table and never a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements of a tile. 1024 with 4 warps is 8 elements a thread: one 16-byte access for bf16, two for fp32.
BLOCK = 1024

#: Elements that the references handle at once. Six buffers of 124 KB stay in the cache, and below 32,768 elements torch
#: runs an operation on the calling thread: with 15 operations a chunk, waiting for a second core that is busy with
#: something else made a step of 8 million parameters take 3.1 s instead of 21 ms.
CHUNK = 31 * BLOCK

#: Tiles whose sums of squares one program adds up on the way to the global norm: 2 million elements, so that 240
#: million parameters occupy 115 programs, whose sums are left to one. That one alone would take 65 to 110 µs.
PART = 2048

#: Elements of 8-bit moments that share a scale; a divisor of BLOCK, so that no group lies in two slots.
GROUP = 64

#: Tables begin at multiples of this many bytes in their common buffer, as Triton's 16-byte accesses need.
ALIGNMENT = 16

#: Moments from here on count as not finite in 8 bits: 254·m must not overflow. A finite v implies |g| < 1.9e19, so
#: |m| < 1.9e19.
HUGE = 1e36

#: Least divisor in the factors 254/a and 255/s of a group, so that they are finite. The root of the smallest v is
#: larger; where all m of a group are smaller, which nothing moves by beside ε, they are stored smaller still.
TINY = 2.0**-80

#: 1.5·2^23: added to |x| < 2^22, rounds x to the nearest even integer and leaves it in the lowest byte.
ROUNDING = 12582912.0

#: Rows of the bias table at most (8 MB a group); reached by no beta below 0.99998.
MAX_BIAS_ROWS = 1 << 20


class Coefficients(NamedTuple):
    """Columns of ``TileTable.slot_coef``, resolved once a step by ``finalise`` and read by every tile of the slot."""

    beta1: Tensor
    gain1: Tensor  # (1-β1)·clip
    beta2: Tensor
    gain2: Tensor  # (1-β2)·clip²
    eps: Tensor  # c₁·ε
    minus_step: Tensor  # -lr·c₀
    minus_decay: Tensor  # -lr·wd
    runs: Tensor  # 1 = the slot is updated, 0 = not a bit of it changes


class Hyper(NamedTuple):
    """Columns of ``hyper``, one row a parameter group."""

    lr: float
    decay: float  # lr·wd
    beta1: float
    gain1: float  # 1-β1
    beta2: float
    gain2: float  # 1-β2
    eps: float
    closing: float  # lr·β1/(1-β1), the factor of Algorithm 1, line 16


class Bias(NamedTuple):
    """Columns of the bias table, one row a step count (see ``bias_table``)."""

    step: Tensor  # c₀
    eps: Tensor  # c₁


@dataclass(frozen=True)
class Slot:
    """One active parameter and its place in the arena."""

    weight: Tensor
    """(numel,) float32 or bfloat16, contiguous flat view of the model's memory, modified in place by the update."""
    start: int
    """First element in the arena, a multiple of BLOCK."""
    numel: int
    """Number of elements, not counting the padding of the last tile."""
    group: int
    """Row of ``hyper`` and of the bias table."""

    @property
    def first_tile(self) -> int:
        """Index of the slot's first tile."""
        return self.start // BLOCK

    @property
    def n_tiles(self) -> int:
        """Number of tiles, the last one possibly partial; one, unused, where there are no elements (empty shards)."""
        return max(1, -(-self.numel // BLOCK))

    @property
    def tiles(self) -> range:
        """The slot's tiles, for the functions that take a range of tiles."""
        return range(self.first_tile, self.first_tile + self.n_tiles)


def host_buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised host memory whose copy to ``device`` nobody has to wait for: pinned where that is a GPU.

    torch gives it to nobody else before a copy from it, queued with ``non_blocking=True``, is done.
    """
    return torch.empty(numel, dtype=dtype, pin_memory=device.type == "cuda")


@dataclass
class TileTable:
    """What each tile belongs to. Device tensors, allocated once at their largest size; ``bind`` rewrites them.

    What ``bind`` writes lies in one buffer, so that a switch is one copy from the host.
    """

    wptr: Tensor  # (max_tiles,) int64, address of the tile's first weight
    length: Tensor  # (max_tiles,) int32, weights in the tile; 0 = unused, the program returns at once
    slot: Tensor  # (max_tiles,) int32, index of the tile's slot
    slot_first_tile: Tensor  # (max_slots,) int32
    slot_n_tiles: Tensor  # (max_slots,) int32
    slot_group: Tensor  # (max_slots,) int32, row of hyper and of the bias table
    slot_bf16: Tensor  # (max_slots,) int32, 1 = bfloat16 weight, 0 = float32
    slot_present: Tensor  # (max_slots,) int32, 0 = got no gradient this step and is left alone; written by the caller
    slot_step: Tensor  # (max_slots,) int32, Adam steps since fresh moments; reset by the caller, counted by finalise
    slot_measured: Tensor  # (max_slots,) int32, steps that entered the score; reset by the caller, counted by finalise
    slot_coef: Tensor  # (max_slots, 8) float32, see Coefficients; written by finalise and closing_step
    norm_parts: Tensor  # (max_tiles/PART rounded up,) float64, scratch space of the global norm
    bound: Tensor  # bytes, the memory of what ``bind`` writes
    slots: tuple[Slot, ...] = ()
    n_tiles: int = 0
    aligned: bool = True

    @classmethod
    def allocate(cls, max_tiles: int, max_slots: int, device: torch.device | str) -> TileTable:
        """Allocate an empty table for at most ``max_tiles`` tiles and ``max_slots`` slots."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        bound = zeros(_tables_bytes(max_tiles, max_slots), dtype=torch.uint8)
        tables = _tables(bound, max_tiles, max_slots)
        return cls(
            wptr=tables["wptr"],
            length=tables["length"],
            slot=tables["slot"],
            slot_first_tile=tables["slot_first_tile"],
            slot_n_tiles=tables["slot_n_tiles"],
            slot_group=tables["slot_group"],
            slot_bf16=tables["slot_bf16"],
            slot_present=zeros(max_slots),
            slot_step=zeros(max_slots),  # apart: a checkpoint has the steps, and not the addresses beside them
            slot_measured=zeros(max_slots),
            slot_coef=zeros(max_slots, len(Coefficients._fields), dtype=torch.float32),
            norm_parts=zeros(-(-max_tiles // PART), dtype=torch.float64),
            bound=bound,
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        own = (self.bound, self.slot_present, self.slot_step, self.slot_measured, self.slot_coef, self.norm_parts)
        return sum(tensor.nbytes for tensor in own)

    def bind(self, slots: Sequence[Slot], steps: Sequence[int] | None = None) -> None:
        """Point the table at ``slots`` (once a switch, and whenever a weight has moved in memory).

        One copy, which nobody waits for. Leaves ``slot_present`` and ``slot_measured`` alone: which of them survive a
        switch, and under which index, is the caller's knowledge. Tiles between slots stay unused.

        Args:
            slots: what the table is to describe.
            steps: Adam steps since fresh moments by slot; None leaves ``slot_step`` alone.

        Raises:
            ValueError: a slot does not fit the table, overlaps another, or has a weight the kernels cannot update.
        """
        self._check(slots)
        max_tiles, max_slots = self.length.numel(), self.slot_group.numel()
        staged = host_buffer(self.bound.numel(), torch.uint8, self.bound.device).zero_()
        table = _tables(staged, max_tiles, max_slots)
        for index, entry in enumerate(slots):
            tiles = slice(entry.first_tile, entry.first_tile + entry.n_tiles)
            offset = torch.arange(entry.n_tiles, dtype=torch.int64) * BLOCK
            table["wptr"][tiles] = entry.weight.data_ptr() + offset * entry.weight.element_size()
            table["length"][tiles] = (entry.numel - offset).clamp_(max=BLOCK).int()
            table["slot"][tiles] = index
        n = len(slots)
        table["slot_first_tile"][:n] = torch.tensor([entry.first_tile for entry in slots])
        table["slot_n_tiles"][:n] = torch.tensor([entry.n_tiles for entry in slots])
        table["slot_group"][:n] = torch.tensor([entry.group for entry in slots])
        table["slot_bf16"][:n] = torch.tensor([entry.weight.dtype == torch.bfloat16 for entry in slots])
        if steps is not None:
            table["steps"][:n] = torch.tensor(steps)
        self.bound.copy_(staged, non_blocking=True)
        if steps is not None:
            self.slot_step.copy_(_tables(self.bound, max_tiles, max_slots)["steps"])
        self.slots = tuple(slots)
        self.n_tiles = max((entry.tiles.stop for entry in slots), default=0)
        # 16-byte accesses need the address and, for the mask of the last tile, the length in multiples of 16.
        self.aligned = all(entry.weight.data_ptr() % 16 == 0 and entry.numel % 16 == 0 for entry in slots)

    def _check(self, slots: Sequence[Slot]) -> None:
        if len(slots) > self.slot_group.numel():
            raise ValueError(f"the table holds {self.slot_group.numel()} slots; got {len(slots)}")
        end = 0
        for entry in sorted(slots, key=lambda entry: entry.start):
            weight = entry.weight
            if weight.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"weights must be float32 or bfloat16; got {weight.dtype}: load the model in bfloat16")
            if weight.shape != (entry.numel,) or not weight.is_contiguous():
                raise ValueError(
                    f"a slot's weight must be a contiguous flat view of {entry.numel} elements; got shape "
                    f"{tuple(weight.shape)}, stride {weight.stride()}. Make the parameter contiguous before training."
                )
            if weight.device != self.wptr.device:
                raise ValueError(
                    f"a weight is on {weight.device}, the arena on {self.wptr.device}. Build the optimizer after "
                    "moving the model."
                )
            if entry.start % BLOCK or entry.start < end * BLOCK:
                raise ValueError(
                    f"slots must start at multiples of {BLOCK} and not overlap; got start {entry.start} after a slot "
                    f"that ends at {end * BLOCK}"
                )
            end = entry.tiles.stop
        if end > self.length.numel():
            raise ValueError(f"the table holds {self.length.numel()} tiles; the slots end at tile {end}")

    def slots_in(self, tiles: range | None) -> list[tuple[int, Slot]]:
        """Index and slot of every slot that lies in ``tiles`` (None: all). A range never cuts through a slot."""
        if tiles is None:
            return list(enumerate(self.slots))
        return [(index, slot) for index, slot in enumerate(self.slots) if slot.first_tile in tiles]

    def tile_range(self, tiles: range | None) -> range:
        """``tiles``, or every tile in use."""
        return range(self.n_tiles) if tiles is None else tiles


def _layout(max_tiles: int, max_slots: int) -> Iterator[tuple[str, torch.dtype, int, int]]:
    """Name, dtype, first byte and bytes of each table in ``TileTable.bound``."""
    start = 0
    for names, dtype, numel in (
        (("wptr",), torch.int64, max_tiles),
        (("length", "slot"), torch.int32, max_tiles),
        (("slot_first_tile", "slot_n_tiles", "slot_group", "slot_bf16", "steps"), torch.int32, max_slots),
    ):
        for name in names:
            yield name, dtype, start, numel * dtype.itemsize
            start += -(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _tables_bytes(max_tiles: int, max_slots: int) -> int:
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for *_, size in _layout(max_tiles, max_slots))


def _tables(buffer: Tensor, max_tiles: int, max_slots: int) -> dict[str, Tensor]:
    """The tables that lie in ``buffer``, by name."""
    return {
        name: buffer[start : start + size].view(dtype) for name, dtype, start, size in _layout(max_tiles, max_slots)
    }


@dataclass
class Control:
    """The numbers of one step that stay on the device, so that no step waits for the host. All of shape (1,)."""

    skip: Tensor  # int32, 1 = a gradient of this step is not finite and nothing may change
    clip_coef: Tensor  # float32, factor on every gradient, at most 1
    grad_norm: Tensor  # float32, global norm of the gradients before clipping
    max_norm: Tensor  # float32, bound of the global norm, inf = none; written by the caller
    skipped_steps: Tensor  # int32, steps skipped so far

    @classmethod
    def allocate(cls, device: torch.device | str) -> Control:
        """Nothing skipped, nothing clipped."""
        return cls(
            skip=torch.zeros(1, dtype=torch.int32, device=device),
            clip_coef=torch.ones(1, device=device),
            grad_norm=torch.zeros(1, device=device),
            max_norm=torch.full((1,), math.inf, device=device),
            skipped_steps=torch.zeros(1, dtype=torch.int32, device=device),
        )


def hyper_row(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> list[float]:
    """One row of ``hyper`` (see Hyper), computed in float64: ``1 - beta2`` in float32 would cost 1.3e-5 in v."""
    beta1, beta2 = betas
    return list(
        Hyper(
            lr=lr,
            decay=lr * weight_decay,
            beta1=beta1,
            gain1=1 - beta1,
            beta2=beta2,
            gain2=1 - beta2,
            eps=eps,
            closing=lr * beta1 / (1 - beta1),
        )
    )


def bias_table(betas: Sequence[tuple[float, float]], *, enabled: bool, device: torch.device | str) -> Tensor:
    """Adam's bias correction by step count, computed in float64.

    m̂/(√v̂ + ε) with m̂ = m/(1-β1^t), v̂ = v/(1-β2^t) is  c₀·m/(√v + c₁·ε)  with  c₁ = √(1-β2^t), c₀ = c₁/(1-β1^t).

    Args:
        betas: (β1, β2) of each parameter group.
        enabled: False makes both factors 1 at every step, so that one kernel serves both cases.
        device: where the table lives.

    Returns:
        (n_groups, rows, 2) float32: c₀ and c₁ after t = 0, 1, ... steps. The last row is 1 to float32 and stands for
        all later steps; row 0 (no step yet) is 1.
    """
    if not enabled:
        return torch.ones((len(betas), 2, 2), device=device)
    # 1 - β^t rounds to 1 in float32 once β^t < 2^-25: 17,321 steps for β = 0.999.
    largest = max(max(pair) for pair in betas)
    rows = 2 if largest == 0 else min(MAX_BIAS_ROWS, max(2, math.ceil(-25 * math.log(2) / math.log(largest)) + 1))
    t = torch.arange(1, rows, dtype=torch.float64)
    table = torch.ones((len(betas), rows, 2), dtype=torch.float64)
    for row, (beta1, beta2) in zip(table, betas, strict=True):
        eps_factor = (1 - beta2**t).sqrt()
        row[1:] = torch.stack(Bias(step=eps_factor / (1 - beta1**t), eps=eps_factor), dim=1)
    return table.float().to(device)


def first_grad_tile(grad_start: int) -> int:
    """Tile of a gradient's first element. Kernels count in tiles: int32 is enough, and addresses stay aligned."""
    if grad_start % BLOCK:
        raise ValueError(f"grad_start must be the start of a slot, a multiple of {BLOCK}; got {grad_start}")
    return grad_start // BLOCK


def chunk_size(slots: list[tuple[int, Slot]]) -> int:
    """Elements of scratch space for a reference's pass over ``slots``, a multiple of BLOCK."""
    return min(CHUNK, max((slot.n_tiles for _, slot in slots), default=1) * BLOCK)


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """First element and number of elements of each part that a reference handles at once."""
    for first in range(0, numel, CHUNK):
        yield first, min(CHUNK, numel - first)

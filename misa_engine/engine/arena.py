"""Arena: the fixed set of buffers through which the weight matrices move.

Everything is allocated once, at construction. A *slot* is the stretch of the flat buffers that one active parameter
occupies: its gradient, both moments and, for a bfloat16 model, the lower 16 bits of its master weight. The weights
themselves stay in the model; a table of addresses leads the kernel to them.

    grad        |  q_proj.3  |k.7|      up_proj.1      | free |     weight dtype
    exp_avg     |  q_proj.3  |k.7|      up_proj.1      | free |     float32, or int8 and scales
    exp_avg_sq  |  q_proj.3  |k.7|      up_proj.1      | free |     float32, or uint8 and scales
    residual    |  q_proj.3  |k.7|      up_proj.1      | free |     int16, bfloat16 models only
    weights     |  q_proj.3  |k.7|      up_proj.1      | free |     weight dtype, models with residents only
                 slots start at multiples of BLOCK; their tails are zero

This file knows torch and the kernels' tables, nothing of models, rounds or probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from misa_engine.engine.shards import first_element, local
from misa_engine.kernels.blockwise8 import GROUP
from misa_engine.kernels.tiles import BLOCK, Slot, TileTable, host_buffer
from misa_engine.method.config import MisaConfig

#: Bytes copied at a time when a slot moves onto itself: large enough that launches do not count (4 MiB takes 8 µs to
#: copy at 1 TB/s, a launch 5 µs), small enough not to count as memory.
MOVE_BYTES = 4 << 20


def padded(numel: int) -> int:
    """Elements that a parameter of ``numel`` elements occupies: the next multiple of BLOCK, at least one BLOCK."""
    return max(1, -(-numel // BLOCK)) * BLOCK


def packed_starts(numels: Iterable[int]) -> list[int]:
    """First elements of slots of these sizes, one after the other."""
    starts, position = [], 0
    for numel in numels:
        starts.append(position)
        position += padded(numel)
    return starts


def upload(values: Sequence[int] | Sequence[Sequence[float]], buffer: Tensor) -> None:
    """Write host numbers into the front of a device buffer without waiting for the device (pinned, asynchronous)."""
    numbers = torch.tensor(values, dtype=buffer.dtype)
    staged = host_buffer(numbers.numel(), buffer.dtype, buffer.device).view(numbers.shape).copy_(numbers)
    buffer[: len(values)].copy_(staged, non_blocking=True)


def capacity_for(budget: int, sampled: Iterable[int], always: Iterable[int]) -> tuple[int, int]:
    """Size the arena for every draw that the budget allows.

    Args:
        budget: floor(δ·N), the most elements that sampled parameters may hold together.
        sampled: sizes of all parameters that can be drawn.
        always: sizes of the parameters that are always trained, outside the budget.

    Returns:
        ``(elements, slots)``. Elements include the worst padding: every parameter whose size is no multiple of BLOCK
        wastes less than one block, and at most as many can be active as the smallest ones that fit together.
    """
    held, most_slots, padding = 0, 0, 0
    for numel in sorted(sampled):
        if held + numel > budget:
            break
        held += numel
        most_slots += 1
    uneven = sorted(numel for numel in sampled if numel % BLOCK)
    held = 0
    for numel in uneven:
        if held + numel > budget:
            break
        held += numel
        padding += BLOCK - 1
    fixed = [padded(numel) for numel in always]
    return padded(budget + padding) + sum(fixed), most_slots + len(fixed)


def capacity_of_rows(
    budget: int, sampled: Iterable[tuple[int, int]], always: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """As ``capacity_for``, where a process holds rows of every parameter.

    The budget is in elements of whole parameters. What fits it at most is what would if they could be cut, those first
    of which a process holds most.

    Args:
        budget: as in ``capacity_for``.
        sampled: elements of each parameter that can be drawn, whole and as the process holds it.
        always: the same of what is always trained.
    """
    sampled, always = list(sampled), list(always)
    _, slots = capacity_for(budget, [whole for whole, _ in sampled], [whole for whole, _ in always])
    room, elements = budget, 0
    for whole, held in sorted(sampled, key=lambda sizes: -padded(sizes[1]) / sizes[0]):
        taken = min(room, whole)
        elements += -(-padded(held) * taken // whole)
        room -= taken
    return padded(elements) + sum(padded(held) for _, held in always), slots


def arena_options(config: MisaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``Arena`` that MISA's options ask for, for weights of ``dtype``."""
    return {
        "dtype": dtype,
        "split": dtype == torch.bfloat16 and config.master == "split",
        "state_dtype": config.state_dtype,
        "grad_dtype": torch.float32 if config.grad_dtype == "float32" else None,
        "hold_gradients": config.update_in == "step",
    }


def arena_bytes(
    capacity: int,
    max_slots: int,
    *,
    dtype: torch.dtype,
    split: bool,
    state_dtype: str = "float32",
    grad_dtype: torch.dtype | None = None,
    hold_gradients: bool = True,
    weights_from: int | None = None,
) -> dict[str, int]:
    """Bytes that an ``Arena`` of these arguments will take, by category, without allocating anything.

    Args:
        capacity: elements of each buffer, from ``capacity_for``.
        max_slots: most parameters bound at once, from ``capacity_for``.
        dtype: of the weights, float32 or bfloat16.
        split: 16 residual bits for each element.
        state_dtype: of the moments, "float32" or "int8".
        grad_dtype: of the gradient slots; None is the weights'.
        hold_gradients: False when each update runs inside the backward pass.
        weights_from: first element whose weights the arena holds, too; None: the model holds them.
    """
    arena = Arena(
        capacity,
        max_slots,
        dtype=dtype,
        device=torch.device("meta"),
        split=split,
        state_dtype=state_dtype,
        grad_dtype=grad_dtype,
        hold_gradients=hold_gradients,
        weights_from=weights_from,
    )
    return arena.bytes()


class Arena:
    """Flat buffers and the bookkeeping of who occupies which stretch.

    Args:
        capacity: elements of each buffer, a multiple of BLOCK.
        max_slots: most parameters that can be bound at once.
        dtype: weight dtype, float32 or bfloat16.
        device: where the model lives.
        split: keep the lower 16 bits of the master weights (bfloat16 only).
        state_dtype: of the moments: "float32", or "int8" (8-bit codes with a float32 scale every GROUP elements).
        grad_dtype: of the gradient slots; None is ``dtype``.
        hold_gradients: False where each update runs inside the backward pass: there are no gradient slots then.
        weights_from: first element whose weights lie here, too, because the model's own do not lie on the device while
            they rest; None: they lie in the model.
        hold_state: False where another arena has the moments and residual bits (``own_state``).
    """

    def __init__(
        self,
        capacity: int,
        max_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        split: bool,
        state_dtype: str = "float32",
        grad_dtype: torch.dtype | None = None,
        hold_gradients: bool = True,
        weights_from: int | None = None,
        hold_state: bool = True,
    ):
        def zeros(numel: int, kind: torch.dtype, wanted: bool = True) -> Tensor | None:
            return torch.zeros(numel, dtype=kind, device=device) if wanted else None

        tiles = capacity // BLOCK
        eight = state_dtype == "int8"
        self.capacity = capacity
        self.grad = zeros(capacity, grad_dtype or dtype, hold_gradients)
        self._holds_state, kept = hold_state, capacity if hold_state else 0
        self.exp_avg = torch.zeros(kept, dtype=torch.int8 if eight else torch.float32, device=device)
        self.exp_avg_sq = torch.zeros(kept, dtype=torch.uint8 if eight else torch.float32, device=device)
        self.exp_avg_scale = zeros(capacity // GROUP, torch.float32, eight)
        self.exp_avg_sq_scale = zeros(capacity // GROUP, torch.float32, eight)
        self.residual = zeros(capacity, torch.int16, split)
        self._weights_from = weights_from or 0
        self.weights = zeros(capacity - self._weights_from, dtype, weights_from is not None)
        self.table = TileTable.allocate(tiles, max_slots, device)
        self.tile_sumsq = torch.zeros(tiles, dtype=torch.float32, device=device)  # Σ over the steps of a round
        self.step_sumsq = torch.zeros(tiles, dtype=torch.float32, device=device)  # of the present step's gradients
        self.arrived_sumsq = zeros(tiles, torch.float32, hold_gradients)  # of gradients as they arrived
        self._scratch = torch.empty(min(capacity, MOVE_BYTES), dtype=torch.uint8, device=device)
        self.slots: list[Slot] = []
        self.names: list[str] = []
        self._shapes: list[torch.Size] = []

    @property
    def used(self) -> int:
        """Elements from the start of the buffers to the end of the last slot."""
        return self.slots[-1].start + padded(self.slots[-1].numel) if self.slots else 0

    def moments(self) -> dict[str, Tensor]:
        """What Adam remembers of each element: both moments and, at 8 bits, their scales."""
        named = {
            "first_moment": self.exp_avg,
            "second_moment": self.exp_avg_sq,
            "first_moment_scale": self.exp_avg_scale,
            "second_moment_scale": self.exp_avg_sq_scale,
        }
        if not self._holds_state:
            return {}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def buffers(self) -> dict[str, Tensor]:
        """The large buffers by category, for memory accounts and for tests that watch their addresses."""
        outer = {"gradients": self.grad, "residual_bits": self.residual, "active_weights": self.weights}
        return {**self.moments(), **{name: buffer for name, buffer in outer.items() if buffer is not None}}

    def part(self, parameter: Tensor) -> Tensor:
        """What of a parameter has its state here, a flat view: all of it, as far as this process holds it."""
        return local(parameter).detach().view(-1)

    def first(self, parameter: Tensor) -> int:
        """Index, in the flat whole parameter, of the first element of ``part``."""
        return first_element(parameter)

    def spread(self, indices: Iterable[int]) -> None:
        """After the weights in these slots were written: nothing, since this process wrote all that it holds."""

    def drop_residual(self, index: int) -> None:
        """Clear the residual bits of a slot whose weights somebody else wrote: they extend values that are gone."""
        if self.residual is not None:
            slot = self.slots[index]
            self.residual[slot.start : slot.start + slot.numel].zero_()

    def replicated(self) -> dict[str, Tensor]:
        """State up to the last slot, which has to be the same in all replicas."""
        named = {name: buffer for name, buffer in self.buffers().items() if name != "gradients"}
        return {name: self.stretch(buffer, 0, self.used) for name, buffer in named.items()}

    def bytes(self) -> dict[str, int]:
        """Bytes by category, tables and norms included."""
        sizes = self._buffer_bytes()
        small = [self.tile_sumsq, self.step_sumsq, self._scratch]
        small += [] if self.arrived_sumsq is None else [self.arrived_sumsq]
        sizes["tables"] = sum(buffer.nbytes for buffer in small) + self.table.nbytes
        return sizes

    def _buffer_bytes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, buffer in self.buffers().items():
            category = "moment_scales" if name.endswith("_scale") else name
            sizes[category] = sizes.get(category, 0) + buffer.nbytes
        return sizes

    def stretch(self, buffer: Tensor, start: int, numel: int) -> Tensor:
        """The part of ``buffer`` that belongs to ``numel`` arena elements from ``start`` on (both in whole groups)."""
        ratio = self.capacity // buffer.numel()  # GROUP for scales, otherwise 1
        return buffer[start // ratio : (start + numel) // ratio]

    def gradient_view(self, index: int) -> Tensor:
        """Slot ``index`` of the gradient buffer in the parameter's shape, to be used as ``p.grad``.

        It goes through ``.data`` so that each view has a version counter of its own: an edit of one parameter's
        gradient by the caller (clipping) can then be told from the arrival of another's.
        """
        assert self.grad is not None
        slot = self.slots[index]
        return self.grad.data[slot.start : slot.start + slot.numel].view(self._shapes[index])

    def bind(
        self,
        parameters: Mapping[str, Tensor],
        groups: Mapping[str, int],
        steps: Mapping[str, int],
        *,
        starts: Sequence[int] | None = None,
        settle: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """Make ``parameters`` the occupants of the arena. Allocates nothing on the device.

        Occupants that stay move to the front with their residual bits, and weights where they lie here; newcomers
        follow with everything zero.

        Args:
            parameters: name -> parameter, in the order wanted for newcomers.
            groups: name -> row of the hyperparameter table.
            steps: name -> Adam steps so far, of the occupants that keep their moments; all others start at zero.
            starts: fixed places (a checkpoint's); the caller then fills in the contents.
            settle: called with each occupant's name and the stretch (numel,) for its weights, if these lie here; it
                fills in a newcomer's and lets the parameter lie there.
        """
        if starts is None:
            order = [name for name in self.names if name in parameters]
            places = [self.slots[self.names.index(name)].start for name in order]
            order += [name for name in parameters if name not in set(order)]
        else:
            order, places = list(parameters), []
        slots: list[Slot] = []
        position = 0
        for index, name in enumerate(order):
            start = starts[index] if starts is not None else position
            numel = self.part(parameters[name]).numel()
            position = start + padded(numel)
            assert position <= self.capacity, f"arena of {self.capacity} elements asked to hold {position}"
            if index < len(places):
                self._move(places[index], start, padded(numel))
            if settle is not None and (place := self._weights_at(start, numel)) is not None:
                settle(name, place)
            weight = self.part(parameters[name])  # after it was settled: it may lie elsewhere now
            slot = Slot(weight=weight, start=start, numel=numel, group=groups[name])
            if name not in steps:
                self._clear(slot, residual=index >= len(places))
            slots.append(slot)
        self.slots, self.names = slots, order
        self._shapes = [local(parameters[name]).shape for name in order]
        if self.grad is not None:
            for slot in slots:  # a former occupant's gradient must not lie in a tail
                self.grad[slot.start + slot.numel : slot.start + padded(slot.numel)].zero_()
        self.table.bind(slots, [steps.get(name, 0) for name in order])
        for scores in (self.table.slot_measured, self.tile_sumsq, self.step_sumsq):
            scores.zero_()

    def _clear(self, slot: Slot, *, residual: bool) -> None:
        for buffer in self.moments().values():
            self.stretch(buffer, slot.start, padded(slot.numel)).zero_()
        if self.residual is not None and residual:
            self.stretch(self.residual, slot.start, padded(slot.numel)).zero_()

    def _weights_at(self, start: int, numel: int) -> Tensor | None:
        """Where the weights of ``numel`` elements from ``start`` on lie; None where they lie in the model."""
        first = start - self._weights_from
        return None if self.weights is None or first < 0 else self.weights[first : first + numel]

    def _move(self, source: int, start: int, length: int) -> None:
        """Shift a staying slot's state, padding included, towards the front; old and new place may overlap."""
        if source == start:
            return
        buffers = (*self.moments().values(), *([] if self.residual is None else [self.residual]))
        moves = [(self.stretch(buffer, source, length), self.stretch(buffer, start, length)) for buffer in buffers]
        old_weights, new_weights = self._weights_at(source, length), self._weights_at(start, length)
        if old_weights is not None and new_weights is not None:
            moves.append((old_weights, new_weights))
        for old, new in moves:
            old, new = old.view(torch.uint8), new.view(torch.uint8)
            if start + length <= source:
                new.copy_(old)
                continue
            step = self._scratch.numel()
            for done in range(0, old.numel(), step):
                part = self._scratch[: min(step, old.numel() - done)]
                new[done : done + part.numel()].copy_(part.copy_(old[done : done + part.numel()]))

"""Arena: the fixed set of buffers through which the weight matrices move.

Everything is allocated once, at construction. A *slot* is the stretch of the flat buffers that one active parameter
occupies: its gradient, both moments and, for a bfloat16 model, the lower 16 bits of its master weight. The weights
themselves stay in the model; a table of addresses leads the kernel to them.

    grad        |  q_proj.3  |k.7|      up_proj.1      | free |     weight dtype
    exp_avg     |  q_proj.3  |k.7|      up_proj.1      | free |     float32
    exp_avg_sq  |  q_proj.3  |k.7|      up_proj.1      | free |     float32
    residual    |  q_proj.3  |k.7|      up_proj.1      | free |     int16, bfloat16 models only
                 slots start at multiples of BLOCK; their tails are zero

This file knows torch and the kernels' tables, nothing of models, rounds or probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from misa_engine.kernels.tiles import BLOCK, Slot, TileTable


def padded(numel: int) -> int:
    """Elements that a parameter of ``numel`` elements occupies: the next multiple of BLOCK."""
    return -(-numel // BLOCK) * BLOCK


def upload(values: Sequence[int] | Sequence[Sequence[float]], buffer: Tensor) -> None:
    """Write host numbers into the front of a device buffer without waiting for the device (pinned, asynchronous)."""
    staged = torch.tensor(values, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
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


@dataclass(frozen=True)
class SlotState:
    """Moments of one parameter on the host, for presets that keep them for ever (``revisit="keep"``)."""

    exp_avg: Tensor  # (numel,) float32
    exp_avg_sq: Tensor  # (numel,) float32
    step: int

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes


class Arena:
    """Flat buffers and the bookkeeping of who occupies which stretch.

    Args:
        capacity: elements of each buffer, a multiple of BLOCK.
        max_slots: most parameters that can be bound at once.
        dtype: weight and gradient dtype, float32 or bfloat16.
        device: where the model lives.
        split: keep the lower 16 bits of the master weights (bfloat16 only).
    """

    def __init__(self, capacity: int, max_slots: int, *, dtype: torch.dtype, device: torch.device, split: bool):
        tiles = capacity // BLOCK
        self.capacity = capacity
        self.grad = torch.zeros(capacity, dtype=dtype, device=device)
        self.exp_avg = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.exp_avg_sq = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.residual = torch.zeros(capacity, dtype=torch.int16, device=device) if split else None
        self.table = TileTable.allocate(tiles, max_slots, device)
        self.tile_sumsq = torch.zeros(tiles, dtype=torch.float32, device=device)  # Σ over the steps of a round
        self.step_sumsq = torch.zeros(tiles, dtype=torch.float32, device=device)  # of the present step's gradients
        self.slots: list[Slot] = []
        self.names: list[str] = []
        self._shapes: list[torch.Size] = []

    @property
    def used(self) -> int:
        """Elements from the start of the buffers to the end of the last slot."""
        return self.slots[-1].start + padded(self.slots[-1].numel) if self.slots else 0

    def buffers(self) -> dict[str, Tensor]:
        """The large buffers by category, for memory accounts and for tests that watch their addresses."""
        named = {
            "gradients": self.grad,
            "first_moment": self.exp_avg,
            "second_moment": self.exp_avg_sq,
            "residual_bits": self.residual,
        }
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def bytes(self) -> dict[str, int]:
        """Bytes by category, tables and norms included."""
        sizes = {name: buffer.numel() * buffer.element_size() for name, buffer in self.buffers().items()}
        small = [self.tile_sumsq, self.step_sumsq]
        small += [value for value in vars(self.table).values() if isinstance(value, Tensor)]
        sizes["tables"] = sum(buffer.numel() * buffer.element_size() for buffer in small)
        return sizes

    def gradient_view(self, index: int) -> Tensor:
        """Slot ``index`` of the gradient buffer in the parameter's shape, to be used as ``p.grad``.

        It goes through ``.data`` so that each view has a version counter of its own: an edit of one parameter's
        gradient by the caller (clipping) can then be told from the arrival of another's.
        """
        slot = self.slots[index]
        return self.grad.data[slot.start : slot.start + slot.numel].view(self._shapes[index])

    def bind(
        self,
        parameters: Mapping[str, Tensor],
        groups: Mapping[str, int],
        steps: Mapping[str, int],
        *,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Make ``parameters`` the occupants of the arena. Allocates nothing on the device.

        Occupants that stay move to the front with their residual bits; newcomers follow with everything zero.

        Args:
            parameters: name -> parameter, in the order wanted for newcomers.
            groups: name -> row of the hyperparameter table.
            steps: name -> Adam steps so far, of the occupants that keep their moments; all others start at zero.
            starts: fixed places (a checkpoint's); the caller then fills in the contents.
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
            weight = parameters[name].detach().view(-1)
            position = starts[index] if starts is not None else position
            slot = Slot(weight=weight, start=position, numel=weight.numel(), group=groups[name])
            position += padded(slot.numel)
            assert position <= self.capacity, f"arena of {self.capacity} elements asked to hold {position}"
            if index < len(places):
                self._move(places[index], slot)
            if name not in steps:
                self._clear(slot, residual=index >= len(places))
            slots.append(slot)
        self.slots, self.names = slots, order
        self._shapes = [parameters[name].shape for name in order]
        for slot in slots:  # a former occupant's gradient must not lie in a tail
            self.grad[slot.start + slot.numel : slot.start + padded(slot.numel)].zero_()
        self.table.bind(slots)
        upload([steps.get(name, 0) for name in order], self.table.slot_step)
        for scores in (self.table.slot_measured, self.tile_sumsq, self.step_sumsq):
            scores.zero_()

    def slot_state(self, index: int, step: int) -> SlotState:
        """Copy a slot's moments to the host."""
        slot = self.slots[index]
        stretch = slice(slot.start, slot.start + slot.numel)
        return SlotState(self.exp_avg[stretch].cpu().clone(), self.exp_avg_sq[stretch].cpu().clone(), step)

    def restore_slot(self, index: int, state: SlotState) -> None:
        """Copy moments that were kept on the host back into a slot."""
        slot = self.slots[index]
        stretch = slice(slot.start, slot.start + slot.numel)
        self.exp_avg[stretch].copy_(state.exp_avg)
        self.exp_avg_sq[stretch].copy_(state.exp_avg_sq)
        self.table.slot_step[index] = state.step

    def _clear(self, slot: Slot, *, residual: bool) -> None:
        stretch = slice(slot.start, slot.start + padded(slot.numel))
        self.exp_avg[stretch].zero_()
        self.exp_avg_sq[stretch].zero_()
        if self.residual is not None and residual:
            self.residual[stretch].zero_()

    def _move(self, source: int, slot: Slot) -> None:
        """Shift a staying slot's state towards the front, through the gradient buffer, which is idle at a switch."""
        if source == slot.start:
            return
        length = padded(slot.numel)
        for buffer in (self.exp_avg, self.exp_avg_sq, self.residual):
            if buffer is None:
                continue
            scratch = self.grad.view(torch.uint8)[: self.grad.nbytes // buffer.element_size() * buffer.element_size()]
            scratch = scratch.view(buffer.dtype)
            for done in range(0, length, scratch.numel()):
                part = min(scratch.numel(), length - done)
                scratch[:part].copy_(buffer[source + done : source + done + part])
                buffer[slot.start + done : slot.start + done + part].copy_(scratch[:part])

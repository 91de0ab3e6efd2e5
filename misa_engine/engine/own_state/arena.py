"""OwnArena: moments and residual bits of one process's parts, beside the whole gradients of the same matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from misa_engine.engine.arena import Arena, capacity_for, capacity_of_rows, packed_starts
from misa_engine.engine.own_state.share import Share, most_of


class OwnArena(Arena):
    """The state of a process's parts. Slots are the same ones, in the same order, as those of ``whole``.

    Args:
        whole: gradients, norms and accounts, of whole matrices; without state.
        share: which parts; None allocates nothing that binds (on the meta device).
        capacity: elements of each buffer of state.
        max_slots: most parameters that can be bound at once.
        **options: of Arena, those of the state.

    Attributes:
        whole: where gradients lie.
        share: which parts.
    """

    def __init__(self, whole: Arena, share: Share | None, capacity: int, max_slots: int, **options: Any):
        super().__init__(capacity, max_slots, hold_gradients=False, **options)
        self.whole, self.share = whole, share
        for name in ("slot_present", "slot_step", "slot_measured", "slot_coef"):  # decided once, for whole matrices
            setattr(self.table, name, getattr(whole.table, name))
        self.tile_sumsq, self.step_sumsq = whole.tile_sumsq, whole.step_sumsq

    def bytes(self) -> dict[str, int]:
        """Bytes by category, of both, tables and norms included."""
        sizes = self.whole.bytes()
        sizes["tables"] += self.table.bound.nbytes + self.table.norm_parts.nbytes + self._scratch.nbytes
        return {**sizes, **self._buffer_bytes()}

    def part(self, parameter: Tensor) -> Tensor:
        """What of a parameter this process updates, a flat view."""
        assert self.share is not None
        return self.share.of(parameter)

    def first(self, parameter: Tensor) -> int:
        """Index, in the flat whole parameter, of the first element of ``part``."""
        assert self.share is not None
        return self.share.first_of(parameter.numel())

    def replicated(self) -> dict[str, Tensor]:
        """State that has to be the same in all replicas: none."""
        return {}

    def bind(
        self,
        parameters: Mapping[str, Tensor],
        groups: Mapping[str, int],
        steps: Mapping[str, int],
        *,
        starts: Sequence[int] | None = None,
        settle: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """As ``Arena.bind``; ``starts`` are those of parts, and whole matrices then lie packed in the same order."""
        packed = None if starts is None else packed_starts(parameter.numel() for parameter in parameters.values())
        self.whole.bind(parameters, groups, steps, starts=packed)
        super().bind(parameters, groups, steps, starts=starts, settle=settle)

    def spread(self, indices: Iterable[int]) -> None:
        """Give everybody this process's parts of the weights in these slots, and take theirs."""
        assert self.share is not None
        self.share.finish([self.share.send(self.whole.slots[index].weight) for index in indices])


def own_arena(
    budget: int,
    sampled: Sequence[int],
    always: Sequence[int],
    size: int,
    share: Share | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    grad_dtype: torch.dtype | None,
    hold_gradients: bool,
    **state: Any,
) -> OwnArena:
    """The arena of one of ``size`` processes, for every draw that the budget allows.

    Args:
        budget: floor(δ·N), the most elements that sampled parameters may hold together.
        sampled: sizes of all parameters that can be drawn.
        always: sizes of the parameters that are always trained, outside the budget.
        size: processes.
        share: which parts this one has; None to count bytes on the meta device.
        dtype: of the weights.
        device: where the model lives.
        grad_dtype: of the gradient slots; None is ``dtype``.
        hold_gradients: False where each update runs inside the backward pass.
        **state: ``split`` and ``state_dtype`` of Arena.
    """
    capacity, slots = capacity_for(budget, sampled, always)
    where: dict[str, Any] = {"dtype": dtype, "device": device}
    gradients: dict[str, Any] = {"grad_dtype": grad_dtype, "hold_gradients": hold_gradients}
    whole = Arena(capacity, slots, **where, **gradients, split=False, hold_state=False)
    parts = [[(numel, most_of(numel, size)) for numel in group] for group in (sampled, always)]
    capacity, _ = capacity_of_rows(budget, *parts)
    return OwnArena(whole, share, capacity, slots, **where, **state)

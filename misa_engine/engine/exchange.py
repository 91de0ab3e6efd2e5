"""Exchange: in which order the processes average their gradients, and when, so that nobody waits for ever.

All processes have to begin the same averages in the same order, whatever arrives where and when. So slots have a fixed
order, about that of a backward pass, and a slot is begun when its gradient is there and all before it have been begun.
What a process has no gradient for (skipped layers, experts without tokens) it begins at the end of its backward pass,
with zeros, if anybody has one.

    backward pass   slots in order, each as early as it can be; at the end the others
                    (with a limit of averages under way: announced at the first, and all slots take part, since those
                    that wait in the midst of a pass could not say what they have)
    step            all meet; whoever is there first takes part, with zeros or with what it has, in the backward passes
                    that others still make (uneven last batches), until all are there

An average may be repeated: the mean over the ranks of (what is already the same everywhere + a new gradient of each) is
the mean of all. So every backward pass of an accumulated step can end with averages, which makes ``p.grad`` the same
everywhere for clipping, scaling and logging, as in DistributedDataParallel; ``optimizer.last_micro_batch = False``
saves those before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from misa_engine.engine.replicas import Average, ReplicaError, Replicas


class Gradients(Protocol):
    """What an exchange asks of whoever takes the gradients; slots go by their index."""

    def here(self) -> list[bool]:
        """Which slots have a gradient of this step on this process, used or not."""

    def to_average(self, index: int) -> Tensor:
        """The gradient of a slot, flat and contiguous; zeros where there is none."""

    def averaged(self, index: int, gradient: Tensor) -> None:
        """``gradient``, which ``to_average`` gave, is now the mean."""


class Exchange:
    """Averages the gradients of one round's slots over all processes.

    Args:
        replicas: the processes.
        gradients: where gradients are, and what to do with averages.
        most_slots: the most that are ever bound.
        in_flight: averages under way at a time; 0 is no limit.
        clock: gives the number of steps made, which has to be the same everywhere.
    """

    def __init__(
        self,
        replicas: Replicas,
        gradients: Gradients,
        *,
        most_slots: int,
        in_flight: int,
        clock: Callable[[], int],
    ):
        self._replicas, self._gradients, self._clock = replicas, gradients, clock
        self._most_slots, self._most_in_flight = most_slots, in_flight
        self._order: list[int] = []
        self._ready: set[int] = set()
        self._begun = 0  # slots of the order whose average has been begun in this backward pass
        self._in_flight: list[tuple[int, Tensor, Average]] = []
        self._pending = False  # there are gradients that nobody else has seen
        self._expects_end = False

    def bind(self, order: Sequence[int]) -> None:
        """Begin a round. Args: all slots, about in the order in which their gradients arrive."""
        self._order = list(order)
        self.forget()

    def forget(self) -> None:
        """Begin a step: what was there has been used, or is not wanted."""
        self._ready.clear()
        self._begun, self._pending, self._expects_end = 0, False, False

    def added(self) -> None:
        """A gradient has come that is not averaged."""
        self._pending = True

    def expect_end(self) -> None:
        """From within a backward pass that is the last of its step: average what is left when it ends."""
        if not self._expects_end:
            self._expects_end = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
            if self._most_in_flight:
                self._tell(at_step=False)

    def ready(self, index: int) -> None:
        """The gradient of a slot is complete as far as this backward pass goes."""
        if any(index == busy for busy, *_ in self._in_flight):
            raise RuntimeError(
                "a matrix received a second gradient in one backward pass, while the first was being averaged. Set "
                "gemm_gradients=False, or optimizer.last_micro_batch = False before this pass and True after it."
            )
        self._ready.add(index)
        while self._begun < len(self._order) and self._order[self._begun] in self._ready:
            self._begin(self._order[self._begun])
            self._begun += 1
            while 0 < self._most_in_flight < len(self._in_flight):
                self._finish_one()

    def meet(self) -> list[bool]:
        """At a step: wait until all processes are there and all gradients are averages.

        Returns:
            Which slots have a gradient on any process.

        Raises:
            ReplicaError: a process is gone, or at another step.
        """
        while True:
            rows = self._tell(at_step=True)
            if all(at_step and not pending for at_step, pending, *_ in rows):
                self._replicas.loaded = any(row[3] for row in rows)  # on any of them: then all compare
                return [any(column) for column in zip(*(row[4:] for row in rows), strict=True)][: len(self._order)]
            self._complete(rows)

    def _end_of_pass(self) -> None:
        with torch.no_grad():
            self._complete([] if self._most_in_flight else self._tell(at_step=False))

    def _tell(self, *, at_step: bool) -> list[list[int]]:
        here = self._gradients.here()
        flags = [*here, *[False] * (self._most_slots - len(here))]
        rows = self._replicas.tell([at_step, self._pending, self._clock(), self._replicas.loaded, *flags])
        steps = [row[2] for row in rows]
        if len(set(steps)) > 1:
            raise ReplicaError(
                f"the processes are at different steps: {', '.join(f'rank {r} at {s}' for r, s in enumerate(steps))}. "
                "All of them have to make the same number of steps: give every rank as many batches."
            )
        return rows

    def _complete(self, rows: Sequence[Sequence[int]]) -> None:
        """Begin what has not been begun and somebody may have a gradient for; wait for all."""
        for index in self._order[self._begun :]:
            if self._most_in_flight or any(row[4 + index] for row in rows):
                self._begin(index)
        if self._most_in_flight:
            rows = self._tell(at_step=False)
        somewhere = [any(row[4 + index] for row in rows) for index in range(len(self._order))]
        while self._in_flight:
            self._finish_one(wanted=somewhere[self._in_flight[0][0]])
        self.forget()

    def _begin(self, index: int) -> None:
        gradient = self._gradients.to_average(index)
        self._in_flight.append((index, gradient, self._replicas.average(gradient)))

    def _finish_one(self, *, wanted: bool = True) -> None:
        index, gradient, average = self._in_flight.pop(0)
        average.wait()
        if wanted:
            self._gradients.averaged(index, gradient)

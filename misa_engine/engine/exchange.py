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

Where the rest rule moves, the first backward pass of the step that exchanges carries the gradients of what rests too,
in the same order and one at a time: they are N numbers, and live in nobody's arena. One that comes before its turn
waits, which in a pass in the reverse order of the model happens inside a layer only. MOST_WAITING of them mean that
what they wait for was skipped; it then takes part with zeros.

An average may be repeated: the mean over the ranks of (what is already the same everywhere + a new gradient of each) is
the mean of all. So every backward pass of an accumulated step can end with averages, which makes ``p.grad`` the same
everywhere for clipping, scaling and logging, as in DistributedDataParallel; ``optimizer.last_micro_batch = False``
saves those before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from misa_engine.engine.replicas import Average, ReplicaError, Replicas

#: Gradients of resting matrices that wait for those before them; then these count as skipped.
MOST_WAITING = 8
#: Averages of resting matrices under way at a time.
RESTING_IN_FLIGHT = 1

#: A slot by its index, or a resting matrix by its name.
Item = int | str


class Gradients(Protocol):
    """What an exchange asks of whoever takes the gradients; slots go by their index."""

    def here(self) -> list[bool]:
        """Which slots have a gradient of this step on this process, used or not."""

    def to_average(self, index: int) -> Tensor:
        """The gradient of a slot, flat and contiguous; zeros where there is none."""

    def averaged(self, index: int, gradient: Tensor) -> None:
        """``gradient``, which ``to_average`` gave, is now the mean."""


class Resting(Protocol):
    """What an exchange asks of the rest rule; matrices go by name."""

    def to_average(self, name: str) -> Tensor:
        """The gradient that has arrived, flat and contiguous, or zeros; it is the exchange's from then on."""

    def averaged(self, name: str, gradient: Tensor) -> None:
        """``gradient``, which ``to_average`` gave, is now the mean: move by it."""

    def exchanged(self) -> None:
        """All have moved, for this step."""


class Exchange:
    """Averages the gradients of one round's slots, and of what rests beside them, over all processes.

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
        self._slots: dict[int, int] = {}  # slot -> place in the model
        self._resting: Mapping[str, int] = {}  # what rests and has yet to move in this step -> place
        self._rest: Resting | None = None
        self._waits = MOST_WAITING
        self._order: list[Item] = []
        self._ready: set[Item] = set()
        self._started: set[Item] = set()
        self._waiting = 0  # resting matrices that are ready and not begun
        self._begun = 0  # items of the order that have had their turn in this backward pass
        self._in_flight: list[tuple[Item, Tensor, Average]] = []
        self._undecided: list[tuple[int, Tensor]] = []  # averages of slots that have no gradient here
        self._pending = False  # there are gradients that nobody else has seen
        self._expects_end = False

    def bind(self, places: Mapping[int, int]) -> None:
        """Begin a round. Args: places: slot -> place in the model; gradients arrive about in the reverse order."""
        self._slots, self._resting = dict(places), {}
        self.forget()

    def open(self, rest: Resting, places: Mapping[str, int], *, bounded: bool = True) -> None:
        """Begin a step in which these matrices move, by their place in the model; none in a step without.

        Args:
            rest: moves them.
            places: name -> place; the same everywhere.
            bounded: count what does not come as skipped; not where all gradients come at once, in any order.
        """
        self._rest, self._resting = rest, places
        self._waits = MOST_WAITING if bounded else len(places)
        self.forget()

    def forget(self) -> None:
        """Begin a step, or a backward pass: what was there has been used, or is not wanted."""
        places: dict[Item, int] = dict(self._slots.items())
        places.update(self._resting.items())
        self._order = sorted(places, key=places.__getitem__, reverse=True)
        self._ready.clear()
        self._started.clear()
        self._begun, self._waiting, self._pending, self._expects_end = 0, 0, False, False

    @property
    def _announced(self) -> bool:
        """Whether all have to know of a backward pass when it begins, since it waits for averages."""
        return bool(self._most_in_flight or self._resting)

    def added(self) -> None:
        """A gradient has come that is not averaged."""
        self._pending = True

    def expect_end(self) -> None:
        """From within a backward pass that is the last of its step: average what is left when it ends."""
        if not self._expects_end:
            self._expects_end = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
            if self._announced:
                self._tell(at_step=False)

    def ready(self, item: Item) -> None:
        """The gradient of a slot or resting matrix is complete as far as this backward pass goes."""
        if item in self._started:
            raise RuntimeError(self._second_or_late(item))
        self._ready.add(item)
        self._waiting += isinstance(item, str)
        while self._begun < len(self._order) and (
            self._order[self._begun] in self._ready or self._waiting > self._waits
        ):
            self._begin_next()

    def _second_or_late(self, item: Item) -> str:
        if item in self._ready:
            return (
                "a matrix received a second gradient in one backward pass, while the first was being averaged. Set "
                "gemm_gradients=False, or optimizer.last_micro_batch = False before this pass and True after it."
            )
        return (
            f"the gradient of {item if isinstance(item, str) else 'an active matrix'} came after those of "
            f"{self._waits} matrices below it in the model, when the processes had gone on without it. A model "
            "that does not run in the order of its parameters needs rest='none' with several processes."
        )

    def meet(self) -> list[bool]:
        """At a step: wait until all processes are there and all gradients are averages.

        Returns:
            Which slots have a gradient on any process.

        Raises:
            ReplicaError: a process is gone, or at another step.
        """
        while True:
            rows = self._tell(at_step=True)
            everybody = all(row[0] for row in rows)
            if everybody and not any(row[1] for row in rows):
                self._replicas.loaded = any(row[3] for row in rows)  # on any of them: then all compare
                return [any(column) for column in zip(*(row[4:] for row in rows), strict=True)][: len(self._slots)]
            self._complete(rows, passes=not everybody)

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Ask all processes, which call this together: which of the flags anybody has."""
        return [any(column) for column in zip(*self._replicas.tell(flags), strict=True)]

    def _end_of_pass(self) -> None:
        with torch.no_grad():
            self._complete([] if self._announced else self._tell(at_step=False))

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

    def _complete(self, rows: Sequence[Sequence[int]], *, passes: bool = True) -> None:
        """Begin what has not been begun and somebody may have a gradient for; wait for all.

        Args:
            rows: what all have told; not looked at where the pass was announced.
            passes: a backward pass is under way somewhere, in which what rests moves.
        """
        resting = bool(self._resting) and passes
        announced = resting or bool(self._most_in_flight)
        if not resting:
            self._order = [item for item in self._order if isinstance(item, int)]
        while self._begun < len(self._order):
            item = self._order[self._begun]
            if announced or any(row[4 + item] for row in rows if isinstance(item, int)):
                self._begin_next()
            else:
                self._begun += 1
        if announced:
            rows = self._tell(at_step=False)
        while self._in_flight:
            self._finish_one()
        for index, gradient in self._undecided:
            if any(row[4 + index] for row in rows):
                self._gradients.averaged(index, gradient)
        self._undecided.clear()
        if resting and self._rest is not None:
            self._resting = {}
            self._rest.exchanged()
        self.forget()

    def _begin_next(self) -> None:
        item = self._order[self._begun]
        self._begun += 1
        self._started.add(item)
        if isinstance(item, str):
            assert self._rest is not None
            self._waiting -= item in self._ready
            gradient = self._rest.to_average(item)
        else:
            gradient = self._gradients.to_average(item)
        self._in_flight.append((item, gradient, self._replicas.average(gradient)))
        del gradient  # that of what rests is to be freed when it has been used
        while self._too_many():
            self._finish_one()

    def _too_many(self) -> bool:
        resting = sum(isinstance(item, str) for item, *_ in self._in_flight)
        slots = len(self._in_flight) - resting
        return resting > RESTING_IN_FLIGHT or 0 < self._most_in_flight < slots

    def _finish_one(self) -> None:
        item, gradient, average = self._in_flight.pop(0)
        average.wait()
        if isinstance(item, str):
            assert self._rest is not None
            self._rest.averaged(item, gradient)
        elif item in self._ready:
            self._gradients.averaged(item, gradient)
        else:
            self._undecided.append((item, gradient))

"""What happens when a gradient arrives: into its arena slot (``GradientSlots``), or used at once (``UpdateOnArrival``).

A hook on each parameter sees its gradient when autograd has merged all its uses. Hooks are registered while every
parameter still requires gradients: a frozen one takes none, and hooks survive ``requires_grad`` being toggled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.arena import Arena, upload
from misa_engine.engine.gemm_gradients import GemmGradients
from misa_engine.engine.marks import phase
from misa_engine.engine.places import Places
from misa_engine.engine.update import ArenaUpdate

NOT_ARRIVED = -1

#: torch's parameter groups at the time of the call; an optimizer may exchange the list.
Groups = Callable[[], Sequence[Mapping[str, Any]]]


class GradientIntake(ABC):
    """Takes the gradients of all active parameters, and makes the step that uses them.

    Args:
        model: the model, for the modules whose forward passes can help.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where the parameters' state lies.
        kernels: what the step runs.
        groups: gives torch's parameter groups.
    """

    #: Whether gradients outlive the backward pass, so that ``step`` can still measure them.
    _holds_gradients: bool

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arena: Arena,
        kernels: ArenaUpdate,
        groups: Groups,
    ):
        self._parameters, self._arena, self._kernels, self._groups = parameters, arena, kernels, groups
        self._measure_on_arrival = self._last_micro_batch = True
        self.places = Places(model, parameters)
        self.slot_of: dict[str, int] = {}
        self._present: list[bool] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name)) for name, parameter in parameters.items()
        ]

    @property
    def measure_on_arrival(self) -> bool:
        """Whether each gradient is measured as it arrives; setting it does nothing where there is no choice."""
        return self._measure_on_arrival

    @measure_on_arrival.setter
    def measure_on_arrival(self, value: bool) -> None:
        self._measure_on_arrival = value or not self._holds_gradients

    @property
    def last_micro_batch(self) -> bool:
        """Whether the next backward pass is the last of its step; setting it does nothing where it does not matter."""
        return self._last_micro_batch

    @last_micro_batch.setter
    def last_micro_batch(self, value: bool) -> None:
        self._last_micro_batch = value or self._holds_gradients

    def bind(self) -> None:
        """Follow the arena after it has bound other parameters; no gradient has arrived then."""
        self.slot_of = {name: index for index, name in enumerate(self._arena.names)}
        self._present = []
        self.forget()

    @abstractmethod
    def forget(self) -> None:
        """Begin a new step: what has arrived was used, or is not wanted."""

    @abstractmethod
    def clip(self, max_norm: float) -> None:
        """Measure all gradients, and clip their global norm in the next ``step`` without touching them.

        Raises:
            ValueError: a finite bound, where the updates have been made by then.
        """

    @abstractmethod
    def step(self) -> None:
        """Update the active parameters with what has arrived, as far as that has not been done, and begin a new step.

        Raises:
            ValueError: a parameter was moved, replaced or reshaped since construction; nothing has been written then.
        """

    @abstractmethod
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        """A gradient has arrived in ``parameter.grad``."""

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    def _tell_present(self, present: list[bool]) -> None:
        if present != self._present:
            upload(present, self._arena.table.slot_present)
            self._present = present

    def _hook(self, name: str) -> Callable[[nn.Parameter], None]:
        def on_gradient(parameter: nn.Parameter) -> None:
            index = self.slot_of.get(name)
            if index is None:
                parameter.grad = None
                raise RuntimeError(
                    f"{name} received a gradient while it is inactive: something set requires_grad on it. MISA decides "
                    "which parameters train; leave requires_grad alone after building the optimizer."
                )
            if parameter.grad is not None:  # torch 2.13 calls the hook for a gradient of None too
                with phase("hooks"):
                    self._arrived(name, index, parameter)

        return on_gradient


class GradientSlots(GradientIntake):
    """Brings every active gradient into its arena slot, and knows what happened to it since.

    ``p.grad`` is a view of the slot, so that clipping, logging, ``zero_grad`` and accumulation go on working: while
    ``p.grad`` is the view, further gradients are added to it in place; after ``zero_grad(set_to_none=True)`` the next
    one is written anew. Two ways lead into a slot: the GEMM that computes the gradient of an active linear layer writes
    it there itself (``gemm_gradients.py``), and the hook copies any other gradient.

    Args:
        model: the model, to find each parameter's owner.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where gradients go.
        kernels: what the step runs.
        groups: gives torch's parameter groups.
        max_norm: clip the global norm to this in every step; None does not clip.
        gemm: let the GEMMs of linear layers write into the slots.
    """

    _holds_gradients = True

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arena: Arena,
        kernels: ArenaUpdate,
        groups: Groups,
        *,
        max_norm: float | None,
        gemm: bool,
    ):
        super().__init__(model, parameters, arena, kernels, groups)
        self.measure_on_arrival = max_norm is None
        self._max_norm = max_norm
        self._clip_next: float | None = None
        self._views: list[Tensor] = []  # p.grad of each slot
        self._versions: list[int] = []  # version counter of each view when its gradient last arrived
        self._measured_contents: list[int] = []  # version counters when clip() measured the slots
        self._gemm = GemmGradients(model, self._slot_for_gemm, self._written_by_gemm) if gemm else None

    def bind(self) -> None:
        """Follow the arena after it has bound other parameters; no gradient has arrived then."""
        self._views = [self._arena.gradient_view(index) for index in range(len(self._arena.names))]
        super().bind()
        for name, view in zip(self._arena.names, self._views, strict=True):
            if view.dtype != self._parameters[name].dtype:
                self._parameters[name].grad_dtype = None  # any: autograd then adds to the view without a cast copy
        if self._gemm is not None:
            self._gemm.bind(self._arena.names)

    def forget(self) -> None:
        """Begin a new step: what lies in the slots has been used."""
        self._versions = [NOT_ARRIVED] * len(self._views)
        self._measured_contents, self._clip_next = [], None

    def clip(self, max_norm: float) -> None:
        """One norm pass; the next ``step`` clips to ``max_norm``, which may be inf."""
        self._collect()
        self._kernels.measure()
        self._measured_contents = self._contents()
        self._clip_next = max_norm

    def step(self) -> None:
        """Norms, unless they are known, and the update of all slots."""
        stale = self._collect()
        self._kernels.set_hyperparameters(
            self._groups(), self._max_norm if self._clip_next is None else self._clip_next
        )
        norms_on_arrival: Tensor | None = None
        if stale and self._measured:  # clipped by the caller: the scores stay those of the raw gradients
            norms_on_arrival = self._arena.step_sumsq.clone()  # one float a tile
        if stale and self._measured_contents != self._contents():
            self._kernels.measure()
        self._kernels.step(norms_on_arrival)
        self.forget()

    def remove(self) -> None:
        """Take all hooks off and give the linear layers their own forward back."""
        super().remove()
        if self._gemm is not None:
            self._gemm.bind(())

    def _collect(self) -> bool:
        """Make sure that every gradient lies in its slot, and tell the device which slots have one.

        Returns:
            Whether ``arena.step_sumsq`` no longer describes the gradients: one was edited by the caller after it
            arrived, was put there by the caller, or norms are not taken on arrival.
        """
        stale, present = not self.measure_on_arrival, []
        for name, view, version in zip(self._arena.names, self._views, self._versions, strict=True):
            self.places.check(name)
            gradient = self._parameters[name].grad
            present.append(gradient is not None)
            if gradient is None:
                continue
            if gradient is not view:
                view.copy_(gradient)
                self._parameters[name].grad = view
            stale |= view._version != version
        self._tell_present(present)
        return stale

    @property
    def _measured(self) -> bool:
        """Whether ``arena.step_sumsq`` holds the norm on arrival of every gradient that is present."""
        arrived = (version != NOT_ARRIVED for version, here in zip(self._versions, self._present, strict=True) if here)
        return self.measure_on_arrival and all(arrived)

    def _contents(self) -> list[int]:
        """Changes whenever the content of any slot does."""
        return [view._version for view in self._views]

    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        view, gradient = self._views[index], parameter.grad
        assert gradient is not None
        if gradient is not view:
            self.places.check(name)
            view.copy_(gradient)
            parameter.grad = view  # the temporary is freed as soon as autograd lets go of it
        if self._versions[index] != view._version:  # not what the GEMM wrote and measured
            self._measure(index)

    def _slot_for_gemm(self, name: str) -> tuple[Tensor, bool]:
        """Where the gradient of ``name`` goes, and whether it is added to what is there."""
        self.places.check(name)
        view, parameter = self._views[self.slot_of[name]], self._parameters[name]
        if parameter.grad is not None and parameter.grad is not view:  # put there by the caller
            view.copy_(parameter.grad)
        return view, parameter.grad is not None

    def _written_by_gemm(self, name: str) -> None:
        index = self.slot_of[name]
        self._parameters[name].grad = self._views[index]
        self._measure(index)

    def _measure(self, index: int) -> None:
        self._versions[index] = self._views[index]._version
        if self.measure_on_arrival:
            self._kernels.measure_slot(index)


class UpdateOnArrival(GradientIntake):
    """Uses every active gradient as it arrives and frees it: no gradient outlives the backward pass."""

    _holds_gradients = False

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arena: Arena,
        kernels: ArenaUpdate,
        groups: Groups,
    ):
        super().__init__(model, parameters, arena, kernels, groups)
        self._updated: list[bool] = []

    def forget(self) -> None:
        """Begin a new step."""
        self._updated = [False] * len(self._arena.names)

    def clip(self, max_norm: float) -> None:
        """Refuse a finite bound; gradients that are still held are used now."""
        if max_norm < math.inf:
            raise ValueError(
                f"clip_grad_norm_({max_norm}): with update_in='backward' every matrix was updated before the global "
                "norm is known. Train without clipping (misa train: --max_grad_norm 0) or use update_in='step'."
            )
        self._collect()

    def step(self) -> None:
        """Use what was left behind; everything else has been done."""
        self._collect()
        self._kernels.global_norm()
        self.forget()

    def _collect(self) -> None:
        """Tell the device which slots were updated, and use gradients that the caller put there or left behind.

        A step whose every backward ran with ``last_micro_batch`` False ends here: its sums are used now.
        """
        for index, name in enumerate(self._arena.names):
            self.places.check(name)
            if self._parameters[name].grad is not None:
                self._use(name, index, self._parameters[name])
        self._present = []  # the updates have written one slot at a time
        self._tell_present(list(self._updated))

    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        if self.last_micro_batch:
            self._use(name, index, parameter)

    @torch.no_grad()
    def _use(self, name: str, index: int, parameter: nn.Parameter) -> None:
        self.places.check(name)
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._updated[index]:
            raise RuntimeError(
                f"{name} received a second gradient in one step, but update_in='backward' has already used the first. "
                "Set optimizer.last_micro_batch = False before every backward but the last, or call step() after each."
            )
        self._kernels.set_hyperparameters(self._groups(), None)
        self._kernels.step_slot(index, gradient)
        self._updated[index] = True

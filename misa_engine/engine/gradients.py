"""What happens when a gradient arrives: into its arena slot (``GradientSlots``), or used at once (``UpdateOnArrival``).

A hook on each parameter sees its gradient when autograd has merged all its uses. Hooks are registered while every
parameter still requires gradients: a frozen one takes none, and hooks survive ``requires_grad`` being toggled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Scaler:
    """What torch.amp.GradScaler says about the gradients of a step."""

    scale: Tensor | None
    """What they are still multiplied by; None when the caller has unscaled them."""


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
    def step(self, scaler: Scaler | None = None) -> None:
        """Update the active parameters with what has arrived, as far as that has not been done, and begin a new step.

        Args:
            scaler: what torch.amp.GradScaler says, if one makes the step.

        Raises:
            ValueError: a parameter was moved, replaced or reshaped since construction, or gradients were scaled in a
                way that cannot be undone; nothing has been written then.
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
                    f"{name} received a gradient while it is inactive: something set requires_grad on it, or the graph "
                    "is from before the last switch. MISA decides which parameters train; leave requires_grad alone "
                    "after building the optimizer, and call backward() before the step() that ends the round."
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
        self._measured: list[bool] = []  # slots whose gradient was measured as it arrived
        self._at_clip: Tensor | None = None  # (tiles,) what clip() measured
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
        self._measured = [False] * len(self._views)
        self._at_clip, self._clip_next = None, None

    def clip(self, max_norm: float) -> None:
        """One norm pass; the next ``step`` clips to ``max_norm``, which may be inf."""
        self._collect()
        self._kernels.measure()
        self._at_clip = self._arena.step_sumsq.clone()  # one float a tile
        self._clip_next = max_norm

    def step(self, scaler: Scaler | None = None) -> None:
        """The norm pass and the update of all slots.

        The norms are taken here whatever is known: the caller can change a gradient without a trace (``p.grad.data``),
        and what the update reads must be what was found finite. One more read of 2 bytes a weight beside 26.
        """
        self._collect()
        scale = self._unscale(scaler) if scaler is not None else None
        clip = self._max_norm if self._clip_next is None else self._clip_next
        self._kernels.set_hyperparameters(self._groups(), clip)
        self._kernels.measure()
        self._kernels.step(self._raw(scaler, scale), self._present)
        self.forget()

    def _unscale(self, scaler: Scaler) -> Tensor | None:
        """Divide by the loss scale, unless the caller did. Returns the scale that earlier measurements still contain.

        Raises:
            ValueError: the caller has unscaled and then changed gradients, so that nobody knows the raw norms.
        """
        slots = zip(self._views, self._versions, self._present, strict=True)
        present = [(view, at) for view, at, here in slots if here]
        if scaler.scale is not None:
            for view, _ in present:
                view.div_(scaler.scale)
            return scaler.scale
        # unscale_ itself does not count as an edit of the gradients it divides
        edited = any(at != NOT_ARRIVED and view._version != at for view, at in present)
        if edited and self.measure_on_arrival and self._at_clip is None:
            raise ValueError(
                "gradients were changed after GradScaler.unscale_(optimizer), and the scores need their norms from "
                "before. Clip with optimizer.clip_grad_norm_(max_norm) in place of torch.nn.utils.clip_grad_norm_."
            )
        return None

    def _raw(self, scaler: Scaler | None, scale: Tensor | None) -> Tensor | None:
        """Give sums of squares of raw gradients by tile: as they arrived, else as ``clip`` saw them, else None (now).

        Args:
            scaler: of the loss, if one is in use; gradients then arrive multiplied by the scale.
            scale: which of the scaler's factors the measurements contain, if any.
        """
        arrived = self._arena.arrived_sumsq
        if scaler is not None and scale is None:  # unscaled by the caller since they arrived
            return self._at_clip
        known = [measured for measured, here in zip(self._measured, self._present, strict=True) if here]
        if arrived is not None and known and all(known):
            raw: Tensor | None = arrived
        elif arrived is not None and any(known):
            raw = (self._arena.step_sumsq if self._at_clip is None else self._at_clip).clone()
            for slot, measured in zip(self._arena.slots, self._measured, strict=True):
                if measured:
                    raw[slot.tiles.start : slot.tiles.stop] = arrived[slot.tiles.start : slot.tiles.stop]
        else:
            raw = self._at_clip
        return raw if raw is None or scale is None else raw / scale.square()

    def remove(self) -> None:
        """Take all hooks off and give the linear layers their own forward back."""
        super().remove()
        if self._gemm is not None:
            self._gemm.bind(())

    def _collect(self) -> None:
        """Make sure that every gradient lies in its slot, and tell the device which slots have one."""
        present = []
        for name, view in zip(self._arena.names, self._views, strict=True):
            self.places.check(name)
            gradient = self._parameters[name].grad
            present.append(gradient is not None)
            if gradient is not None and gradient is not view:
                _check_dense(name, gradient)
                view.copy_(gradient)
                self._parameters[name].grad = view
        self._tell_present(present)

    @torch.no_grad()
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        view, gradient = self._views[index], parameter.grad
        assert gradient is not None
        if gradient.requires_grad:  # backward(create_graph=True): the caller wants to differentiate it; step() copies
            self._measured[index] = False
            return
        if gradient is not view:
            self.places.check(name)
            _check_dense(name, gradient)
            view.copy_(gradient)
            parameter.grad = view  # the temporary is freed as soon as autograd lets go of it
        if self._versions[index] != view._version:  # not what the GEMM wrote and measured
            self._measure(index)

    def _slot_for_gemm(self, name: str) -> tuple[Tensor, bool] | None:
        """Where the gradient of ``name`` goes, and whether it is added to what is there; None leaves it to autograd."""
        index, parameter = self.slot_of.get(name), self._parameters[name]
        others = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ()) > 1
        if index is None or parameter._backward_hooks or others:
            return None
        self.places.check(name)
        view, gradient = self._views[index], parameter.grad
        if gradient is not None and gradient is not view:
            return None
        return view, gradient is not None

    def _written_by_gemm(self, name: str) -> None:
        index = self.slot_of[name]
        self._parameters[name].grad = self._views[index]
        self._measure(index)

    def _measure(self, index: int) -> None:
        self._versions[index] = self._views[index]._version
        self._at_clip = None  # no longer of all that is there
        if self.measure_on_arrival:
            self._kernels.measure_slot(index)
        self._measured[index] = self.measure_on_arrival


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

    def step(self, scaler: Scaler | None = None) -> None:
        """Use what was left behind; everything else has been done."""
        if scaler is not None:
            raise ValueError(
                "GradScaler with update_in='backward': gradients were used as they arrived, before it could unscale "
                "them. Train in bfloat16 without a scaler, or use update_in='step'."
            )
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
        _check_dense(name, gradient)
        self._kernels.step_slot(index, gradient)
        self._updated[index] = True


def _check_dense(name: str, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{name} received a gradient of layout {gradient.layout}; MISA takes dense ones. Build its module with "
            "sparse=False, or name it in frozen=(...)."
        )

"""GradientSlots: gradients wait in the arena for the step, as ``p.grad``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from misa_engine.engine.arena import Arena
from misa_engine.engine.gemm_gradients import GemmGradients
from misa_engine.engine.gradients import GradientIntake, Groups, Scaler, check_dense
from misa_engine.engine.update import ArenaUpdate

NOT_ARRIVED = -1


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
    _in_flight = 0  # they lie in their slots

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
        self._max_norm = max_norm
        self._clip_next: float | None = None
        self._views: list[Tensor] = []  # p.grad of each slot
        self._versions: list[int] = []  # version counter of each view when its gradient last arrived
        self._measured: list[bool] = []  # slots whose gradient was measured as it arrived
        self._alone: list[bool] = []  # slots with a gradient that the other processes have not seen
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
        self._alone = [False] * len(self._views)
        self._at_clip, self._clip_next = None, None
        if self.exchange is not None:
            self.exchange.forget()

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
        """Make sure that every gradient lies in its slot, averaged, and tell the device which slots have one."""
        present = []
        for index, (name, view) in enumerate(zip(self._arena.names, self._views, strict=True)):
            self.places.check(name)
            gradient = self._held(name)
            present.append(gradient is not None)
            if gradient is not None and gradient is not view:
                check_dense(name, gradient)
                view.copy_(gradient)
                self._show(index)
                if self.exchange is not None:
                    self.exchange.added()
            elif gradient is not None and self._alone[index] and view._version != self._versions[index]:
                raise ValueError(
                    f"the gradient of {name} was changed (clipped, unscaled) before it was averaged over the "
                    "processes, because optimizer.last_micro_batch was False in every backward pass of the step. Set "
                    "it to True before the last one."
                )
        self._tell_present(present if self.exchange is None else self.exchange.meet())

    def _held(self, name: str) -> Tensor | None:
        """The gradient that a parameter has, as far as this process holds it."""
        return self._parameters[name].grad

    def _show(self, index: int) -> None:
        """Let the slot be the gradient that its parameter has."""
        self._parameters[self._arena.names[index]].grad = self._views[index]

    def here(self) -> list[bool]:
        """Which slots hold a gradient of this step; one that is to be differentiated gets there in ``step``."""
        parameters = (self._parameters[name] for name in self._arena.names)
        return [parameter.grad is view for parameter, view in zip(parameters, self._views, strict=True)]

    def to_average(self, index: int) -> Tensor:
        """The slot itself, with a version counter of its own."""
        assert self._arena.grad is not None
        slot = self._arena.slots[index]
        flat = self._arena.grad.data[slot.start : slot.start + slot.numel]
        return flat if self._parameters[self._arena.names[index]].grad is self._views[index] else flat.zero_()

    def averaged(self, index: int, gradient: Tensor) -> None:
        """Measure it: scores are those of the mean. It is ``p.grad`` of processes that had none, too."""
        self._show(index)
        self._measure(index)
        self._alone[index] = False

    @torch.no_grad()
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        view, gradient = self._views[index], self._held(name)
        assert gradient is not None
        if gradient.requires_grad:  # backward(create_graph=True): the caller wants to differentiate it; step() copies
            self._measured[index] = False
            return
        if gradient is not view:
            self.places.check(name)
            check_dense(name, gradient)
            view.copy_(gradient)
            self._show(index)  # the temporary is freed as soon as autograd lets go of it
        if self._versions[index] != view._version:  # not what the GEMM wrote and measured
            self._came(index)
        if self.exchange is not None and self.last_micro_batch:
            self.exchange.ready(index)

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
        self.on_arrival(name)
        self._show(index)
        self._came(index)

    def _came(self, index: int) -> None:
        """A gradient was written or added; with replicas it is measured when it is the mean of all."""
        if self.exchange is None:
            self._measure(index)
            return
        self._versions[index] = self._views[index]._version
        self._measured[index], self._alone[index] = False, True
        self.exchange.added()
        if self.last_micro_batch:
            self.exchange.expect_end()

    def _measure(self, index: int) -> None:
        self._versions[index] = self._views[index]._version
        self._at_clip = None  # no longer of all that is there
        if self.measure_on_arrival:
            self._kernels.measure_slot(index)
        self._measured[index] = self.measure_on_arrival

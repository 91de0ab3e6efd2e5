"""What happens when a gradient arrives: into its arena slot (``GradientSlots``), or used at once (``UpdateOnArrival``).

A hook on each parameter sees its gradient when autograd has merged all its uses. Hooks are registered while every
parameter still requires gradients: a frozen one takes none, and hooks survive ``requires_grad`` being toggled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from misa_engine.engine.arena import Arena, upload
from misa_engine.engine.gemm_gradients import GemmGradients
from misa_engine.engine.marks import phase
from misa_engine.kernels.norm import sum_of_squares

NOT_ARRIVED = -1


class GradientIntake(ABC):
    """Hooks on all trained parameters, active or not, and the check that they are still where they were.

    Args:
        model: the model, to find each parameter's owner.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where the parameters' state lies.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], arena: Arena):
        self._parameters, self._arena = parameters, arena
        self.slot_of: dict[str, int] = {}
        self._present: list[bool] = []
        self._places = {name: _place(parameter) for name, parameter in parameters.items()}
        self._owners = {
            f"{prefix}.{attribute}" if prefix else attribute: (module, attribute)
            for prefix, module in model.named_modules()
            for attribute in module._parameters
        }
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name)) for name, parameter in parameters.items()
        ]

    def bind(self) -> None:
        """Follow the arena after it has bound other parameters; no gradient has arrived then."""
        self.slot_of = {name: index for index, name in enumerate(self._arena.names)}
        self._present = []
        self.forget()

    @abstractmethod
    def forget(self) -> None:
        """Begin a new step: what has arrived was used."""

    @abstractmethod
    def collect(self) -> bool:
        """Before a step: bring in what is not in its place yet, and tell the device which slots have a gradient.

        Returns:
            Whether ``arena.step_sumsq`` no longer describes the gradients.
        """

    @abstractmethod
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        """A gradient has arrived in ``parameter.grad``."""

    def check_in_place(self, name: str) -> None:
        """Refuse to go on when a parameter is no longer what or where it was at construction.

        Raises:
            ValueError: it was replaced, moved, converted or reshaped.
        """
        parameter = self._parameters[name]
        module, attribute = self._owners[name]
        if getattr(module, attribute, None) is not parameter:
            raise ValueError(
                f"{name} was replaced by another tensor after the optimizer was built, so training would no longer "
                "reach the model. Load weights in place (load_state_dict without assign) or build a new optimizer."
            )
        if _place(parameter) != self._places[name]:
            _, shape, dtype, device = self._places[name]
            raise ValueError(
                f"{name} changed after the optimizer was built: it was {shape}, {dtype} on {device}, and is now "
                f"{tuple(parameter.shape)}, {parameter.dtype} on {parameter.device} or elsewhere in memory. Move or "
                "convert the model first and build the optimizer afterwards."
            )

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
        backend: "triton" or "reference".
        measure_on_arrival: take the norm of each gradient as it arrives, into ``arena.step_sumsq``.
        gemm: let the GEMMs of linear layers write into the slots.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arena: Arena,
        backend: str,
        measure_on_arrival: bool,
        gemm: bool,
    ):
        super().__init__(model, parameters, arena)
        self._backend = backend
        self.measure_on_arrival = measure_on_arrival
        self._views: list[Tensor] = []  # p.grad of each slot
        self._versions: list[int] = []  # version counter of each view when its gradient last arrived
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

    def collect(self) -> bool:
        """Make sure that every gradient lies in its slot, and tell the device which slots have one.

        Returns:
            Whether ``arena.step_sumsq`` no longer describes the gradients: one was edited by the caller after it
            arrived, was put there by the caller, or norms are not taken on arrival.
        """
        stale, present = not self.measure_on_arrival, []
        for name, view, version in zip(self._arena.names, self._views, self._versions, strict=True):
            self.check_in_place(name)
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
    def measured(self) -> bool:
        """Whether ``arena.step_sumsq`` holds the norm on arrival of every gradient that is present."""
        arrived = (version != NOT_ARRIVED for version, here in zip(self._versions, self._present, strict=True) if here)
        return self.measure_on_arrival and all(arrived)

    def contents(self) -> list[int]:
        """Changes whenever the content of any slot does."""
        return [view._version for view in self._views]

    def remove(self) -> None:
        """Take all hooks off and give the linear layers their own forward back."""
        super().remove()
        if self._gemm is not None:
            self._gemm.bind(())

    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        view, gradient = self._views[index], parameter.grad
        assert gradient is not None
        if gradient is not view:
            self.check_in_place(name)
            view.copy_(gradient)
            parameter.grad = view  # the temporary is freed as soon as autograd lets go of it
        if self._versions[index] != view._version:  # not what the GEMM wrote and measured
            self._measure(index)

    def _slot_for_gemm(self, name: str) -> tuple[Tensor, bool]:
        """Where the gradient of ``name`` goes, and whether it is added to what is there."""
        self.check_in_place(name)
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
            arena, tiles = self._arena, self._arena.slots[index].tiles
            assert arena.grad is not None
            sum_of_squares(arena.grad, arena.step_sumsq, arena.table, backend=self._backend, tiles=tiles)


class UpdateOnArrival(GradientIntake):
    """Hands every active gradient on as it arrives and frees it: no gradient outlives the backward pass.

    Args:
        model: the model, to find each parameter's owner.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where the parameters' state lies.
        update: called with the slot's index and the gradient, in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arena: Arena,
        update: Callable[[int, Tensor], None],
    ):
        super().__init__(model, parameters, arena)
        self._update = update
        self._updated: list[bool] = []
        self.last_micro_batch = True

    def forget(self) -> None:
        """Begin a new step."""
        self._updated = [False] * len(self._arena.names)

    def collect(self) -> bool:
        """Tell the device which slots were updated, and use gradients that the caller put there or left behind.

        A step whose every backward ran with ``last_micro_batch`` False ends here: its sums are used now.
        """
        for index, name in enumerate(self._arena.names):
            self.check_in_place(name)
            if self._parameters[name].grad is not None:
                self._use(name, index, self._parameters[name])
        self._present = []  # the updates have written one slot at a time
        self._tell_present(list(self._updated))
        return False

    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        if self.last_micro_batch:
            self._use(name, index, parameter)

    def _use(self, name: str, index: int, parameter: nn.Parameter) -> None:
        self.check_in_place(name)
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._updated[index]:
            raise RuntimeError(
                f"{name} received a second gradient in one step, but update_in='backward' has already used the first. "
                "Set optimizer.last_micro_batch = False before every backward but the last, or call step() after each."
            )
        self._update(index, gradient)
        self._updated[index] = True


def _place(parameter: Tensor) -> tuple[int, tuple[int, ...], torch.dtype, torch.device]:
    return parameter.data_ptr(), tuple(parameter.shape), parameter.dtype, parameter.device

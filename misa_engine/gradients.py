"""GradientIntake: brings every active gradient into its arena slot, and knows what happened to it since.

A hook on each parameter moves an arriving gradient into the parameter's slot and lets ``p.grad`` be a view of it, so
that clipping, logging, ``zero_grad`` and accumulation go on working: while ``p.grad`` is the view, autograd adds to it
in place; after ``zero_grad(set_to_none=True)`` the next gradient arrives as a new tensor and is moved again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from misa_engine.arena import Arena, upload
from misa_engine.kernels.norm import sum_of_squares

NOT_ARRIVED = -1


class GradientIntake:
    """Hooks on all trained parameters, active or not. Build it while they still require gradients.

    Args:
        model: the model, to find each parameter's owner.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where gradients go.
        backend: "triton" or "reference".
        measure_on_arrival: take the norm of each gradient as it arrives, into ``arena.step_sumsq``.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arena: Arena,
        backend: str,
        measure_on_arrival: bool,
    ):
        self._parameters, self._arena, self._backend = parameters, arena, backend
        self.measure_on_arrival = measure_on_arrival
        self.slot_of: dict[str, int] = {}
        self._views: list[Tensor] = []  # p.grad of each slot
        self._versions: list[int] = []  # version counter of each view when its gradient last arrived
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
        self._views = [self._arena.gradient_view(index) for index in range(len(self._arena.names))]
        self._present = []
        self.forget()

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
        if present != self._present:
            upload(present, self._arena.table.slot_present)
            self._present = present
        return stale

    @property
    def measured(self) -> bool:
        """Whether ``arena.step_sumsq`` holds the norm on arrival of every gradient that is present."""
        arrived = (version != NOT_ARRIVED for version, here in zip(self._versions, self._present, strict=True) if here)
        return self.measure_on_arrival and all(arrived)

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

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            index = self.slot_of.get(name)
            if index is None:
                parameter.grad = None
                raise RuntimeError(
                    f"{name} received a gradient while it is inactive: something set requires_grad on it. MISA decides "
                    "which parameters train; leave requires_grad alone after building the optimizer."
                )
            view, gradient = self._views[index], parameter.grad
            assert gradient is not None
            if gradient is not view:
                self.check_in_place(name)
                view.copy_(gradient)
                parameter.grad = view  # the temporary is freed as soon as autograd lets go of it
            self._versions[index] = view._version
            if self.measure_on_arrival:
                arena, tiles = self._arena, self._arena.slots[index].tiles
                sum_of_squares(arena.grad, arena.step_sumsq, arena.table, backend=self._backend, tiles=tiles)

        return on_gradient


def _place(parameter: Tensor) -> tuple[int, tuple[int, ...], torch.dtype, torch.device]:
    return parameter.data_ptr(), tuple(parameter.shape), parameter.dtype, parameter.device

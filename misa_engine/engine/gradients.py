"""What happens when a gradient arrives: into its slot (gradient_slots.py), or used at once (update_on_arrival.py).

A hook on each parameter sees its gradient when autograd has merged all its uses. Hooks are registered while every
parameter still requires gradients: a frozen one takes none, and hooks survive ``requires_grad`` being toggled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.arena import Arena, upload
from misa_engine.engine.exchange import Exchange
from misa_engine.engine.marks import phase
from misa_engine.engine.places import Places
from misa_engine.engine.replicas import Replicas
from misa_engine.engine.update import ArenaUpdate

#: torch's parameter groups at the time of the call; an optimizer may exchange the list.
Groups = Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Scaler:
    """What torch.amp.GradScaler says about the gradients of a step."""

    scale: Tensor | None
    """What they are still multiplied by; None when the caller has unscaled them."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, rest: str = "none") -> Scaler | None:
        """What it has set on ``optimizer`` for the time of its ``step``; None when no scaler makes the step.

        Raises:
            ValueError: the ``rest`` rule has moved something by gradients that were multiplied by the scale.
        """
        if not hasattr(optimizer, "found_inf"):
            return None
        if rest == "sgd":  # too late, but not unsaid
            raise ValueError(
                "GradScaler with rest='sgd': what rests has moved by gradients still multiplied by the scale. Train "
                "without a scaler, or use rest='sign' or 'row_norm', which scale does not change."
            )
        return cls(getattr(optimizer, "grad_scale", None))


class GradientIntake(ABC):
    """Takes the gradients of all active parameters, and makes the step that uses them.

    ``on_arrival`` is called with the parameter's name for each gradient that arrives, used or not. ``on_inactive`` is
    offered those of parameters that hold no slot, and says whether it took them.

    Args:
        model: the model, for the modules whose forward passes can help.
        parameters: name -> parameter, everything that can be bound to the arena.
        arena: where the parameters' state lies.
        kernels: what the step runs.
        groups: gives torch's parameter groups.
    """

    #: Whether gradients outlive the backward pass, so that ``step`` can still measure them.
    _holds_gradients: bool
    #: Averages under way at a time, where there are replicas; 0 is no limit.
    _in_flight: int
    #: Averages gradients with the other processes; None where there are none.
    exchange: Exchange | None = None

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
        self._model_order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
        self.places = Places(model, parameters)
        self.slot_of: dict[str, int] = {}
        self.on_arrival: Callable[[str], None] = lambda name: None
        self.on_inactive: Callable[[str, nn.Parameter], bool] = lambda name, parameter: False
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
        self._last_micro_batch = value or (self._holds_gradients and self.exchange is None)

    def join(self, replicas: Replicas, clock: Callable[[], int]) -> None:
        """Average all gradients over ``replicas`` from now on; ``clock`` gives the number of steps made."""
        slots = self._arena.table.slot_group.numel()
        self.exchange = Exchange(replicas, self, most_slots=slots, in_flight=self._in_flight, clock=clock)

    def bind(self) -> None:
        """Follow the arena after it has bound other parameters; no gradient has arrived then."""
        self.slot_of = {name: index for index, name in enumerate(self._arena.names)}
        self._present = []
        if self.exchange is not None:
            self.exchange.bind({index: self._model_order[name] for name, index in self.slot_of.items()})
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
    def here(self) -> list[bool]:
        """Which slots have a gradient of this step on this process, used or not."""

    @abstractmethod
    def to_average(self, index: int) -> Tensor:
        """The gradient of a slot, flat and contiguous; zeros where there is none."""

    @abstractmethod
    def averaged(self, index: int, gradient: Tensor) -> None:
        """``gradient``, which ``to_average`` gave, is now the mean over all processes."""

    def settle(self, what: str) -> None:
        """Before weights or the active set change, for ``what``: nothing to be done where weights are whole."""
        return

    def empty_pass(self) -> None:
        """From within a backward pass in which no active parameter takes part: the others may need this process."""
        if self.exchange is not None and self.last_micro_batch:
            self.exchange.expect_end()

    @abstractmethod
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        """A gradient has arrived in ``parameter.grad``."""

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def present(self) -> list[bool]:
        """Which slots had a gradient in the last step."""
        return self._present

    def _tell_present(self, present: list[bool]) -> None:
        if present != self._present:
            upload(present, self._arena.table.slot_present)
            self._present = present

    def _hook(self, name: str) -> Callable[[nn.Parameter], None]:
        def on_gradient(parameter: nn.Parameter) -> None:
            index = self.slot_of.get(name)
            if index is None and self.on_inactive(name, parameter):
                self.on_arrival(name)
            elif index is None:
                parameter.grad = None
                raise RuntimeError(
                    f"{name} received a gradient while it is inactive: something set requires_grad on it, or the graph "
                    "is from before the last switch. MISA decides which parameters train; leave requires_grad alone "
                    "after building the optimizer, and call backward() before the step() that ends the round."
                )
            elif parameter.grad is not None:  # torch 2.13 calls the hook for a gradient of None too
                self.on_arrival(name)
                with phase("hooks"):
                    self._arrived(name, index, parameter)

        return on_gradient


def check_dense(name: str, gradient: Tensor) -> None:
    """Refuse a sparse gradient with a ValueError that names its parameter."""
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{name} received a gradient of layout {gradient.layout}; MISA takes dense ones. Build its module with "
            "sparse=False, or name it in frozen=(...)."
        )

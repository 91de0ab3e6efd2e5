"""UpdateOnArrival: ``update_in="backward"``, where each gradient is used in the backward pass that made it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from misa_engine.engine.gradients import GradientIntake, Scaler, check_dense


class UpdateOnArrival(GradientIntake):
    """Uses every active gradient as it arrives and frees it: no gradient outlives the backward pass."""

    _holds_gradients = False
    _in_flight = 1  # one is averaged while the next is computed

    _updated: list[bool]  # by slot; ``forget`` makes it, which every ``bind`` calls

    def forget(self) -> None:
        """Begin a new step."""
        self._updated = [False] * len(self._arena.names)
        if self.exchange is not None:
            self.exchange.forget()

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
        self._kernels.spread(self._present)  # now: the order in which averages ended may be another elsewhere
        self._kernels.global_norm()
        self.forget()

    def _collect(self) -> None:
        """Tell the device which slots were updated, and use gradients that the caller put there or left behind.

        A step whose every backward ran with ``last_micro_batch`` False ends here: its sums are used now.
        """
        for index, name in enumerate(self._arena.names):
            self.places.check(name)
            gradient = self._parameters[name].grad
            if gradient is not None and self.exchange is None:
                self._use(name, index, gradient)
            elif gradient is not None and self.exchange is not None:
                self._check_first(name, index)
                check_dense(name, gradient)
                self.exchange.added()
        present = self._updated if self.exchange is None else self.exchange.meet()
        self._present = []  # the updates have written one slot at a time
        self._tell_present(list(present))

    @torch.no_grad()
    def _arrived(self, name: str, index: int, parameter: nn.Parameter) -> None:
        if not self.last_micro_batch:
            return
        gradient = parameter.grad
        assert gradient is not None
        if self.exchange is None:
            self._use(name, index, gradient)
            return
        self.places.check(name)
        self._check_first(name, index)
        check_dense(name, gradient)
        self.exchange.added()
        self.exchange.expect_end()
        self.exchange.ready(index)

    def here(self) -> list[bool]:
        """Which slots have a gradient, or had one that was used."""
        kept = (self._parameters[name].grad is not None for name in self._arena.names)
        return [used or held for used, held in zip(self._updated, kept, strict=True)]

    def to_average(self, index: int) -> Tensor:
        """``p.grad`` itself, or its contiguous copy."""
        parameter = self._parameters[self._arena.names[index]]
        if parameter.grad is None:
            return torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        return parameter.grad.detach().contiguous().view(-1)

    def averaged(self, index: int, gradient: Tensor) -> None:
        """Use the mean."""
        name = self._arena.names[index]
        self._use(name, index, gradient)

    @torch.no_grad()
    def _use(self, name: str, index: int, gradient: Tensor) -> None:
        self.places.check(name)
        if self.places.edited([name]):
            self._kernels.drop_residual(index)
        self._parameters[name].grad = None
        self._check_first(name, index)
        self._kernels.set_hyperparameters(self._groups(), None)
        check_dense(name, gradient)
        self._kernels.step_slot(index, gradient)
        self.places.know([name])
        self._updated[index] = True

    def _check_first(self, name: str, index: int) -> None:
        if self._updated[index]:
            raise RuntimeError(
                f"{name} received a second gradient in one step, but update_in='backward' has already used the first. "
                "Set optimizer.last_micro_batch = False before every backward but the last, or call step() after each."
            )

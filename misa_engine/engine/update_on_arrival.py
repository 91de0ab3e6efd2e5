"""UpdateOnArrival: ``update_in="backward"``, where each gradient is used in the backward pass that made it."""

from __future__ import annotations

import math

import torch
from torch import nn

from misa_engine.engine.gradients import GradientIntake, Scaler, check_dense


class UpdateOnArrival(GradientIntake):
    """Uses every active gradient as it arrives and frees it: no gradient outlives the backward pass."""

    _holds_gradients = False

    _updated: list[bool]  # by slot; ``forget`` makes it, which every ``bind`` calls

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
        if self._arena.residual is not None and self.places.edited([name]):
            slot = self._arena.slots[index]
            self._arena.residual[slot.start : slot.start + slot.numel].zero_()
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._updated[index]:
            raise RuntimeError(
                f"{name} received a second gradient in one step, but update_in='backward' has already used the first. "
                "Set optimizer.last_micro_batch = False before every backward but the last, or call step() after each."
            )
        self._kernels.set_hyperparameters(self._groups(), None)
        check_dense(name, gradient)
        self._kernels.step_slot(index, gradient)
        self.places.know([name])
        self._updated[index] = True

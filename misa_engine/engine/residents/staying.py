"""Masters stay on the host whatever ``model.to``, ``.cuda()`` and their like do to the rest of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.residents.forward import COPY
from misa_engine.engine.residents.matrix import Resting


def stay_in_place(model: nn.Module, matrices: Iterable[Resting], device: torch.device, dtype: torch.dtype) -> None:
    """Put the guard on the model, so that a refused conversion has changed nothing, and on every module that rests.

    Args:
        model: the model.
        matrices: what rests.
        device: the card.
        dtype: of the weights.
    """
    model.__dict__["_apply"] = _Guard(model, None, device, dtype)
    for matrix in matrices:
        for module in matrix.modules:
            module.__dict__["_apply"] = _Guard(module, matrix, device, dtype)


def let_go(model: nn.Module) -> None:
    """Undo ``stay_in_place``."""
    for module in model.modules():
        if isinstance(module.__dict__.get("_apply"), _Guard):
            del module.__dict__["_apply"]


class _Guard:
    """Stands in for ``module._apply``, through which torch moves and converts everything of a module.

    Args:
        module: the module.
        matrix: the module's weight, which is left alone until it is awake; None for the root.
        device: the card.
        dtype: of the weights.
    """

    def __init__(self, module: nn.Module, matrix: Resting | None, device: torch.device, dtype: torch.dtype):
        self._module, self._matrix, self._device, self._dtype = module, matrix, device, dtype

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._check(fn)
        module, matrix = self._module, self._matrix
        if matrix is None or matrix.awake:
            return type(module)._apply(module, fn, recurse)
        kept, module._parameters["weight"] = module._parameters["weight"], None  # which _apply passes over
        try:
            return type(module)._apply(module, fn, recurse)
        finally:
            module._parameters["weight"] = kept

    def _check(self, fn: Callable[[Tensor], Tensor]) -> None:
        device, dtype = self._device, self._dtype
        probe = fn(torch.empty(0, dtype=dtype, device=device))
        if probe.dtype != dtype:
            raise ValueError(
                f"the model has residents: its exact weights are {dtype}, and cannot be converted to {probe.dtype}. "
                "Load it in the dtype that it is to train in (dtype=...)."
            )
        if probe.device != device:
            raise ValueError(
                f"the model has residents on {device} and its exact weights on the host, and cannot be moved to "
                f"{probe.device}. Load it for that device (device=...), or call residents_of(model).release() first, "
                f"which puts all of it on {device}."
            )

    def __reduce__(self) -> Any:
        raise TypeError(COPY)

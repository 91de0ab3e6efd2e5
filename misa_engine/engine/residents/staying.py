"""Masters stay on the host whatever ``model.to``, ``.cuda()`` and their like do to the rest of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from misa_engine.engine.residents.forward import COPY

if TYPE_CHECKING:
    from misa_engine.engine.residents.matrix import Resting
    from misa_engine.engine.residents.store import Residents


def stay_in_place(model: nn.Module, residents: Residents) -> None:
    """Put the guard on the model, so that a refused conversion has changed nothing, and on every module that rests."""
    model.__dict__["_apply"] = _Guard(model, residents, None)
    for matrix in map(residents.matrix, residents.names):
        for module in matrix.modules:
            module.__dict__["_apply"] = _Guard(module, residents, matrix)


class _Guard:
    """Stands in for ``module._apply``, through which torch moves and converts everything of a module.

    Args:
        module: the module.
        residents: what rests.
        matrix: the module's weight, which is left alone until it is awake; None for the root.
    """

    def __init__(self, module: nn.Module, residents: Residents, matrix: Resting | None):
        self._module, self._residents, self._matrix = module, residents, matrix

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
        device, dtype = self._residents.device, self._residents.dtype
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

"""Places: the model's parameters are still the tensors, and still where they were, when the optimizer was built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Places:
    """Remembers owner, address, shape, dtype and device of each parameter.

    Args:
        model: the model, to find each parameter's owner.
        parameters: name -> parameter, everything that can be trained.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters
        self._places = {name: _place(parameter) for name, parameter in parameters.items()}
        self._owners = {
            f"{prefix}.{attribute}" if prefix else attribute: (module, attribute)
            for prefix, module in model.named_modules()
            for attribute in module._parameters
        }

    def owner(self, name: str) -> nn.Module:
        """The module whose attribute the parameter is."""
        return self._owners[name][0]

    def check(self, name: str) -> None:
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

    def check_all(self) -> None:
        """``check`` every parameter."""
        for name in self._parameters:
            self.check(name)


def _place(parameter: Tensor) -> tuple[int, tuple[int, ...], torch.dtype, torch.device]:
    return parameter.data_ptr(), tuple(parameter.shape), parameter.dtype, parameter.device

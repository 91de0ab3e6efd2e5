"""Places: are the model's parameters still the tensors, in place and with the values that the optimizer left?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from misa_engine.engine.shards import is_sharded, local


class Places:
    """Remembers owner, address, shape, dtype and device of each parameter.

    Args:
        model: the model, to find each parameter's owner.
        parameters: name -> parameter, everything that can be trained.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters
        self._places = {name: _place(parameter) for name, parameter in parameters.items()}
        self._versions: dict[str, int] = {}  # version counter when the optimizer last knew the value
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
        found = getattr(module, attribute, None)
        gathered = is_sharded(parameter) and not is_sharded(found)  # by FSDP2, for a pass
        if found is not parameter and not gathered:
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

    def moved(self, names: Iterable[str]) -> None:
        """Take these parameters' present places for the right ones: the optimizer itself has moved them."""
        self._places.update((name, _place(self._parameters[name])) for name in names)

    def know(self, names: Iterable[str]) -> None:
        """Take the present values of these parameters for those that the optimizer left."""
        self._versions.update((name, local(self._parameters[name])._version) for name in names)

    def forget(self) -> None:
        """Take the values that are found next for those that belong to a state just loaded, in whatever order."""
        self._versions.clear()

    def edited(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that somebody else wrote in place since ``know`` (all writes but through ``.data``)."""
        versions = ((name, self._versions.get(name)) for name in names)
        return [name for name, version in versions if version not in (None, local(self._parameters[name])._version)]

    def check_all(self) -> None:
        """``check`` every parameter."""
        for name in self._parameters:
            self.check(name)


def _place(parameter: Tensor) -> tuple[int, tuple[int, ...], torch.dtype, torch.device]:
    return local(parameter).data_ptr(), tuple(parameter.shape), parameter.dtype, parameter.device

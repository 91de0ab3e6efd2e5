"""The frozen input embedding on the host: a step reads a few thousand of its rows, so the card need not hold the table.

    token ids -> host -> their rows -> card      2·h bytes a token, 16 MB for 2,048 tokens of an 8B model

Of Llama-3-8B it is 0.98 GiB, of Qwen2.5-14B 1.45. It comes back when it is to train; where it is the output head too,
it never leaves the card.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.residents.forward import COPY


def host_embedding(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """Name and module of the input embedding, unless it is the head too or no plain ``nn.Embedding``."""
    ends = [getattr(model, f"get_{place}_embeddings", None) for place in ("input", "output")]
    embedding, head = (end() if end is not None else None for end in ends)
    # exactly: a subclass may scale what it looks up by a tensor of the card
    if type(embedding) is not nn.Embedding or embedding.weight is getattr(head, "weight", None):
        return None
    name = next((name for name, parameter in model.named_parameters() if parameter is embedding.weight), None)
    return None if name is None else (name, embedding)


class HostLookup:
    """Keeps a model's embedding on the host and its rows coming to the card, until ``bring_back``.

    Args:
        model: whose ``device`` is the card all the same, for whoever puts its inputs there.
        name: of the embedding's weight.
        module: the embedding; its weight comes to the host if it is elsewhere.
        device: the card.
    """

    def __init__(self, model: nn.Module, name: str, module: nn.Embedding, device: torch.device):
        self.name, self.module, self.device = name, module, device
        self._model, self._class = weakref.ref(model), type(model)
        if module.weight.device.type not in ("cpu", "meta"):  # from the meta device a loader brings it
            module.weight.data = module.weight.data.to("cpu")
        vars(module)["_apply"] = self._stay
        self._handles = (
            module.register_forward_pre_hook(self._to_host),
            module.register_forward_hook(self._to_card),
        )
        if device.type != "cpu" and hasattr(self._class, "device"):  # transformers': that of the first parameter
            own = {name: getattr(self._class, name) for name in ("__module__", "__qualname__", "__doc__")}
            own["device"] = property(lambda model: device)
            model.__class__ = type(self._class.__name__, (self._class,), own)

    def __reduce__(self) -> Any:
        """Refuse copies of the model as what rests does."""
        raise TypeError(COPY)

    def _stay(self, fn: Any, recurse: bool = True) -> nn.Module:
        return self.module  # model.to(card) leaves it

    @staticmethod
    def _to_host(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *others = args
        return (ids.to("cpu"), *others)

    def _to_card(self, module: nn.Module, args: Any, rows: Tensor) -> Tensor:
        return rows.to(self.device)

    def bring_back(self) -> None:
        """Be an ordinary embedding on the card."""
        for handle in self._handles:
            handle.remove()
        vars(self.module).pop("_apply", None)
        self.module.weight.data = self.module.weight.data.to(self.device)
        model = self._model()
        if model is not None:
            model.__class__ = self._class

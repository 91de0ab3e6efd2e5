"""Tiny models with residents, and the same models with the frozen weights that these count as."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine import MISA
from misa_engine.engine.residents import Residents, residents_of, rest
from training import tiny

OPTIONS: dict[str, Any] = {"lr": 1e-2, "delta": 0.3, "inner_steps": 2, "cold_start": "none", "rest": "none"}


def resting(format: str = "int8", dtype: torch.dtype = torch.float32, family: str = "llama", **options) -> nn.Module:
    """A model on the CPU whose layers' matrices rest there in 8 bits."""
    model = tiny(family, dtype, **options)
    rest(model, format)
    return model


def of(model: nn.Module) -> Residents:
    found = residents_of(model)
    assert found is not None
    return found


def optimizer_for(model: nn.Module, **options) -> MISA:
    return MISA(model, **{**OPTIONS, **options})


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An ordinary model with the weights that ``model`` multiplies with at this moment."""
    plain = tiny("llama", next(model.parameters()).dtype)
    plain.load_state_dict(model.state_dict())
    residents = of(model)
    for name in residents.resting:
        plain.get_parameter(name).data.copy_(residents.expanded(name))
    return plain if dtype is None else plain.to(dtype)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: tensor.detach() for name, tensor in model.state_dict().items()})

"""load_model: a causal language model on its device, with or without residents in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from misa_engine.engine.residents import rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    path: str | Path,
    *,
    residents: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    masters: str = "pinned",
    **options: Any,
) -> PreTrainedModel:
    """Load a model for ``MISA(model, ...)``.

    Args:
        path: directory of the model, or its name on the Hub.
        residents: "int8", "int8_row" or "fp8": matrices that do not train lie on the device in 8 bits and exact on the
            host (``misa_engine.engine.residents``). None loads all of it in full onto the device.
        device: where it trains; None is the GPU where there is one.
        dtype: bfloat16 or float32.
        masters: where exact weights lie, "pinned" or "mapped".
        **options: more for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: an unknown format or place, or a model in which nothing can rest.
        OSError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first = target if residents is None else torch.device("cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, device_map={"": first}, **options)
    if residents is not None:
        rest(model, residents, target, masters=masters)
    model.train()
    loaded: PreTrainedModel = model
    return loaded

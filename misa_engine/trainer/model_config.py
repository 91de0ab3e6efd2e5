"""Fields of a model's configuration that a trainer changes while it trains: saved as they were when the model came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: What transformers' Trainer (use_cache) and TRL (output_router_logits of a mixture) set on the model's configuration.
#: Saved so, the model would generate without a cache, or return router logits that nobody asked for.
CHANGED = ("use_cache", "output_router_logits")


def _configs(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return {}
    return {"": config, "text": config.get_text_config()}


def training_fields(model: Any) -> dict[tuple[str, str], Any]:
    """Values of ``CHANGED`` by (part, field), to be read before a trainer gets the model; empty for a model's name."""
    found = {}
    for part, config in _configs(model).items():
        for name in CHANGED:
            if name in vars(config):
                found[part, name] = getattr(config, name)
    return found


@contextmanager
def restored_config(model: Any, before: Mapping[tuple[str, str], Any]) -> Iterator[None]:
    """``before`` in the model's configuration inside, the trainer's own values again afterwards."""
    configs = _configs(model)
    wanted = [(configs[part], name, value) for (part, name), value in before.items() if part in configs]
    changed = [(config, name, getattr(config, name)) for config, name, _ in wanted]
    try:
        for config, name, value in wanted:
            setattr(config, name, value)
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)

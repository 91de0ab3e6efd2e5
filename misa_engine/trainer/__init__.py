"""MISA under the Hugging Face Trainer: factory, mixin, MisaTrainer, checkpoints, the lean forward.

Public names are imported when first used: ``MisaTrainer`` needs TRL, which is an extra; the others transformers only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from misa_engine.trainer.callback import ManifestCallback, last_good_checkpoint
    from misa_engine.trainer.mixin import MisaFactory, MisaMixin
    from misa_engine.trainer.sft import MisaTrainer

__all__ = ["ManifestCallback", "MisaFactory", "MisaMixin", "MisaTrainer", "last_good_checkpoint"]

_HOMES = {
    "ManifestCallback": "callback",
    "MisaFactory": "mixin",
    "MisaMixin": "mixin",
    "MisaTrainer": "sft",
    "last_good_checkpoint": "callback",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""misa_engine: train all weights of a language model on one consumer GPU, a few matrices at a time.

Names are imported when first used: the optimizer needs torch, the Trainer integration transformers and TRL, and
``misa --help`` none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from misa_engine.engine.optimizer import MISA
    from misa_engine.method.config import MisaConfig
    from misa_engine.planner.plan import plan
    from misa_engine.trainer import MisaFactory, MisaTrainer
    from misa_engine.trainer.loading import load_model

__version__ = "0.1.0"
__all__ = ["MISA", "MisaConfig", "MisaFactory", "MisaTrainer", "__version__", "load_model", "plan"]

_HOMES = {
    "MISA": "engine.optimizer",
    "MisaConfig": "method.config",
    "MisaFactory": "trainer",
    "MisaTrainer": "trainer",
    "load_model": "trainer.loading",
    "plan": "planner.plan",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name in _HOMES:
        return getattr(import_module(f"misa_engine.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

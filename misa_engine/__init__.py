"""misa_engine: train all weights of a language model on one consumer GPU, a few matrices at a time.

The optimizer needs nothing but torch; the Hugging Face parts are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa_engine.config import MisaConfig
from misa_engine.optimizer import MISA

if TYPE_CHECKING:
    from misa_engine.trainer import MisaFactory, MisaTrainer

__version__ = "0.1.0"
__all__ = ["MISA", "MisaConfig", "MisaFactory", "MisaTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the Trainer integration on first use: it pulls in transformers and TRL."""
    if name in ("MisaFactory", "MisaTrainer"):
        from misa_engine import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

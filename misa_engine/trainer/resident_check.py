"""Before training: the loss with residents in 8 bits beside that with the exact weights, on a few samples.

The exact pass streams: each matrix is copied from its master into the workspace when it is multiplied with, since a
card that needs residents has no room for both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from misa_engine.engine.residents import residents_of
from misa_engine.engine.residents.exact import exact_weights
from misa_engine.errors import UserError
from misa_engine.trainer.lean import plain_loss, short_batch, undisturbed

logger = logging.getLogger(__name__)

#: Samples that are compared, and tokens of each: 1,024 predictions of which the mean is taken.
SAMPLES, TOKENS = 8, 128
#: How far the two losses may be apart, in nats, relative to the larger of the exact loss and 1. Seen at most, on
#: SmolLM2-135M over 1,024 predictions (bench/results/residents): 0.0010 (int8), 0.0019 (int8_row) and 0.0022 (fp8). It
#: is noise about zero, so 16 times fewer labels make four times as much; a model that 8 bits do not suit is far beyond.
TOLERANCE = {"int8": 0.02, "int8_row": 0.05, "fp8": 0.05}


@dataclass(frozen=True)
class ResidentLosses:
    """Two zero-shot losses of the same samples, in nats a token."""

    format: str
    rested: float
    """With residents."""
    exact: float
    """With the weights that the run starts from."""
    tokens: int

    def describe(self) -> str:
        """One line for people."""
        return (
            f"residents {self.format}: loss {self.rested:.4f} on {self.tokens} tokens of the data, {self.exact:.4f} "
            f"with the exact weights ({self.rested - self.exact:+.4f})"
        )

    def check(self) -> None:
        """Refuse a model whose loss changes by more than TOLERANCE.

        Raises:
            UserError: with both numbers.
        """
        bound = TOLERANCE[self.format] * max(1.0, abs(self.exact))
        if not abs(self.rested - self.exact) <= bound:  # a NaN fails too
            others = "int8 is the most accurate format" if self.format != "int8" else "no format is more accurate"
            raise UserError(
                f"residents {self.format} change the model's loss from {self.exact:.4f} to {self.rested:.4f} on "
                f"{self.tokens} tokens, by more than the {bound:.4f} that are permitted: this model does not bear 8 "
                f"bits ({others}). Train it without residents."
            )


def resident_losses(trainer: Any) -> ResidentLosses | None:
    """Measure both, without leaving a trace in the model; None without residents or where no sample has labels."""
    residents = residents_of(trainer.model)
    if residents is None:
        return None
    completion_only = getattr(trainer, "completion_only_loss", True) is not False
    sizes = {"samples": SAMPLES, "tokens": TOKENS}
    batch = short_batch(
        trainer.train_dataset, trainer.model, trainer.args.device, completion_only=completion_only, **sizes
    )
    if batch is None:
        logger.info("losses with residents and without are not compared: no sample has labels to predict")
        return None
    with undisturbed(trainer, []), torch.no_grad(), trainer.compute_loss_context_manager():
        rested = float(plain_loss(trainer.model, batch, None))
        with exact_weights(residents):
            exact = float(plain_loss(trainer.model, batch, None))
    return ResidentLosses(residents.format.name, rested, exact, int((batch["labels"][:, 1:] != -100).sum()))

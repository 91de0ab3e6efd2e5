"""Held-out loss of a method on a small model: a smoke test of learning, no claim about fine-tuning an 8B model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from safetensors.torch import save_model
from torch import Tensor

from misa_engine import MISA
from misa_engine.bench.cases import Report, Row, TrainingCase
from misa_engine.bench.corpus import batches, rows
from misa_engine.bench.measure import timed
from misa_engine.bench.method import Method

#: Rows of held-out text behind each point of a loss curve.
EVALUATION_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class LossCase(TrainingCase):
    """Held-out loss against tokens and against the time spent in training steps."""

    kind: ClassVar[str] = "loss"
    data: str = "stdlib"
    """What is trained on (see ``corpus``)."""
    data_seed: int = 0
    steps: int = 80
    eval_every: int = 20
    """Steps between two points of the curve."""
    save_to: str = ""
    """A safetensors file that gets the weights: those of the base model from which the others start."""

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Train, and evaluate in between; of MISA also what its sampler did."""
        train, held_out = rows(self.data, self.length, self.data_seed)
        stream = batches(train, self.batch, device)
        spent, losses, curve = 0.0, [], []
        for step in range(self.steps + 1):
            if step:
                lasted, loss = timed(device, method.step, list(islice(stream, self.accumulation)))
                spent += lasted
                losses.append(float(loss))
            if step % self.eval_every == 0 or step == self.steps:
                tokens = step * self.batch * self.length * self.accumulation
                value = evaluate(method, held_out[:EVALUATION_ROWS], self.batch, device)
                curve.append({"step": step, "tokens": tokens, "seconds": spent, "heldout_loss": value})
                row["curve"], row["heldout_loss"] = curve, value
                report(row)
        row["training_loss_every_20"] = [statistics.fmean(losses[k : k + 20]) for k in range(0, self.steps, 20)]
        if isinstance(method.optimizer, MISA) and method.optimizer.events:
            events, visits = method.optimizer.events, method.optimizer.tracker.visits
            row["entropy_median"] = statistics.median(event.entropy for event in events)
            row["visits_least_most"] = [int(min(visits)), int(max(visits))]
            row["stale_rounds_max"] = max(event.stale_rounds_max for event in events)
        if self.save_to:
            save_model(method.model, self.save_to)


@torch.no_grad()
def evaluate(method: Method, data: Tensor, size: int, device: torch.device) -> float:
    """Mean next-token loss over rows of token ids."""
    method.model.eval()
    losses = [float(method.loss(part.to(device))) * len(part) for part in data.split(size)]
    method.model.train()
    return sum(losses) / len(data)

"""Held-out loss of a method on a small model: a smoke test of learning, no claim about fine-tuning an 8B model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
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
    loss: str = "plain"
    data: str = "stdlib"
    """What is trained on (see ``corpus``)."""
    data_seed: int = 0
    steps: int = 80
    eval_every: int = 20
    """Steps between two points of the curve."""
    schedule_warm_up: int | None = None
    """Steps of a linear warm-up before a cosine to 0; None keeps the learning rate."""

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Train, and evaluate in between; of MISA also what its sampler did."""
        train, held_out = rows(self.data, self.length, self.data_seed)
        stream = batches(train, self.batch, device)
        curve: list[dict[str, float]] = []
        spent, losses = 0.0, []
        per_step = self.batch * self.length * self.accumulation
        schedule = None
        if self.schedule_warm_up is not None:
            from transformers import get_cosine_schedule_with_warmup

            schedule = get_cosine_schedule_with_warmup(method.optimizer, self.schedule_warm_up, self.steps)

        def note(step: int) -> None:
            value = evaluate(method, held_out[:EVALUATION_ROWS], self.batch, device)
            curve.append({"step": step, "tokens": step * per_step, "seconds": spent, "heldout_loss": value})
            row["curve"] = curve
            report(row)

        note(0)
        for step in range(1, self.steps + 1):
            micro_batches = list(islice(stream, self.accumulation))
            lasted, loss = timed(device, method.step, micro_batches)
            spent += lasted
            losses.append(float(loss))
            if schedule is not None:
                schedule.step()
            if step % self.eval_every == 0 or step == self.steps:
                note(step)
        row["heldout_loss"] = curve[-1]["heldout_loss"]
        row["training_loss_every_20"] = [statistics.fmean(losses[k : k + 20]) for k in range(0, self.steps, 20)]
        if isinstance(method.optimizer, MISA) and method.optimizer.events:
            events, visits = method.optimizer.events, method.optimizer.tracker.visits
            row["entropy_median"] = statistics.median(event.entropy for event in events)
            row["visits_least_most"] = [int(min(visits)), int(max(visits))]
            row["stale_rounds_max"] = max(event.stale_rounds_max for event in events)


@dataclass(frozen=True, kw_only=True)
class BaseModelCase(LossCase):
    """Trains the model from whose weights all methods then start."""

    kind: ClassVar[str] = "pretrain"
    save_to: str
    """A safetensors file."""

    def measure(self, method: Method, device: torch.device, row: Row, report: Report) -> None:
        """Train and save."""
        from safetensors.torch import save_file

        super().measure(method, device, row, report)
        save_file({name: p.detach().cpu().contiguous() for name, p in method.model.named_parameters()}, self.save_to)


@torch.no_grad()
def evaluate(method: Method, data: Tensor, size: int, device: torch.device) -> float:
    """Mean next-token loss over rows of token ids."""
    method.model.eval()
    losses = [float(method.loss(part.to(device))) * len(part) for part in data.split(size)]
    method.model.train()
    return sum(losses) / len(data)

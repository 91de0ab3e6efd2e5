"""One run of an experiment: a model, a method, data; trained, evaluated, accounted for, in a process of its own.

Every method goes through the same loop, data order and evaluation, so that a table's rows differ in the method alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from misa_engine.bench.baselines import BASELINES, build
from misa_engine.bench.bases import cosine, digest_of
from misa_engine.bench.cases import Case, Report, Row
from misa_engine.bench.learning import bytes_of, evaluate, sampler_of
from misa_engine.bench.measure import memory_counters, synchronize
from misa_engine.bench.method import Method, Settings, Unavailable
from misa_engine.bench.reproduce.scoring import answer_judged, score_tasks
from misa_engine.bench.reproduce.sources import SOURCES, PlainWords, load_rows
from misa_engine.method.partition import partition
from misa_engine.planner.coverage import run_length

#: Tokens whose logits exist at a time.
CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class ReproduceCase(Case, Settings):
    """Train and measure one run."""

    kind: ClassVar[str] = "reproduce"
    experiment: str
    model: str
    """Of ``experiments.BASES``; what the table calls it."""
    label: str
    """Of the table's row."""
    method: str
    directory: str
    """Of the model; with ``from_scratch`` its configuration and tokenizer alone are read."""
    data: str
    source: str
    from_scratch: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration, with ``from_scratch``."""
    batch: int
    length: int
    steps: int = 0
    """0 counts them from ``epochs``."""
    epochs: float = 3.0
    warm_up: float = 0.0
    rows: int = 500
    """Held out, at most."""
    points: int = 20
    """Of the curve."""
    checkpointing: bool = True
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Metric -> task of ``misa eval``."""
    questions: int = 0
    """Of each task, at most; 0 is all."""
    beams: int = 0
    """Of generated answers; 0 is the protocol's own number."""
    answer_tokens: int = 0
    """Of generated answers, at most; 0 is the published code's."""
    evaluated: str = ""
    """The folder that gets the answers to the tasks."""
    new_tokens: int = 1024
    """Of an answer to MT-Bench, at most."""
    judged: str = ""
    """The file that gets answers to MT-Bench's questions; empty answers none."""

    def run(self, row: Row, report: Report) -> None:
        """Train, then the tasks."""
        if status := BASELINES[self.method].missing():
            raise Unavailable(status)
        device = torch.device(self.device)
        torch.manual_seed(self.seed)
        words = PlainWords(load_tokenizer(self.directory))
        model = load_model(self, device)
        amounts: dict[str, Any] = {"batch": self.batch, "length": self.length, "held_out": self.rows}
        data = load_rows(self.source, Path(self.data), words, seed=self.seed, **amounts)
        ours: Row = {"base_digest": digest_of(model), "data_digest": data.digest}
        ours["parameters"] = sum(p.numel() for p in model.parameters())
        row["reproduce"] = ours
        settings = fitted(self, model)
        ours["settings"] = asdict(settings)
        steps = run_length(data.count, self.batch, accumulation=self.accumulation, epochs=self.epochs,
            steps=self.steps or -1)  # fmt: skip
        loss = partial(labelled_loss, model, device)
        method = build(self.method, model, loss, settings)
        ours["trained_parameters"] = method.trainable_parameters
        self._train(method, data.train, data.held_out, steps, ours, partial(report, row))
        row |= memory_counters(device)
        measured: Row = {"heldout_loss": ours["curve"][-1]["heldout_loss"], "seconds": ours["curve"][-1]["seconds"]}
        measured["perplexity"] = math.exp(min(measured["heldout_loss"], 50.0))
        ours["metrics"] = measured
        report(row)
        if self.tasks or self.judged:
            method.model.eval()
        if self.tasks:
            scores, notes = score_tasks(method.model, words.tokenizer, self.tasks, Path(self.data),
                Path(self.evaluated), name=self.name, questions=self.questions, beams=self.beams,
                answer_tokens=self.answer_tokens)  # fmt: skip
            measured |= scores
            ours["notes"] = notes
        if self.judged:
            ours["judged"] = answer_judged(method.model, words, Path(self.data), Path(self.judged), self.name,
                new_tokens=self.new_tokens)  # fmt: skip

    def _train(
        self, method: Method, stream: Any, held_out: Tensor, steps: int, ours: Row, report: Callable[[], None]
    ) -> None:
        """All steps; ``ours`` gets the curve, with seconds of training steps alone, and bytes.

        Seconds are of the wall on a GPU; on a CPU they are CPU seconds of this process, as other work must not count.
        """
        device = torch.device(self.device)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        rates = [group["lr"] for group in method.optimizer.param_groups]
        every = max(1, steps // self.points)
        curve: list[Row] = [_point(0, 0.0, evaluate(method.model, method.loss, held_out))]
        ours["curve"] = curve
        seconds = 0.0
        for step in range(steps):
            for group, rate in zip(method.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate * cosine(step, steps, self.warm_up)
            micro_batches = list(islice(stream, self.accumulation))
            began = clock()
            loss = method.step(micro_batches)
            synchronize(device)
            seconds += clock() - began
            if not math.isfinite(float(loss)):
                raise FloatingPointError(f"the training loss is {float(loss)} at step {step + 1}")
            if (step + 1) % every == 0 or step + 1 == steps:
                curve.append(_point(step + 1, seconds, evaluate(method.model, method.loss, held_out)))
                report()
        ours["steps"], ours["tokens"] = steps, steps * self.accumulation * self.batch * self.length
        ours |= bytes_of(method)
        ours |= sampler_of(method)


def _point(step: int, seconds: float, loss: float) -> Row:
    return {"step": step, "seconds": round(seconds, 3), "heldout_loss": round(loss, 5)}


# ---- model ----


def load_tokenizer(directory: str) -> Any:
    """A model directory's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def load_model(case: ReproduceCase, device: torch.device) -> Any:
    """The base, bfloat16 on a GPU and float32 on a CPU, ready to train."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if case.from_scratch:
        stored = json.loads((Path(case.directory) / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**{**stored, **case.overrides})
        with device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=dtype, device_map={"": device})
    model.config.use_cache = False
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # with non-reentrant checkpointing nothing needs it
    return model.train()


def fitted(case: ReproduceCase, model: Any) -> Settings:
    """The case's settings; a δ below the largest unit's share is raised to it (coarse units, tiny models)."""
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: getattr(case, name) for name in names})
    options = case.misa
    parts = partition(model, options.get("granularity", "module"), always_train=tuple(options.get("always_train", ())))
    least = max(unit.numel for unit in parts.units) + 1
    return replace(settings, delta=max(settings.delta, least / parts.total))


def labelled_loss(model: Any, device: torch.device, pair: Tensor) -> Tensor:
    """Mean loss of the labelled tokens; logits of ``CHUNK`` tokens exist at a time.

    Args:
        model: a causal language model of transformers without soft-capped logits.
        device: of the model.
        pair: (batch, 2, length) ids and labels, IGNORED where nothing is to be learnt; columns after the last label
            are left out.
    """
    wanted = pair[:, 1] >= 0
    pair = pair[:, :, : int(wanted.any(0).nonzero().max()) + 1].to(device)
    ids, labels = pair[:, 0], pair[:, 1]
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels[:, 1:] >= 0
    hidden, targets = hidden[chosen], labels[:, 1:][chosen]

    def piece(part: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(head(part).float(), target, reduction="sum")

    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    losses = [checkpoint(piece, *one, use_reentrant=False, preserve_rng_state=False) for one in pieces]
    return torch.stack(losses).sum() / len(targets)


def steps_of(source: str, batch: int, accumulation: int, epochs: float, steps: int) -> int:
    """Optimizer steps of a run before any data is read, from the published number of records."""
    return run_length(SOURCES[source].records if source else 0, batch, accumulation=accumulation, epochs=epochs,
        steps=steps or -1)  # fmt: skip

"""The learning suite's case: one method at one learning rate and one seed on one task, from a pretrained base.

A row has the shape of peft's method comparison (``run_info``, ``train_info``, ``meta_info``) and our own ``learning``:
held-out loss, the loss on text of the base's own kind, answers, the curve, bytes, visits and entropy.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from misa_engine import MISA
from misa_engine.bench.baselines import BASELINES, build
from misa_engine.bench.bases import cosine, digest_of, load_base
from misa_engine.bench.cases import Case, Report, Row
from misa_engine.bench.learners import Learner, learner_of
from misa_engine.bench.measure import environment, memory_counters, resident_bytes, spread
from misa_engine.bench.method import Method, Settings, Unavailable
from misa_engine.bench.tasks import IGNORED, Task, load_task
from misa_engine.bench.words import Words
from misa_engine.bench.workload import batches
from misa_engine.evaluation.generation import generate
from misa_engine.evaluation.reasoning import ANSWER_TOKENS, final_number
from misa_engine.method.partition import partition

#: Rows of a batch of an evaluation.
EVALUATED = 8
#: Bytes a parameter of what MISA keeps of its active part: gradient and two moments; of an adapter: itself and these.
MISA_BYTES, ADAPTER_BYTES = 12, 16


@dataclass(frozen=True, kw_only=True)
class LearningCase(Case, Settings):
    """Train and evaluate. Without steps it measures the base itself, from which the others begin."""

    kind: ClassVar[str] = "learning"
    base: str
    """A recipe or a model directory."""
    work: str
    """The folder of recipes' weights and text."""
    task: str
    learner: str
    """A name of ``LEARNERS``, or options: ``misa:rest=sign:rest_lr=0.3``."""
    dtype: str = "float32"
    batch: int = 8
    length: int = 128
    steps: int = 200
    points: int = 4
    """Of the curve, beside the base's."""
    threads: int = 0
    """0 leaves torch's number."""
    rows: int = 64
    """Of each held-out text."""
    questions: int = 0

    def run(self, row: Row, report: Report) -> None:
        """Build, train with evaluations in between, evaluate."""
        if self.threads:
            torch.set_num_threads(self.threads)
        learner = learner_of(self.learner)
        if learner.method and (status := BASELINES[learner.method].missing()):
            raise Unavailable(status)
        started, created = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
        torch.manual_seed(self.seed)
        model, words = load_base(self.base, self.work, getattr(torch, self.dtype))
        amounts = {"length": self.length, "rows": self.rows, "questions": self.questions}
        task = load_task(self.task, words, self.work, seed=self.seed, **amounts)
        before = resident_bytes()
        ours: Row = {"task_digest": task.digest, "base_digest": digest_of(model)}
        ours["total_parameters"] = sum(p.numel() for p in model.parameters())
        row["learning"] = ours
        method = None
        loss = partial(labelled_loss, model)
        if learner.method:
            settings = settings_of(self, learner, model)
            method = build(learner.method, model, loss, settings)
            ours["settings"] = asdict(settings)
            model = method.model
            self._train(method, task, ours, partial(report, row))
        curve = ours.get("curve")
        ours["heldout_loss"] = curve[-1]["heldout_loss"] if curve else evaluate(model, loss, task.held_out)
        ours |= measure(model, loss, task, words)
        ours["seconds"] = ours.get("train_seconds", 0.0)
        row |= memory_counters(torch.device("cpu"))
        ours["resident_before_bytes"] = before
        row |= peft_shape(self, row, method, created, time.perf_counter() - started)

    def _train(self, method: Method, task: Task, ours: Row, report: Callable[[], None]) -> None:
        """All steps; ``ours`` gets the curve, training losses, times, bytes and what the sampler did.

        Times are CPU seconds of this process: a matrix runs for hours beside other work, which must not count.
        """
        device = torch.device("cpu")
        stream = batches(task.train, self.batch, device)
        rates = [group["lr"] for group in method.optimizer.param_groups]
        losses: list[float] = []
        times: list[float] = []
        ours |= {"curve": [], "train_loss": losses}
        every = max(1, self.steps // self.points)
        for step in range(self.steps):
            for group, rate in zip(method.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate * cosine(step, self.steps)
            ids = [next(stream)]
            began = time.process_time()
            loss = method.step(ids)
            times.append(time.process_time() - began)
            losses.append(round(float(loss), 5))
            if (step + 1) % every == 0 or step + 1 == self.steps:
                done = step + 1
                point: Row = {"step": done, "tokens": done * self.batch * self.length, "seconds": sum(times)}
                point["heldout_loss"] = evaluate(method.model, method.loss, task.held_out)
                ours["curve"].append(point)
                report()
        ours |= {"train_seconds": sum(times), "step_time_s": spread(times)}
        ours |= bytes_of(method)
        ours |= sampler_of(method)


# ---- the method ----


def settings_of(case: LearningCase, learner: Learner, model: nn.Module) -> Settings:
    """A case's settings with the learner's own, low ranks chosen by bytes.

    LoRA's rank is the least whose adapters, gradients and moments take as many bytes as MISA's gradients, moments and
    a rest rule's scratch, so that it is never short of memory beside MISA; GaLore's is a quarter of the width, as
    published.
    """
    names = ("lr", "delta", "inner_steps", "max_grad_norm", "seed")
    shared = {name: getattr(case, name) for name in names} | {"misa": dict(learner.misa)} | dict(learner.settings)
    parts = partition(model)
    inner = {name for unit in parts.units for name in unit.params}
    shapes = [p.shape for name, p in model.named_parameters() if name in inner and p.ndim == 2]
    each = sum(sum(shape) for shape in shapes)  # parameters of a rank-1 adapter of all of them
    budget = MISA_BYTES * shared["delta"] * parts.total + 4 * max(shape.numel() for shape in shapes)
    width = min(min(shape) for shape in shapes)
    shared |= {"lora_rank": math.ceil(budget / (ADAPTER_BYTES * each)), "galore_rank": max(1, width // 4)}
    return Settings(**shared)


def labelled_loss(model: Any, pair: Tensor) -> Tensor:
    """Mean loss of the labelled tokens of (batch, 2, length) ids and labels, without columns after the last label."""
    pair = pair[:, :, : int((pair[:, 1] != IGNORED).any(0).nonzero().max()) + 1]
    loss: Tensor = model(input_ids=pair[:, 0], labels=pair[:, 1], use_cache=False).loss
    return loss


def bytes_of(method: Method) -> Row:
    """What training holds beyond the base's weights: exact, by category, and their sum."""
    held = dict(method.optimizer_bytes())
    added = sum(p.nbytes for name, p in method.model.named_parameters() if "lora_" in name)
    if added:
        held["adapters"] = added
    return {"held_bytes": held, "total_held_bytes": sum(held.values())}


def sampler_of(method: Method) -> Row:
    """Visits a weight and the sampler's entropy, where there is one."""
    optimizer = method.optimizer
    if not isinstance(optimizer, MISA):
        return {}
    visits = [float(count) for count in optimizer.tracker.visits]
    found: Row = {
        "visits": spread(visits), "visits_least": min(visits), "visits_most": max(visits),
        "expected_visits": optimizer.config.delta * optimizer.total_steps / optimizer.config.inner_steps,
    }  # fmt: skip
    if optimizer.events:
        found["entropy_median"] = statistics.median(event.entropy for event in optimizer.events)
        found["rounds"] = len(optimizer.events)
    return found


# ---- evaluation ----


@torch.no_grad()
def evaluate(model: nn.Module, loss: Callable[[Tensor], Tensor], data: Tensor) -> float:
    """Mean loss over the labelled tokens of (n, 2, length)."""
    model.eval()
    total = counted = 0.0
    for part in data.split(EVALUATED):
        tokens = float((part[:, 1, 1:] >= 0).sum())
        total += float(loss(part)) * tokens
        counted += tokens
    model.train()
    return total / counted


def measure(model: Any, loss: Callable[[Tensor], Tensor], task: Task, words: Words) -> Row:
    """Loss on the base's own kind of text, and the share of problems solved."""
    found: Row = {"own_kind_loss": evaluate(model, loss, task.own_kind)}
    if task.questions:
        right = solved(model, words, task.questions)
        found |= {"accuracy": sum(right) / len(right), "questions": len(right)}
    return found


@torch.no_grad()
def solved(model: Any, words: Words, questions: list[tuple[list[int], str | None]]) -> list[bool]:
    """Which questions greedy generation ends with the right number, in order of the prompts' lengths."""
    model.eval()
    right = []
    questions = sorted(questions, key=lambda pair: len(pair[0]))
    for start in range(0, len(questions), EVALUATED):
        part = questions[start : start + EVALUATED]
        prompts = [prompt for prompt, _ in part]
        made = generate(model, prompts, end=words.end, pad=words.end, new_tokens=ANSWER_TOKENS)
        said = [final_number(words.decode(row)) for row in made]
        right += [one == answer for one, (_, answer) in zip(said, part, strict=True)]
    model.train()
    return right


# ---- peft's shape ----


def peft_shape(case: LearningCase, row: Row, method: Method | None, created: str, total: float) -> Row:
    """``run_info``, ``train_info`` and ``meta_info`` as peft's method comparison writes them.

    On a CPU its accelerator memory is None; ``learning.total_held_bytes`` is exact, ``peak_bytes`` the process's.
    """
    ours, where = row["learning"], environment(torch.device("cpu"))
    done: list[Row] = []
    for point in ours.get("curve", ()):
        losses = ours["train_loss"][done[-1]["step"] if done else 0 : point["step"]]
        one = {"step": point["step"], "train loss": statistics.fmean(losses), "train time": point["seconds"]}
        done.append(one | {"train samples": point["step"] * case.batch, "train total tokens": point["tokens"]})
    if done:
        done[-1] |= {"valid loss": ours["heldout_loss"], "test accuracy": ours.get("accuracy")}
    names = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    train = dict.fromkeys(names) | {"train_time": ours["seconds"], "status": "success", "metrics": done}
    train["num_total_params"] = ours["total_parameters"]
    train["num_trainable_params"] = method.trainable_parameters if method else 0
    train["file_size"] = ours.get("held_bytes", {}).get("adapters", 4 * ours["total_parameters"])
    config = {name: getattr(case, name) for name in ("task", "lr", "batch", "length", "steps", "seed", "dtype")}
    model = {"base": os.path.basename(case.base), "sha": ours["base_digest"]}
    return {
        "run_info": {
            "created_at": created, "total_time": total, "experiment_name": case.name, "train_config": config,
            "peft_config": ours.get("settings"), "error_msg": "",
        },
        "train_info": train,
        "meta_info": {
            "model_info": model, "dataset_info": {case.task: ours["task_digest"]}, "package_info": where["versions"],
            "system_info": {key: where.get(key) for key in ("hardware", "commit", "threads")},
        },
    }  # fmt: skip

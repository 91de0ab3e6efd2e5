"""What an evaluation of one model on one task is, and how several are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from misa_engine.evaluation.statistics import Estimate, Paired, estimate, paired

#: Protocol -> heading of its table. Numbers of two protocols are different quantities and share no table.
PROTOCOLS = {
    "adapters": "LLM-Adapters protocol: generated answers that match",
    "reasoning": "reasoning-gym: generated answers that match",
    "forgetting": "Forgetting: loss a token on a fixed text",
    "lm-eval": "lm-eval",
}
#: A mean of records and a task's own value that differ by more are different things: a perplexity has no items.
SAME = 1e-6
#: Metrics of which less is better.
LESS_IS_BETTER = frozenset(("loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"))


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric, whatever its filter, is the better one."""
    return metric.partition(",")[0] in LESS_IS_BETTER


@dataclass(frozen=True)
class Record:
    """One item of a task and what a model made of it."""

    id: str
    """The same for every model: pairs are made by it."""
    metrics: Mapping[str, float]
    """Name -> value: ``accuracy`` 0 or 1, ``loss`` nats a token."""
    weight: float = 1.0
    """Tokens of a text; 1 of a question."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """For the reader: prompt, target, generated text, extracted answer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """One model on one task."""

    task: str
    protocol: str
    """A key of PROTOCOLS."""
    model: str
    """Label."""
    path: str
    model_digest: str
    metrics: Mapping[str, Estimate]
    """The first is the one that the task is known by."""
    settings: Mapping[str, Any]
    """Prompt, generation, data with its digest: whatever the numbers depend on."""
    versions: Mapping[str, str]
    key: str
    """Of everything that decides the numbers; a result with the same key is not made again."""
    batch_size: int
    seconds: float
    records: tuple[Record, ...] = ()
    records_file: str = ""
    """Beside the result, one JSON record a line."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the records."""
        made = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "records"}
        return made | {"metrics": {name: one.to_dict() for name, one in self.metrics.items()}}


@dataclass(frozen=True)
class Comparison:
    """Two models on one metric of one task, item by item."""

    task: str
    protocol: str
    metric: str
    model: str
    against: str
    paired: Paired

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**{n: getattr(self, n) for n in ("task", "protocol", "metric", "model", "against")},
                **self.paired.to_dict()}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """All results of a call, the base's first where there is one."""

    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    """Every pair of models on every metric; against the base, or the first model, come first."""
    reference: str
    """Label of what differences in tables are against: the base, or the first model."""
    output: Path

    def of(self, model: str, task: str) -> Result:
        """One result.

        Raises:
            KeyError: it is not there.
        """
        for result in self.results:
            if (result.model, result.task) == (model, task):
                return result
        raise KeyError((model, task))

    def against_reference(self, model: str, task: str, metric: str) -> Paired | None:
        """What a model has more than the reference; None for the reference itself and where items differ."""
        for one in self.comparisons:
            if (one.model, one.task, one.metric, one.against) == (model, task, metric, self.reference):
                return one.paired
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: ``results.json``."""
        return {
            "kind": "evaluation",
            "reference": self.reference,
            "results": [result.to_dict() for result in self.results],
            "comparisons": [one.to_dict() for one in self.comparisons],
        }


def summarised(records: Sequence[Record]) -> dict[str, Estimate]:
    """Mean and standard error of each metric."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    made = {}
    for name in names:
        having = [record for record in records if name in record.metrics]
        made[name] = estimate([record.metrics[name] for record in having], [record.weight for record in having])
    return made


def compared(results: Sequence[Result], reference: str) -> tuple[Comparison, ...]:
    """Every pair of models on every task and metric that both have, on items of the same id and weight."""
    return tuple(sorted(_pairs(results, reference), key=lambda one: one.against != reference))


def _pairs(results: Sequence[Result], reference: str) -> Iterator[Comparison]:
    for one, other in combinations(results, 2):
        if one.task != other.task or one.model == other.model:
            continue
        first, second = (other, one) if one.model == reference else (one, other)
        for metric in first.metrics:
            found = pair(first, second, metric)
            if found is not None:
                yield Comparison(first.task, first.protocol, metric, first.model, second.model, found)


def pair(first: Result, second: Result, metric: str) -> Paired | None:
    """Item by item; None where no pairs exist.

    That is where the two have other items or other weights (tokens of another tokenizer), or the metric is no mean of
    its items.
    """
    ours = {record.id: record for record in first.records if metric in record.metrics}
    theirs = {record.id: record for record in second.records if metric in record.metrics}
    if not ours or ours.keys() != theirs.keys() or any(ours[id].weight != theirs[id].weight for id in ours):
        return None
    values = [[records[id].metrics[metric] for id in ours] for records in (ours, theirs)]
    weights = [record.weight for record in ours.values()]
    for result, one in zip((first, second), values, strict=True):
        if abs(estimate(one, weights).value - result.metrics[metric].value) > SAME:
            return None
    return paired(values[0], values[1], weights)

"""lm-eval's tasks by their names, through its Python API: what is measured and how is lm-eval's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

from misa_engine.errors import UserError
from misa_engine.evaluation import batch_size as sizes
from misa_engine.evaluation.local_data import DataSource
from misa_engine.evaluation.results import Record
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.statistics import Estimate
from misa_engine.evaluation.store import Progress
from misa_engine.evaluation.subjects import Subject
from misa_engine.evaluation.task import Outcome, Task, check_chat_templates

INSTALL = "lm-eval is not installed: pip install 'misa_engine[eval]'"
#: Requests of a task, the longest in characters, that are tokenised to size its batch.
LONGEST_TEXTS = 16
#: Draws for the standard errors of metrics that are no means; those of means have a formula.
BOOTSTRAPS = 1000


def installed() -> bool:
    """Whether lm-eval can be imported."""
    return find_spec("lm_eval") is not None


@cache
def manager() -> Any:
    """lm-eval's index of its tasks; reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR"))
    return TaskManager()


def members(name: str) -> list[str]:
    """The tasks of a tag, which have nothing in common but it; a task or group itself."""
    entry = manager().task_index[name]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


class HarnessTask(Task):
    """A task, group or tag of lm-eval."""

    protocol: ClassVar[str] = "lm-eval"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._source: DataSource | None = None
        self._tasks: dict[str, Any] = {}

    def _load(self, settings: Settings) -> DataSource:
        """The task's data, read once."""
        if self._source is None or self._source.data != settings.data:
            source = DataSource(settings.data)
            try:
                with source.in_place():
                    self._tasks = dict(manager().load([self.name])["tasks"])
            except UserError:
                raise
            except ModuleNotFoundError as error:  # some tasks need packages that lm-eval has as extras
                raise UserError(
                    f"{self.name} needs the package {error.name}, which is not installed: pip install {error.name} "
                    "(lm-eval's extras name all that a task needs: pip install 'lm_eval[ifeval,math]')"
                ) from error
            except Exception as error:  # a task's own code reads the records, and raises whatever they make it raise
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"lm-eval cannot make {self.name} of its data: {type(error).__name__}: {reason}. Do the files have "
                    "the hub's splits and columns?"
                ) from error
            self._source = source
        return self._source

    def check(self, subjects: Sequence[Subject], settings: Settings) -> None:
        """lm-eval and the data are there, and a chat template where one is used."""
        if not installed():
            raise UserError(f"{self.name}: {INSTALL}")
        self._load(settings)
        unsafe = [name for name, task in self._tasks.items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise UserError(
                f"{unsafe[0]} runs code that the model writes, which misa eval does not: use lm-eval itself."
            )
        if settings.prompt == "chat":
            check_chat_templates(self.name, subjects)

    def facts(self, settings: Settings) -> dict[str, Any]:
        """Versions of the tasks, few-shot examples, data."""
        data = dict(sorted(self._load(settings).used.items()))
        return {
            "prompt": "chat template" if settings.prompt == "chat" else "lm-eval's",
            "num_fewshot": settings.num_fewshot, "limit": settings.limit, "data": data,
            "task_versions": {name: task.VERSION for name, task in sorted(self._tasks.items())},
        }  # fmt: skip

    def run(self, subject: Subject, settings: Settings, progress: Progress) -> Outcome:
        """Evaluate; a batch that does not fit is halved and the task begun again."""
        lm = language_model(subject, settings.batch_size)
        while True:
            try:
                found = self._evaluate(lm, settings)
                break
            except (RuntimeError, MemoryError) as error:
                lm.most = sizes.smaller(lm.batch_size_per_gpu, error)
        for record in records_of(found["samples"]):
            progress.add(record)
        used = {name: found["n-shot"].get(name) for name in found["samples"]}
        return Outcome(lm.batch_size_per_gpu, {"n_shot": used}, metrics_of(found, self.name, len(progress.done)))

    def _evaluate(self, lm: Any, settings: Settings) -> Mapping[str, Any]:
        from lm_eval import simple_evaluate

        with self._load(settings).in_place():
            found = simple_evaluate(
                model=lm, tasks=[self.name], task_manager=manager(), limit=settings.limit, log_samples=True,
                num_fewshot=settings.num_fewshot, apply_chat_template=settings.prompt == "chat",
                fewshot_as_multiturn=settings.prompt == "chat", bootstrap_iters=BOOTSTRAPS,
            )  # fmt: skip
        assert found is not None  # None on other ranks than the first, and there is one
        return dict(found)


def language_model(subject: Subject, batch_size: int | None) -> Any:
    """lm-eval's ``HFLM`` around a model, whose batch is the planner's for the longest request of each task.

    Args:
        subject: the model.
        batch_size: instead of the planner's.

    Returns:
        An ``HFLM``; its attribute ``most`` bounds the batch.
    """
    from lm_eval.models.huggingface import HFLM

    class Planned(HFLM):
        """Sizes the batch before each kind of request: their lengths are not known earlier."""

        most = batch_size or sizes.MOST_ON_GPU

        def _plan(self, texts: Sequence[str], new_tokens: int = 0) -> None:
            longest = sorted(texts, key=len)[-LONGEST_TEXTS:]  # in characters; in tokens one of these
            tokens = max((len(self.tok_encode(text)) for text in longest), default=1) + new_tokens
            tokens = min(tokens, self.max_length)
            room = self.most
            if batch_size is None:
                room = sizes.batch_that_fits(subject.model, length=tokens, generates=new_tokens > 0)
            self.batch_size_per_gpu = max(1, min(self.most, room))

        def loglikelihood(self, requests: Any, **options: Any) -> Any:
            self._plan(["".join(request.args) for request in requests])
            return super().loglikelihood(requests, **options)

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
            self._plan([request.args[0] for request in requests])
            return super().loglikelihood_rolling(requests, **options)

        def generate_until(self, requests: Any, **options: Any) -> Any:
            new = max((request.args[1].get("max_gen_toks") or self.max_gen_toks for request in requests), default=1)
            self._plan([request.args[0] for request in requests], int(new))
            return super().generate_until(requests, **options)

    return Planned(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1, backend="causal")


def records_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Record]:
    """lm-eval's samples as records; metrics of several filters keep the filter's name (``exact_match,strict-match``).

    Args:
        samples: name of a task -> one entry for each document and filter.
    """
    made: dict[str, Record] = {}
    for task, entries in samples.items():
        for entry in entries:
            id = f"{task}/{entry['doc_id']}"
            found = {
                metric_name(name, entry.get("filter", "none")): float(entry[name])
                for name in entry.get("metrics", ())
                if isinstance(entry.get(name), (int, float))
            }
            before = made.get(id)
            said = {entry.get("filter", "none"): entry.get("filtered_resps")}
            detail = {
                "target": str(entry.get("target")),
                "answer": {**(before.detail["answer"] if before else {}), **said},
                "doc_hash": entry.get("doc_hash"),
            }
            made[id] = Record(id, {**(before.metrics if before else {}), **found}, detail=_plain(detail))
    return list(made.values())


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def metric_name(name: str, filter: str) -> str:
    """lm-eval's name of a metric without the filter that does nothing."""
    return name if filter == "none" else f"{name},{filter}"


def metrics_of(found: Mapping[str, Any], name: str, n: int) -> dict[str, Estimate]:
    """lm-eval's own values and standard errors of a task or group.

    Args:
        found: what ``simple_evaluate`` returned.
        name: of the task.
        n: records.
    """
    own = found.get("groups", {}).get(name) or found["results"].get(name) or {}
    made = {}
    for key, value in own.items():
        metric, _, filter = key.partition(",")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or metric.endswith("_stderr"):
            continue
        if metric in ("alias", "sample_len", "sample_count", " ") or not filter:
            continue
        error = own.get(f"{metric}_stderr,{filter}")
        error = float(error) if isinstance(error, (int, float)) else None
        made[metric_name(metric, filter)] = Estimate(float(value), error, n)
    return made

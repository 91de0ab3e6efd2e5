"""The paper's experiments as data: what is trained by what, on what, and what is measured. Imports no torch.

A recipe of ``misa train`` gives every setting that an entry does not change. ``runs_of`` multiplies models, entries and
seeds; ``TINY`` says what becomes of them at ``--scale tiny``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Base:
    """A model of the paper's."""

    hub: str
    planned: str = ""
    """Its name for the planner; empty where a recipe's ``config_overrides`` make it from scratch."""


BASES: dict[str, Base] = {
    "llama3-8b": Base("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
    "qwen2.5-7b": Base("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
    "llama2-7b": Base("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
    "mistral-7b": Base("mistralai/Mistral-7B-v0.1", "mistral-7b"),
    "tinyllama": Base("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tinyllama"),
    "llama-130m": Base("huggyllama/llama-7b"),
    "llama-350m": Base("huggyllama/llama-7b"),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of an experiment's table: a method and what it changes of the recipe."""

    label: str
    method: str = "misa"
    """Of ``bench.baselines``."""
    misa: Mapping[str, Any] = field(default_factory=dict)
    """Options of MisaConfig beside the recipe's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings: lr, delta, inner_steps, lora_rank, galore_rank, length."""
    source: str = ""
    """Of what it changes; empty where the recipe has it."""

    @property
    def of_the_paper(self) -> bool:
        """Whether the paper compares such a method: all but this engine's own defaults."""
        return self.misa.get("preset") != "engine"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ``misa reproduce NAME`` runs and shows."""

    title: str
    summary: str
    models: tuple[str, ...]
    recipe: str
    """Without its first word, ``paper`` or ``official``."""
    source: str
    """Of ``sources.SOURCES``; empty where no data is trained on."""
    entries: tuple[Entry, ...]
    metrics: tuple[str, ...]
    """Columns of the table; the first is what the experiment is about."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Measured after training: metric -> task of ``misa eval``."""
    tiny_tasks: Mapping[str, str] = field(default_factory=dict)
    """Which stand for some of them at scale tiny, where 57 subjects would take an hour; empty leaves one out."""
    judged: bool = False
    """MT-Bench's questions are answered into a file."""
    tiny_steps: int = 12


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of ``--list``: a model, an entry, a seed."""

    experiment: str
    model: str
    entry: Entry
    seed: int

    @property
    def name(self) -> str:
        """Unique in an experiment; what ``--runs`` matches."""
        return f"{self.model} {self.entry.label} seed {self.seed}"


#: Metrics of what ``misa eval`` calls ``adapters:NAME``.
MATH_TASKS = ("gsm8k", "svamp", "aqua", "mawps")
COMMONSENSE_TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa")
_KNOWN = "its own publication's setting, not the paper's"
_LORA = Entry(label="LoRA r 32", method="lora", settings={"lr": 1e-4, "lora_rank": 32},
    source="rank from the paper's search {8, 16, 32}; learning rate ours")  # fmt: skip
_LISA = Entry(label="LISA", method="lisa", source="its own publication's rule: two layers, embeddings and head; the "
    "published code's scripts/alpaca_lisa.sh trains one layer, in ascending order")  # fmt: skip
_BADAM = Entry(label="BAdam", method="badam", source="T and learning rate of the published code's "
    "scripts/alpaca_badam.sh; layers in random order, as BAdam itself")  # fmt: skip
_FINE_TUNING = (
    Entry(label="MISA δ 3%"),
    Entry(label="MISA δ 1%", settings={"delta": 0.01}, source="ours: shows what a third of the budget costs"),
    Entry(label="this engine δ 3%", misa={"preset": "engine"}, source="this engine's defaults"),
    _LORA,
    _LISA,
    _BADAM,
)
_PRETRAINING = (
    Entry(label="MISA"),
    Entry(label="this engine", misa={"preset": "engine", "eta": 1.0}, source="this engine's defaults"),
    Entry(
        label="Adam",
        method="adamw",
        settings={"max_grad_norm": 1.0},
        source="clipping of the published code's scripts/c4_adam.sh (350M)",
    ),
    Entry(
        label="GaLore",
        method="galore",
        settings={"lr": 1e-3, "galore_rank": 32},
        source="the published code's scripts/c4_Galore.sh (350M)",
    ),
    Entry(label="GaLore r 256", method="galore", settings={"lr": 1e-2, "galore_rank": 256}, source=_KNOWN),
)


def _generated(names: tuple[str, ...]) -> dict[str, str]:
    return {name: f"adapters:{name}" for name in names}


def _axis(name: str, option: str, values: Mapping[Any, str], own: bool = False) -> tuple[Entry, ...]:
    made = []
    for value, source in values.items():
        key = "misa" if own else "settings"
        more: dict[str, Any] = {key: {option: value}}
        made.append(Entry(label=f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}",
            source=source, **more))  # fmt: skip
    return tuple(made)


_RANGE = "the paper's search range"
_BRACKET = "ours: brackets the paper's value"

EXPERIMENTS: dict[str, Experiment] = {
    "math": Experiment(
        title="Math reasoning: MATH10K",
        summary="Fine-tuned on MATH10K, answers to GSM8K, SVAMP, AQuA and MAWPS generated and matched "
        "(LLM-Adapters' protocol; not comparable with log-likelihood accuracies).",
        models=("llama3-8b", "qwen2.5-7b"), recipe="llama3-8b-math", source="math10k", entries=_FINE_TUNING,
        metrics=("average", *MATH_TASKS, "heldout_loss"), tasks=_generated(MATH_TASKS),
    ),
    "commonsense": Experiment(
        title="Commonsense reasoning: commonsense_170k",
        summary="Fine-tuned on commonsense_170k, answers to eight sets generated and matched (LLM-Adapters' "
        "protocol; not comparable with log-likelihood accuracies).",
        models=("llama3-8b", "qwen2.5-7b"), recipe="llama3-8b-commonsense", source="commonsense170k",
        entries=_FINE_TUNING, metrics=("average", *COMMONSENSE_TASKS, "heldout_loss"),
        tasks=_generated(COMMONSENSE_TASKS),
        tiny_steps=8,
    ),
    "alpaca": Experiment(
        title="Instruction following: Alpaca-GPT4",
        summary="Fine-tuned on Alpaca-GPT4; MMLU, MMLU-Pro and IFEval by lm-eval, MT-Bench's questions answered into "
        "files for a judge of your choice.",
        models=("llama2-7b", "tinyllama", "mistral-7b"), recipe="llama2-7b-alpaca", source="alpaca",
        entries=_FINE_TUNING, metrics=("mmlu", "mmlu_pro", "ifeval", "heldout_loss"),
        tasks={"mmlu": "mmlu", "mmlu_pro": "mmlu_pro", "ifeval": "ifeval"},
        tiny_tasks={"mmlu": "mmlu_anatomy", "mmlu_pro": ""}, judged=True,  # 2,048 tokens an answer
    ),
    **{
        f"c4-{size}": Experiment(
            title=f"Pre-training: LLaMA-{size.upper()} on C4",
            summary="From random weights on streamed text; validation perplexity against Adam and GaLore.",
            models=(f"llama-{size}",), recipe=f"llama-{size}-c4", source="c4", entries=_PRETRAINING,
            metrics=("perplexity", "heldout_loss"), seeds=(0,), tiny_steps=24,
        )
        for size in ("130m", "350m")
    },
    "figure-3": Experiment(
        title="Figure 3: validation loss against wall-clock time",
        summary="The same data and steps for MISA, LISA and BAdam; validation loss against seconds of training steps. "
        "loss_at_time is the loss when the fastest of a model's runs has ended.",
        models=("mistral-7b", "llama2-7b", "tinyllama"), recipe="llama2-7b-alpaca", source="alpaca",
        entries=(Entry(label="MISA"), Entry(label="this engine", misa={"preset": "engine"},
            source="this engine's defaults"), _LISA, _BADAM),
        metrics=("loss_at_time", "heldout_loss", "seconds"), tiny_steps=16,
    ),
    "ablations": Experiment(
        title="Ablations: η, δ, T, rule, granularity",
        summary="One setting at a time is changed from the recipe (η 1, δ 3%, T 50, importance, module).",
        models=("tinyllama",), recipe="llama2-7b-alpaca", source="alpaca",
        entries=(
            Entry(label="recipe"),
            *_axis("η", "eta", {0.0: "uniform draws", 0.1: _RANGE, 0.5: _RANGE, 10.0: _BRACKET}, own=True),
            *_axis("δ", "delta", {0.01: _BRACKET, 0.1: _BRACKET}),
            *_axis("T", "inner_steps", {10: _BRACKET, 100: f"{_BRACKET}; BAdam's"}),
            *_axis("rule", "rule", {"uniform": "the paper's alternative", "top_k": "greedy, η → ∞"}, own=True),
            *_axis("granularity", "granularity", {"block": _BRACKET, "layer": "the paper's alternative"}, own=True),
        ),
        metrics=("heldout_loss", "seconds"),
    ),
    "memory": Experiment(
        title="Memory of one training step",
        summary="Bytes by the planner for an RTX 4090 and bytes measured where this runs, at the recipe's micro-batch "
        "and at 2,048 tokens.",
        models=("llama3-8b", "llama2-7b"), recipe="llama2-7b-alpaca", source="",
        entries=tuple(
            Entry(label=f"{one.label}, {length} tokens", method=one.method, misa=one.misa,
                settings={**one.settings, "length": length}, source=one.source)
            for length in (512, 2048)
            for one in (*_FINE_TUNING, Entry(label="AdamW", method="adamw"))
        ),
        metrics=("planned_bytes", "peak_bytes", "held_bytes"), seeds=(0,), tiny_steps=3,
    ),
}  # fmt: skip

#: What ``--scale tiny`` makes of a run: steps are the experiment's own, the rest is this.
TINY: dict[str, Any] = {
    "batch": 2, "accumulation": 1, "length": 320, "rows": 8, "points": 4, "questions": 2, "beams": 1, "new_tokens": 12,
    "answer_tokens": 24,
    "lr_factor": 20.0, "lr_most": 3e-3, "delta_factor": 5.0, "delta_most": 0.6, "inner_steps_divisor": 10,
    "seeds": 1, "models": 1,
}  # fmt: skip


def runs_of(name: str, pattern: str = "", scale: str = "paper") -> list[Run]:
    """The runs of an experiment, in the order in which they are run: seeds outermost.

    Args:
        name: of ``EXPERIMENTS``.
        pattern: part of a run's name, or a pattern with ``*``; empty is every run.
        scale: paper, or tiny, which has one seed and, as every model is the same toy there, one model.
    """
    tiny = scale == "tiny"
    made = _product(name, EXPERIMENTS[name], TINY["seeds"] if tiny else None, TINY["models"] if tiny else None)
    return [run for run in made if not pattern or pattern in run.name or fnmatch(run.name, pattern)]


def _product(name: str, experiment: Experiment, seeds: int | None, models: int | None) -> Iterator[Run]:
    for seed in experiment.seeds[:seeds]:
        for model in experiment.models[:models]:
            for entry in experiment.entries:
                yield Run(experiment=name, model=model, entry=entry, seed=seed)


@cache
def recipe_of(recipe: str, variant: str = "official") -> Mapping[str, Any]:
    """A packaged recipe as ``misa train`` reads it.

    Args:
        recipe: as ``Experiment.recipe``.
        variant: ``paper`` for Algorithm 1, ``official`` for the published code's sampler.
    """
    import yaml

    text = files("misa_engine").joinpath(f"recipes/{variant}-{recipe}.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Any] = yaml.safe_load(text)
    return found

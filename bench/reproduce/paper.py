"""What the paper reports, as far as it could be checked: each number and each claim with where it stands.

A number that is not here was not available when this was written; pages say "not transcribed" in its place. Nothing of
ours is in this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from misa_engine.bench.reproduce.experiments import COMMONSENSE_TASKS, MATH_TASKS

#: The paper: "MISA: Memory-Efficient LLMs Optimization with Module-wise Importance Sampling", NeurIPS 2025.
ARXIV = "arXiv 2511.00056"
TABLE_4 = f"{ARXIV}, Table 4"
UNNUMBERED = f"{ARXIV}, Section 4 (number of its table not checked)"
FIGURE_3 = f"{ARXIV}, Figure 3"


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A number of the paper's."""

    experiment: str
    model: str
    label: str
    """Of the row that it stands beside."""
    metric: str
    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An order of two rows that the paper states without a number that could be checked."""

    experiment: str
    model: str
    """Empty means every model of the experiment."""
    better: str
    """Label of the row that is said to be better."""
    worse: str
    metric: str
    source: str
    close: float = 0.0
    """Relative difference up to which the claim (``close to``) holds, too; 0 wants it better."""


def _math(model: str, numbers: tuple[float, ...]) -> tuple[Reported, ...]:
    metrics = ("gsm8k", "svamp", "aqua", "mawps", "average")
    return tuple(
        Reported(experiment="math", model=model, label="MISA δ 3%", metric=metric, value=value, source=TABLE_4)
        for metric, value in zip(metrics, numbers, strict=True)
    )


REPORTED: tuple[Reported, ...] = (
    *_math("llama3-8b", (71.3, 78.5, 51.2, 93.3, 73.6)),
    *_math("qwen2.5-7b", (81.0, 88.1, 66.1, 92.9, 82.0)),
    Reported(
        experiment="commonsense", model="llama3-8b", label="MISA δ 3%", metric="average", value=86.6,
        source=UNNUMBERED,
    ),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (
    *(
        Claim(experiment="c4-130m", model="", better="MISA", worse=other, metric="perplexity", source=UNNUMBERED)
        for other in ("GaLore", "Adam")
    ),
    Claim(experiment="c4-350m", model="", better="MISA", worse="GaLore", metric="perplexity", source=UNNUMBERED),
    Claim(
        experiment="c4-350m", model="", better="MISA", worse="Adam", metric="perplexity", source=UNNUMBERED, close=0.03
    ),
    *(
        Claim(experiment="figure-3", model="", better="MISA", worse=other, metric="loss_at_time", source=FIGURE_3)
        for other in ("LISA", "BAdam")
    ),
)

#: Metrics of which the paper has a table or figure with a number for each of its methods.
TABLED: dict[str, tuple[str, ...]] = {
    "math": ("average", *MATH_TASKS),
    "commonsense": ("average", *COMMONSENSE_TASKS),
    "alpaca": ("mmlu", "mmlu_pro"),
    "c4-130m": ("perplexity",),
    "c4-350m": ("perplexity",),
    "memory": ("peak_bytes",),
}

#: What the paper has and this file lacks, by experiment: said on each page.
MISSING: dict[str, str] = {
    "math": "Table 4's rows of the other methods and of the other δ are left out: they could not be checked.",
    "commonsense": "Only the average of MISA at δ 3% could be checked; the eight tasks' own accuracies are left out.",
    "alpaca": "The paper's MMLU, MMLU-Pro and MT-Bench tables could not be checked and are left out. MT-Bench scores "
    "depend on the judge: numbers of another judge do not compare.",
    "c4-130m": "The paper's perplexities could not be checked; only their order is compared.",
    "c4-350m": "The paper's perplexities could not be checked; only their order is compared.",
    "figure-3": "The figure has no table: only the order of its curves is compared.",
    "ablations": "The ablations stand in the paper's Appendix D; its numbers could not be checked and are left out.",
    "memory": "The paper's memory table could not be checked and is left out; the card, an RTX 4090, is the paper's.",
}


def reported(experiment: str, model: str, label: str, metric: str) -> Reported | None:
    """The paper's number for one cell; None where there is none."""
    cell = (experiment, model, label, metric)
    return next((one for one in REPORTED if (one.experiment, one.model, one.label, one.metric) == cell), None)

"""Who learns in the learning suite: a method of ``BASELINES`` with its settings, by name or by options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from misa_engine.bench.named import name_of, options_of
from misa_engine.errors import UserError, did_you_mean

#: Rest rules whose steps are as large as Adam's at the same rate.
STATELESS = ("sign", "row_norm", "sinkhorn")


@dataclass(frozen=True)
class Learner:
    """A row of the matrix."""

    method: str
    """Of ``BASELINES``; empty is the base itself."""
    rate: float = 1.0
    """Where its learning rates are tried, as a multiple of full AdamW's."""
    misa: Mapping[str, Any] = field(default_factory=dict)
    """Options of MisaConfig."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that differ from the matrix's."""


def _misa(rate: float = 3.0, **options: Any) -> Learner:
    # a preset's own cold start: what a short run pays for it is what is measured
    return Learner("misa", rate, {"cold_start": None, **options})


#: Every row is tried at as many learning rates, around ``rate`` times full AdamW's.
LEARNERS: dict[str, Learner] = {
    "base": Learner(""),
    "adamw": Learner("adamw"),
    "adamw8bit": Learner("adamw8bit"),
    "lora": Learner("lora", 3.0),
    "rslora": Learner("rslora", 3.0),
    "dora": Learner("dora", 3.0),
    "galore": Learner("galore", 3.0),
    "badam": Learner("badam", 3.0),
    "lisa": Learner("lisa", 3.0),
    "lisa-layers": Learner("lisa-layers", 3.0),
    "uniform": Learner("uniform", 3.0),
    "misa": _misa(),
    "misa-paper": _misa(1.0, preset="paper"),
    "misa-official": _misa(preset="official"),
    "misa-none": _misa(rest="none"),
    **{f"misa-{rule}-{rate}": _misa(rest=rule, rest_lr=rate) for rule in STATELESS for rate in (0.1, 0.3)},
    **{f"misa-{rule}-0.3-above": _misa(rest=rule, rest_lr=0.3, rest_scope="above") for rule in STATELESS[:2]},
    "misa-sgd": _misa(rest="sgd"),
}


def learner_of(text: str) -> Learner:
    """A learner by its name, or by name and options of MisaConfig: ``misa:rest=sign:rest_lr=0.3:delta=0.03``.

    ``residents=int8`` beside them lets what is not drawn rest in 8 bits, without a rest rule:
    ``misa-none:residents=int8``.

    Raises:
        UserError: unknown name or option, or a value that MisaConfig refuses.
    """
    name = name_of(text)
    if name not in LEARNERS:
        raise UserError(f"unknown method {name!r}.{did_you_mean(name, LEARNERS)} Known: {', '.join(LEARNERS)}.")
    learner = LEARNERS[name]
    options, shared = options_of(text, learner.method, learner.misa)
    return replace(learner, misa={**learner.misa, **options}, settings={**learner.settings, **shared})

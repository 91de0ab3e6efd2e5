"""What a run will take, computed before anything runs: VRAM by the planner, GPU-hours by counting arithmetic.

Nothing here is measured. Hours are the forward, backward and recomputation arithmetic of all training tokens at an
assumed speed; evaluation, loading and projections (GaLore's SVD) are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from misa_engine.bench.reproduce.building import settings_of
from misa_engine.bench.reproduce.cases import steps_of
from misa_engine.bench.reproduce.experiments import BASES, EXPERIMENTS, Run, recipe_of
from misa_engine.method.config import MisaConfig
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.worst_case import MetaModel

#: Floating-point operations a second assumed of an RTX 4090 in training; its bf16 peak is about twice that.
ASSUMED_FLOPS = 80e12
#: Methods of ``bench.baselines`` that train every matrix at each step.
FULL = ("adamw", "galore")
#: Methods that are this engine with whole layers -> layers, and whether embeddings and head train, too.
LAYERS = {"lisa": (2, True), "lisa-layers": (2, False), "badam": (1, False), "badam-like": (1, False)}


@dataclass(frozen=True)
class Cost:
    """Computed, not measured."""

    steps: int
    """Optimizer steps; 0 for a run that only measures memory."""
    tokens: int
    gpu_hours: float
    vram_bytes: int | None
    """None where the planner does not know the method."""
    how: str
    """What was planned, or why nothing was."""


def cost_of(run: Run, variant: str = "official", flops: float = ASSUMED_FLOPS) -> Cost:
    """Of a run at the paper's scale.

    Args:
        run: of an experiment.
        variant: the recipe's first word.
        flops: assumed operations a second.
    """
    settings, experiment = settings_of(run, "paper", variant), EXPERIMENTS[run.experiment]
    meta = meta_of(run.model, experiment.recipe)
    steps = steps_of(experiment.source, settings["batch"], settings["accumulation"], settings["epochs"],
        settings["steps"]) if experiment.source else experiment.tiny_steps + 1  # fmt: skip
    tokens = steps * settings["batch"] * settings["accumulation"] * settings["length"]
    misa = planned_config(run.entry.method, settings, meta)
    share = _trained_share(run.entry.method, misa)
    rests = misa is not None and misa.rest != "none"
    # 2 operations a weight and token: forward, gradient of the input, forward again, gradient of what trains
    passes = 2 + settings["checkpointing"] + (1.0 if rests else share)
    hours = 2 * parameters_of(meta) * tokens * passes / flops / 3600
    if misa is None:
        return Cost(steps, tokens, hours, None, f"the planner does not know {run.entry.method}")
    micro_batch = MicroBatch(settings["batch"], settings["length"], settings["checkpointing"], loss="chunked")
    vram, how = _planned_bytes(run.model, experiment.recipe, _frozen(misa), micro_batch)
    return Cost(steps, tokens, hours, vram, how)


def planned_config(method: str, settings: Mapping[str, Any], meta: MetaModel) -> MisaConfig | None:
    """The options of this engine that hold what a method holds; None for methods of other kinds."""
    if method in FULL[:1]:
        return MisaConfig(delta=1.0, rest="none", include_outside=True)
    if method in LAYERS:
        layers, outer = LAYERS[method]
        always = ("embed_tokens", "lm_head") if outer else ()
        plain = MisaConfig(granularity="layer", always_train=always, rest="none", delta=1.0)
        parts = meta.partition(plain)
        largest = sum(sorted(unit.numel for unit in parts.units)[-layers:])
        return plain.altered(delta=min(1.0, (largest + 1) / parts.total))
    if not method.startswith("misa"):
        return None
    options = {**settings["misa"], "delta": settings["delta"], "inner_steps": settings["inner_steps"]}
    misa = MisaConfig.from_dict({**options, "always_train": tuple(options.get("always_train", ()))})
    parts = meta.partition(misa)
    least = (max(unit.numel for unit in parts.units) + 1) / parts.total
    return misa.altered(delta=max(misa.delta, least))


def _trained_share(method: str, misa: MisaConfig | None) -> float:
    if method in FULL:
        return 1.0
    return misa.delta if misa is not None else 0.0


@cache
def meta_of(model: str, recipe: str) -> MetaModel:
    """A base without weights."""
    from transformers import AutoConfig

    from misa_engine.planner.cards import published_config

    base = BASES[model]
    if base.planned:
        return MetaModel(published_config(base.planned))
    overrides = recipe_of(recipe)["config_overrides"]
    own = {"vocab_size": 32000, "tie_word_embeddings": False}  # of the recipe's model
    return MetaModel(AutoConfig.for_model("llama", **own, **overrides))


def parameters_of(meta: MetaModel) -> int:
    """All parameters, tied ones once."""
    return meta.partition(MisaConfig()).total


@cache
def _planned_bytes(
    model: str, recipe: str, misa: tuple[tuple[str, Any], ...], micro_batch: MicroBatch
) -> tuple[int | None, str]:
    from misa_engine.planner.plan import plan

    config = MisaConfig.from_dict(dict(misa))
    try:
        found = plan(meta_of(model, recipe), misa=config, micro_batch=micro_batch)
    except ValueError as error:
        return None, f"no plan: {error}"
    return found.total_bytes, f"planned: {config.granularity} units, δ {config.delta:.3g}"


def _frozen(misa: MisaConfig) -> tuple[tuple[str, Any], ...]:
    """Options on which memory depends, as a key of a cache."""
    names = ("preset", "granularity", "always_train", "include_outside", "rest", "delta", "state_dtype")
    return tuple((name, getattr(misa, name)) for name in names)

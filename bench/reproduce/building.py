"""From a run of an experiment to the case that carries it out, at the paper's scale or at ``--scale tiny``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa_engine.bench.cases import Case
from misa_engine.bench.matrix import file_name
from misa_engine.bench.reproduce.cases import ReproduceCase
from misa_engine.bench.reproduce.experiments import BASES, EXPERIMENTS, TINY, Experiment, Run, recipe_of
from misa_engine.bench.reproduce.scoring import check_tasks
from misa_engine.bench.reproduce.sources import MT_BENCH, SOURCES, files_of
from misa_engine.bench.training import StepCase
from misa_engine.errors import UserError

#: Options of a recipe that are MisaConfig's and not of ``Settings``.
MISA = ("preset", "eta", "always_train")
#: Those of them that another preset does not take over.
OF_THE_PRESET = ("preset", "eta")
#: Seconds that a run may take, by scale.
TIMEOUT_S = {"paper": 14 * 86400.0, "tiny": 600.0}


@dataclass(frozen=True)
class Place:
    """Where an experiment runs and from what."""

    scale: str
    output: Path
    data: Path
    models: Path
    device: str
    variant: str = "official"
    """The recipe's first word: paper or official."""

    @property
    def work(self) -> Path:
        """Toys."""
        return self.output / "work"


def settings_of(run: Run, scale: str, variant: str) -> dict[str, Any]:
    """Everything that a run trains with: the recipe, the entry's changes, and what the scale makes of them."""
    experiment = EXPERIMENTS[run.experiment]
    recipe, entry = recipe_of(experiment.recipe, variant), run.entry
    found: dict[str, Any] = {
        "lr": recipe["learning_rate"], "delta": recipe["delta"], "inner_steps": recipe["inner_steps"],
        "max_grad_norm": recipe.get("max_grad_norm", 1.0) or None, "batch": recipe["per_device_train_batch_size"],
        "accumulation": recipe["gradient_accumulation_steps"], "length": recipe["max_length"],
        "warm_up": recipe.get("warmup_steps", 0.0), "steps": recipe.get("max_steps", 0),
        "epochs": float(recipe.get("num_train_epochs", 1)), "rows": recipe.get("max_eval_samples", 500),
        "checkpointing": recipe.get("gradient_checkpointing", True), "seed": run.seed,
    }  # fmt: skip
    found |= entry.settings
    names: tuple[str, ...] = MISA if entry.method.startswith("misa") else ()
    if entry.misa.get("preset") == "engine":
        names = tuple(name for name in names if name not in OF_THE_PRESET)
    found["misa"] = {name: recipe[name] for name in names if name in recipe} | dict(entry.misa)
    return found if scale == "paper" else _tiny(found, experiment)


def _tiny(found: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    small = {name: TINY[name] for name in ("batch", "accumulation", "rows")}
    small["length"] = TINY["length"]
    small["steps"] = experiment.tiny_steps
    small["lr"] = min(found["lr"] * TINY["lr_factor"], TINY["lr_most"])
    small["delta"] = min(found["delta"] * TINY["delta_factor"], TINY["delta_most"])
    small["inner_steps"] = max(1, found["inner_steps"] // TINY["inner_steps_divisor"])
    small |= {name: min(found[name], 8) for name in ("lora_rank", "galore_rank") if name in found}
    return {**found, **small, "checkpointing": False}


def case_of(run: Run, place: Place) -> Case:
    """The case of a run."""
    experiment, settings = EXPERIMENTS[run.experiment], settings_of(run, place.scale, place.variant)
    shared: dict[str, Any] = {
        "name": run.name, "device": place.device, "timeout_s": TIMEOUT_S[place.scale], "method": run.entry.method,
    }  # fmt: skip
    if not experiment.source:
        return _step_case(run, place, settings, shared)
    recipe = recipe_of(experiment.recipe, place.variant)
    tiny = place.scale == "tiny"
    tasks = {**experiment.tasks, **(experiment.tiny_tasks if tiny else {})}
    tasks = {metric: task for metric, task in tasks.items() if task}
    judged = place.output / "mt_bench" / file_name(run.name, ".jsonl")
    return ReproduceCase(
        **shared, **settings,
        experiment=run.experiment, model=run.model, label=run.entry.label, source=experiment.source,
        directory=str(model_directory(run.model, place)), data=str(data_folder(place)),
        from_scratch=bool(recipe.get("from_scratch")),
        overrides={} if tiny else dict(recipe.get("config_overrides", {})),
        points=TINY["points"] if tiny else 20, tasks=tasks,
        questions=TINY["questions"] if tiny else 0, beams=TINY["beams"] if tiny else 0,
        answer_tokens=TINY["answer_tokens"] if tiny else 0,
        evaluated=str(place.output / "evaluation"), new_tokens=TINY["new_tokens"] if tiny else 1024,
        judged=str(judged) if experiment.judged else "",
    )  # fmt: skip


def _step_case(run: Run, place: Place, settings: dict[str, Any], shared: dict[str, Any]) -> StepCase:
    """Memory is measured on the shape alone, with random weights and tokens."""
    tiny = place.scale == "tiny"
    kept = {name: settings[name] for name in ("lr", "delta", "inner_steps", "max_grad_norm", "batch", "length", "seed",
        "misa", "checkpointing", "lora_rank", "galore_rank") if name in settings}  # fmt: skip
    if tiny:
        kept["delta"] = max(kept["delta"], 0.1)  # the shape's largest matrix
    return StepCase(
        **shared, **kept, shape="tiny" if tiny else BASES[run.model].planned, loss="plain" if tiny else "lean",
        warm_up=1, steps=EXPERIMENTS[run.experiment].tiny_steps,
    )  # fmt: skip


def data_folder(place: Place) -> Path:
    """Of training files and tasks."""
    return place.work / "toys/data" if place.scale == "tiny" else place.data


def model_directory(model: str, place: Place) -> Path:
    """Of a base."""
    if place.scale == "tiny":
        return place.work / "toys/models/tiny"
    return place.models / BASES[model].hub.rpartition("/")[2]


def check_inputs(runs: list[Run], place: Place) -> None:
    """Refuse what is not there, before anything runs.

    Raises:
        UserError: data or a model is missing; the message is the command that gets it.
    """
    if place.scale == "tiny":
        return
    for name in dict.fromkeys(run.experiment for run in runs):
        experiment = EXPERIMENTS[name]
        if not experiment.source:
            return
        files_of(SOURCES[experiment.source], place.data, f"misa reproduce {name}")
        check_tasks(experiment.tasks.values(), place.data)
        if experiment.judged:
            files_of(MT_BENCH, place.data, f"misa reproduce {name}")
        for model in dict.fromkeys(run.model for run in runs):
            directory = model_directory(model, place)
            if not (directory / "config.json").is_file():
                scratch = recipe_of(experiment.recipe, place.variant).get("from_scratch")
                only = " --include '*.json' 'tokenizer*'" if scratch else ""
                raise UserError(
                    f"misa reproduce {name} needs the model {directory}, which is not there. Get it: "
                    f"hf download {BASES[model].hub}{only} --local-dir {directory}"
                )

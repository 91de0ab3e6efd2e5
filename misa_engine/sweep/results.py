"""What came of a study, as one document: results.json, from which page, table and best.yaml are made."""

from __future__ import annotations

import platform
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

from misa_engine.sweep.settings import Settings
from misa_engine.sweep.study import best_trial

if TYPE_CHECKING:
    import optuna

#: Fewer complete trials say nothing about what mattered.
LEAST_FOR_IMPORTANCE = 6
PACKAGES = ("misa_engine", "torch", "transformers", "trl", "optuna")


def collect(study: optuna.Study, settings: Settings, directory: str, command: str) -> dict[str, Any]:
    """Everything that the page says, in types that JSON has.

    Args:
        study: with or without complete trials.
        settings: of the study.
        directory: of the study, as the user named it.
        command: that was typed.
    """
    best = best_trial(study)
    shares, remark = importance(study)
    return {
        "version": 1,
        "objective": settings.objective.name,
        "direction": settings.objective.direction,
        "directory": directory,
        "command": command,
        "pruner": settings.pruner,
        "seed": settings.seed,
        "base": settings.base,
        "space": [{**space.to_dict(), "text": space.describe(), "source": space.source} for space in settings.space],
        "best": None if best is None else {"trial": best.number, "value": best.value, "values": dict(best.params)},
        "importance": shares,
        "importance_remark": remark,
        "trials": [_row(trial) for trial in study.get_trials(deepcopy=False)],
        "environment": {
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def importance(study: optuna.Study) -> tuple[dict[str, float], str]:
    """How much of the spread each setting explains (PED-ANOVA, sums to 1), and what to think of it.

    PED-ANOVA needs nothing but optuna; fANOVA would need scikit-learn.
    """
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < LEAST_FOR_IMPORTANCE:
        return {}, f"{len(complete)} complete trials; importance is computed from {LEAST_FOR_IMPORTANCE} on."
    if len({trial.value for trial in complete}) == 1:
        return {}, f"All {len(complete)} complete trials have the same result: nothing mattered."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # the better half against all: with a top tenth of some twenty trials two of them would decide
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=0.5, region_quantile=1.0, evaluate_on_local=True
        )
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    remark = f"PED-ANOVA over {len(complete)} complete trials: what sets the better half apart from the others."
    if len(complete) < 5 * len(shares):
        remark += f" Fewer than five a setting ({5 * len(shares)}): take the order as a hint."
    return {name: round(float(share), 4) for name, share in shares.items()}, remark


def _row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    state = trial.state.name.lower()
    return {
        "trial": trial.number,
        "state": {"fail": "failed"}.get(state, state),
        "value": trial.value if state == "complete" else None,
        "values": dict(trial.params),
        "losses": attributes.get("losses", []),
        "seconds": attributes.get("seconds"),
        "peak_memory_bytes": attributes.get("peak_memory_bytes"),
        "step_time_s": attributes.get("step_time_s"),
        "reason": attributes.get("reason"),
    }

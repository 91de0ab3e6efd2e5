"""The study: trials in a sqlite file, taken one by one under a lock, so that any number of processes may work at it.

    DIR/sweep.json            what it is about
    DIR/study.db              optuna's storage
    DIR/trials/0007/          run.yaml, output.txt, run/ (the output directory of misa train)
    DIR/index.html, results.md, results.json, best.yaml

Whoever runs a trial holds a lock in its folder, which dies with the process. A trial that is called running and whose
lock is free has been killed; the next process that looks marks it so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.errors import UserError
from misa_engine.sweep import trial as trials
from misa_engine.sweep.evaluating import evaluate
from misa_engine.sweep.settings import Settings
from misa_engine.trainer.run_lock import lock_run

if TYPE_CHECKING:
    import optuna

DATABASE = "study.db"
LOCK = "study.lock"
TRIALS = "trials"
NAME = "misa sweep"
KEEP = ("best", "all", "none")
#: So many trials refused as bad input, and none that trained: the fault is in what all of them share.
REFUSED_AT_MOST = 3
KILLED = "killed: the process that ran it is gone"


class Sweep:
    """One process's work at a study.

    Args:
        directory: of the study.
        settings: of the study.
        keep: whose weights stay: of the "best" trial, of "all", or of "none".
        launch: the command to which ``train --config FILE`` is added.
        stopped: says whether to end; a trial that runs is ended, marked and made up for by a later call.
        say: gets lines for the user.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        *,
        keep: str = "best",
        launch: Sequence[str] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ):
        self.directory, self.settings, self._keep, self._say = directory, settings, keep, say
        self._stopped = stopped
        self._launch = trials.launcher() if launch is None else launch
        with locked(directory):
            self.study = open_study(directory, settings)

    def work(self, wanted: int) -> None:
        """Run trials until the study has ``wanted``, those of other processes and those that failed included.

        Raises:
            UserError: the first trials were all refused as bad input.
        """
        while not self._stopped():
            with ExitStack() as held:
                with locked(self.directory):
                    for number in settle(self.study, self.directory):
                        self._say(f"trial {number}: {KILLED}")
                    if len(counted(self.study)) >= wanted:
                        return
                    # by number: several processes draw different trials, and one alone draws the same ones every time
                    self.study.sampler = sampler(self.settings.seed + len(self.study.trials))
                    trial = self.study.ask()
                    values = {space.name: space.suggest(trial) for space in self.settings.space}
                    folder = trial_folder(self.directory, trial.number)
                    held.enter_context(lock_run(folder))
                self._run(trial, values, folder)

    def _run(self, trial: optuna.Trial, values: dict[str, Any], folder: Path) -> None:
        shown = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        self._say(f"trial {trial.number}: {shown}")
        objective, reported = self.settings.objective, {0}

        def falls_behind(number: int, loss: float) -> bool:
            if number not in reported:
                reported.add(number)
                trial.report(objective.intermediate(loss), number)
            return trial.should_prune()

        try:
            outcome = trials.run_trial(folder, self.settings.options(values), falls_behind, self._launch, self._stopped)
            value = self._value(outcome, folder)
        except BaseException as error:
            self._tell(trial, trials.Outcome(trials.FAILED, reason=f"killed: by {type(error).__name__}"), None, folder)
            raise
        self._tell(trial, outcome, value, folder)

    def _value(self, outcome: trials.Outcome, folder: Path) -> float | None:
        """The objective of a trial that is complete; failures are noted in ``outcome``."""
        if outcome.state != trials.COMPLETE:
            return None
        if self.settings.objective.task is not None:
            base = self.settings.base.get("model_name_or_path")
            found = evaluate(
                folder / trials.RUN, self.settings.objective, folder, self._launch, self._stopped, base=base
            )
            if isinstance(found, float):
                return found
            outcome.state, outcome.reason = trials.FAILED, found
        elif outcome.loss is None:
            outcome.state, outcome.reason = trials.FAILED, "its log holds no held-out loss after step 0"
        return outcome.loss if outcome.state == trials.COMPLETE else None

    def _tell(self, trial: optuna.Trial, outcome: trials.Outcome, value: float | None, folder: Path) -> None:
        """Write down how a trial ended, say it, and delete weights that are not kept."""
        from optuna.trial import TrialState

        states = {trials.COMPLETE: TrialState.COMPLETE, trials.PRUNED: TrialState.PRUNED}
        trial.set_user_attr("seconds", round(outcome.seconds, 1))
        trial.set_user_attr("losses", [list(pair) for pair in outcome.losses])
        for name in ("peak_memory_bytes", "step_time_s"):
            if outcome.end.get(name):
                trial.set_user_attr(name, outcome.end[name])
        if outcome.reason is not None:
            trial.set_user_attr("reason", outcome.reason)
        if outcome.exit_code is not None:
            trial.set_user_attr("exit_code", outcome.exit_code)
        with locked(self.directory):
            self.study.tell(trial.number, value, state=states.get(outcome.state, TrialState.FAIL))
            best = best_trial(self.study)
            for finished in self.study.trials if self._keep != "all" else ():
                kept = self._keep == "best" and best is not None and finished.number == best.number
                if finished.state.is_finished() and not kept:
                    trials.tidy(trial_folder(self.directory, finished.number))
        if value is None:
            self._say(f"trial {trial.number}: {outcome.state}, {outcome.reason}")
            self._stop_if_all_are_refused(outcome)
            return
        assert best is not None
        self._say(
            f"trial {trial.number}: {value:.4f} ({outcome.seconds:.0f} s); best {best.value:.4f}, trial {best.number}"
        )

    def _stop_if_all_are_refused(self, outcome: trials.Outcome) -> None:
        ended = counted(self.study)
        refused = [trial for trial in ended if trial.user_attrs.get("exit_code") == 2]
        if len(refused) >= REFUSED_AT_MOST and len(refused) == len(ended):
            raise UserError(
                f"the first {len(refused)} trials were all refused by misa train; the last: {outcome.reason}"
            )


def open_study(directory: Path, settings: Settings) -> optuna.Study:
    """The study in ``directory``, made if it is not there. To be called while the directory is locked."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    path = (directory / DATABASE).resolve()
    fresh = not path.exists()
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path.as_posix()}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction=settings.objective.direction,
            sampler=sampler(settings.seed),
            pruner=_pruner(settings.pruner),
            load_if_exists=True,
        )
    except Exception as error:  # of sqlite, SQLAlchemy or optuna, whichever finds the damage first
        if fresh:
            raise
        raise UserError(f"{path} cannot be read ({error}): restore it, or begin another study.") from error
    if not study.trials and settings.start:
        study.enqueue_trial(settings.start)  # the configuration as it is; what it does not say is drawn
    return study


def sampler(seed: int) -> Any:
    """Tree-structured Parzen estimators, which take trials that are still running for bad ones."""
    import optuna

    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _pruner(name: str) -> Any:
    """Steps are evaluations, 1, 2, ...: trials of different batch sizes evaluate at the same shares of their runs."""
    import optuna

    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=10, reduction_factor=3)
    return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)


def counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that count: running, or ended by themselves. Killed ones are made up for."""
    from optuna.trial import TrialState

    return [
        trial
        for trial in study.trials
        if trial.state != TrialState.WAITING and not str(trial.user_attrs.get("reason", "")).startswith("killed: ")
    ]


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The complete trial with the best objective; None before there is one."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
    return min(complete, key=lambda trial: sign * float(trial.value or 0.0)) if complete else None


def settle(study: optuna.Study, directory: Path) -> list[int]:
    """Mark trials that are called running but run nowhere as failed; return their numbers.

    To be called while the directory is locked.
    """
    from optuna.trial import TrialState

    killed = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = trial_folder(directory, trial.number)
        try:
            with lock_run(folder):
                pass
        except UserError:  # it runs
            continue
        study._storage.set_trial_user_attr(trial._trial_id, "reason", KILLED)
        study.tell(trial.number, state=TrialState.FAIL)
        trials.tidy(folder)
        killed.append(trial.number)
    return killed


def trial_folder(directory: Path, number: int) -> Path:
    """Where a trial's files are."""
    return directory / TRIALS / f"{number:04}"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time: for taking trials, marking them and deleting weights, never while a trial runs."""
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time must see to it itself
        yield
        return
    with open(directory / LOCK, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file frees the lock


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

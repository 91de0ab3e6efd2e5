"""``misa sweep``: a search over settings of ``misa train`` with Optuna."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from misa_engine.cli.parsing import Parser, positive
from misa_engine.cli.signals import receiving
from misa_engine.errors import DONE, Stopped, UserError, did_you_mean
from misa_engine.files import check_place

if TYPE_CHECKING:
    from misa_engine.sweep.settings import Settings

USAGE = "misa sweep --config run.yaml --output DIR --trials N [--objective eval_loss|task:NAME] [--space ...] [options]"
DESCRIPTION = """\
Searches for settings of misa train. Each trial is a run in a process of its own; runs that fall behind on the held-out
data are ended. Say the same command again to go on, also after a kill, and in a second terminal to search with two
processes. Any option of misa train may follow (--dataset data.jsonl).

  --space learning_rate                the paper's range
  --space learning_rate=1e-6..1e-4     between the two (:log, :linear)
  --space delta=0.01,0.03,0.1          one of these
  --space batch=8,16,32                sequences of an optimizer step
  --space ranges.yaml                  lines of that kind (learning_rate: 1e-6..1e-4)

without --space: learning_rate, eta, delta, inner_steps and batch over the paper's ranges."""


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    parser = Parser("misa sweep", USAGE, DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", help="YAML file or recipe of misa train: what all trials share")
    parser.add_argument("--output", metavar="DIR", help="the study: new, or one to go on with")
    parser.add_argument("--trials", type=positive, help="of the study in all, those of other processes included")
    parser.add_argument("--objective", default="eval_loss", help="eval_loss (default), or task:NAME of misa eval")
    parser.add_argument("--task_data", metavar="DIR", help="local data of the task, as misa eval --data takes it")
    parser.add_argument("--task_limit", type=positive, metavar="N", help="items of the task at most")
    parser.add_argument("--space", action="append", default=[], help="what is searched; may be said several times")
    parser.add_argument("--pruner", default="median", help="median (default), hyperband, or none")
    parser.add_argument("--seed_of_search", type=int, default=0, help="of the values drawn (default: 0)")
    parser.add_argument("--keep", default="best", help="whose weights stay: best (default), all, none")
    given, rest = parser.parse_known_args(words)
    _check(given, rest)
    own = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
    settings_flags = _train_flags(rest, own)
    from misa_engine.sweep.objective import check_evaluable, parse_objective
    from misa_engine.sweep.settings import Settings

    settings = Settings.of(
        given.config,
        settings_flags,
        given.space,
        parse_objective(given.objective, given.task_data, given.task_limit),
        pruner=given.pruner,
        seed=given.seed_of_search,
    )
    check_evaluable(settings.objective, settings.base)
    typed = shlex.join(["misa", "sweep", *words])
    return sweep(settings, Path(given.output).expanduser(), given.trials, keep=given.keep, typed=typed)


def sweep(
    settings: Settings,
    directory: Path,
    wanted: int,
    *,
    keep: str = "best",
    typed: str = "",
    launch: Sequence[str] | None = None,
) -> int:
    """Run trials until the study has ``wanted``, and write its results; returns the exit code.

    Args:
        settings: of the study.
        directory: of the study, new or to go on with.
        wanted: trials in all.
        keep: whose weights stay: best, all, none.
        typed: the command, for the page.
        launch: the command to which ``train --config FILE`` is added; misa's own unless given.

    Raises:
        UserError: the directory holds something else, or all first trials were refused.
        Stopped: a signal came; results so far are written, the trial that ran is marked.
    """
    from misa_engine.sweep.page import write_results
    from misa_engine.sweep.results import collect
    from misa_engine.sweep.settings import SETTINGS, store
    from misa_engine.sweep.study import DATABASE, Sweep, counted, locked

    check_place(directory, "--output")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / SETTINGS).is_file():
        if (directory / DATABASE).is_file():
            raise UserError(f"--output {directory}: {SETTINGS} is missing beside {DATABASE}: restore it.")
        raise UserError(f"--output {directory} holds something that is no study: choose another directory.")
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        store(settings, directory)
    for space in settings.space:
        print(f"searches {space.describe()}   ({space.source})", flush=True)
    stop = _Stop()
    found = Sweep(
        directory,
        settings,
        keep=keep,
        launch=launch,
        stopped=lambda: stop.received is not None,
        say=lambda line: print(line, flush=True),
    )
    before = len(counted(found.study))
    if before:
        print(f"the study in {directory} goes on: {before} of {wanted} trials are there", flush=True)
    try:
        with receiving(stop.receive):
            found.work(wanted)
    finally:
        with locked(directory):
            document = collect(found.study, settings, str(directory), typed)
            written = write_results(document, settings, directory)
    best = document["best"]
    if best is None:
        print("no trial is complete: see the reasons in the table")
    for path in written:
        print(f"{'best settings' if path.suffix == '.yaml' else 'results'}  {path}")
    if stop.received is not None:
        raise stop.stopped()
    return DONE


def _check(given: argparse.Namespace, rest: list[str]) -> None:
    from misa_engine.sweep.study import KEEP

    for name in ("output", "trials"):
        if getattr(given, name) is None:
            raise UserError(f"misa sweep needs --{name}. {USAGE}")
    if given.keep not in KEEP:
        raise UserError(f"--keep {given.keep}: known are {', '.join(KEEP)}.{did_you_mean(given.keep, KEEP)}")
    if given.config is None and not rest:
        raise UserError(f"misa sweep needs --config, or options of misa train. {USAGE}")
    missing = [package for package in ("optuna", "trl") if find_spec(package) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed: pip install 'misa_engine[sweep]'")


def _train_flags(rest: list[str], own: Sequence[str]) -> list[str]:
    """Options of misa train; a misspelt option of ours is named as such."""
    from misa_engine.cli.arguments import build_parser

    flags = {flag.lstrip("-") for action in build_parser()._actions for flag in action.option_strings}
    for word in rest:
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("--") and name.replace("-", "_") not in flags and name not in flags:
            hint = did_you_mean(name, [*own, *flags], "--")
            raise UserError(f"misa sweep: neither it nor misa train has an option --{name}.{hint}")
    if rest and rest[0] == "--":
        return rest[1:]
    return rest


class _Stop:
    """SIGINT, SIGTERM and SIGHUP end the sweep in good order: no exception flies through a write to the study."""

    received: int | None = None
    """The signal; None while none has come."""

    def stopped(self) -> Stopped:
        """What to raise at the end."""
        assert self.received is not None
        return Stopped(f"stopped by {signal.Signals(self.received).name}; the same command goes on", self.received)

    def receive(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        if self.received is not None:  # asked twice: what is being written is settled by the next call
            raise self.stopped()
        self.received = number

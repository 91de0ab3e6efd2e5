"""What a study is about: the runs' options, the space, the objective. Written once, compared whenever it goes on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misa_engine.cli.arguments import TrainArguments, build_parser, parse_tokens, parse_train, read_config
from misa_engine.cli.early_checks import check_early
from misa_engine.cli.evaluation_data import EVAL_DATA
from misa_engine.cli.loading import check_model_directory
from misa_engine.cli.parsing import plain
from misa_engine.errors import UserError, did_you_mean
from misa_engine.files import write_whole
from misa_engine.sweep.objective import LOSS, Objective
from misa_engine.sweep.space import BATCH, BATCH_PARTS, Dimension, parse_space, settings_of
from misa_engine.sweep.trial import write_config

#: In the study's directory.
SETTINGS = "sweep.json"
PRUNERS = ("median", "hyperband", "none")
#: Of every trial unless given: it is ended or deleted, so it needs no checkpoints.
TRIAL_DEFAULTS: dict[str, Any] = {"save_strategy": "no"}


@dataclass(frozen=True)
class Settings:
    """Of one study; the same for all processes that work at it."""

    base: dict[str, Any]
    """Options of misa train that all trials share."""
    space: tuple[Dimension, ...]
    objective: Objective
    micro_batch: int
    start: dict[str, Any] = field(default_factory=dict)
    """The base's own values where the space holds them: the first trial."""
    pruner: str = "median"
    seed: int = 0

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Options of misa train for one trial."""
        return {**self.base, **settings_of(values, self.micro_batch)}

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "version": 1,
            "base": self.base,
            "space": [space.to_dict() for space in self.space],
            "objective": self.objective.to_dict(),
            "micro_batch": self.micro_batch,
            "start": self.start,
            "pruner": self.pruner,
            "seed": self.seed,
        }

    @classmethod
    def of(
        cls,
        config: str | None,
        flags: Sequence[str],
        spaces: Sequence[str],
        objective: Objective,
        *,
        pruner: str = "median",
        seed: int = 0,
    ) -> Settings:
        """From the command line, with every value of the space tried on misa train's own parser.

        Args:
            config: YAML file or recipe of misa train.
            flags: more options of misa train.
            spaces: of ``--space``.
            objective: what is compared.
            pruner: one of ``PRUNERS``.
            seed: of the search.

        Raises:
            UserError: naming what misa train would not take, what is not there, or what a search cannot do with it.
        """
        if pruner not in PRUNERS:
            raise UserError(f"--pruner {pruner}: known are {', '.join(PRUNERS)}.{did_you_mean(pruner, PRUNERS)}")
        parser = build_parser()
        known = {action.dest for action in parser._actions if action.dest != "help"}
        base = {**TRIAL_DEFAULTS, **(read_config(config) if config else {}), **parse_tokens(parser, flags)}
        base = {name: plain(value) for name, value in base.items() if name != "output_dir"}
        parsed = _parse(base, {})
        _check_base(parsed, base)
        micro_batch = int(parsed.sft.per_device_train_batch_size)
        held_out = any(base.get(name) for name in EVAL_DATA)
        if objective.task is None and not held_out:
            raise UserError(
                f"--objective {LOSS} compares held-out losses, and the configuration has no evaluation data: add "
                "--eval_fraction 0.05 (or --eval_dataset FILE)."
            )
        space = parse_space(spaces, known, micro_batch)
        for place in space:
            if place.name in BATCH_PARTS and any(other.name == BATCH for other in space):
                raise UserError(f"--space: {BATCH} is made with {place.name}; search one of them.")
            for value in place.ends:
                _parse(base, settings_of({place.name: value}, micro_batch), place.name)
        check_early(parsed)
        check_model_directory(str(parsed.model.model_name_or_path), weights=not parsed.model.from_scratch)
        now = {place.name: _value(parsed, place.name) for place in space}
        start = {place.name: now[place.name] for place in space if place.contains(now[place.name])}
        return cls(base, space, objective, micro_batch, start, pruner, seed)


def store(settings: Settings, directory: Path) -> None:
    """Write the settings of a new study, or compare them with those of the study that is there.

    Raises:
        UserError: the directory holds something else, or a study of other settings; the first difference is named.
    """
    path, wanted = directory / SETTINGS, settings.to_dict()
    if not path.is_file():
        write_whole(path, json.dumps(wanted, indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        difference = _difference(found, json.loads(json.dumps(wanted)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or begin another study.") from error
    if difference is not None:
        raise UserError(
            f"--output {directory} holds a study of other settings ({difference}), and results of the two cannot be "
            "compared: give the same settings, or choose another directory."
        )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    for key in ("version", "objective", "pruner", "seed", "micro_batch"):
        if found[key] != wanted[key]:
            return f"{key} {found[key]}, now {wanted[key]}"
    for key in sorted({*found["base"], *wanted["base"]}):
        if found["base"].get(key) != wanted["base"].get(key):
            return f"{key} {found['base'].get(key)!r}, now {wanted['base'].get(key)!r}"
    before = {space["name"]: Dimension(**{**space, "choices": tuple(space["choices"])}) for space in found["space"]}
    now = {space["name"]: Dimension(**{**space, "choices": tuple(space["choices"])}) for space in wanted["space"]}
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            shown = [spaces[name].describe() if name in spaces else f"no {name}" for spaces in (before, now)]
            return f"{shown[0]}, now {shown[1]}"
    return None


def _check_base(parsed: TrainArguments, base: Mapping[str, Any]) -> None:
    for name, value in (("model", parsed.model.model_name_or_path), ("dataset", parsed.data.dataset)):
        if not value:
            raise UserError(f"misa sweep needs '{name}:' in --config, or --{name}: the trials are runs of misa train.")
    for name in ("resume_from_checkpoint", "dry_run", "overwrite_output_dir"):
        if base.get(name):
            raise UserError(f"--{name} is about one run; a trial is a run of its own each. Leave it out.")


def _parse(base: Mapping[str, Any], more: Mapping[str, Any], name: str | None = None) -> TrainArguments:
    """What misa train makes of the options; UserErrors name the option of the space that is to blame."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "trial.yaml")
        write_config(file, {**base, **more, "output_dir": place})
        try:
            return parse_train([], str(file))
        except UserError as error:
            reason = str(error).replace(f"{file}: ", "")
            raise UserError(f"--space {name}: {reason}" if name else reason) from None


def _value(parsed: TrainArguments, name: str) -> Any:
    if name == BATCH:
        return parsed.sft.per_device_train_batch_size * parsed.sft.gradient_accumulation_steps
    for part in (parsed.misa, parsed.sft, parsed.run, parsed.data, parsed.model):
        if hasattr(part, name):
            return plain(getattr(part, name))
    return None

"""``--resume_from_checkpoint``: which checkpoint a run goes on from, with which options, whether it is finished."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.output_directory import has_only_begun, holds_run
from misa_engine.errors import UserError, bad_input
from misa_engine.method.config import MisaConfig
from misa_engine.report.log import LOG_NAME, RunLog
from misa_engine.trainer.compat import shared_options
from misa_engine.trainer.completeness import (
    STATE_NAME,
    checkpoint_step,
    find_resume_point,
    list_checkpoints,
    weight_files,
    why_incomplete,
)
from misa_engine.trainer.manifest import MANIFEST, has_manifest, why_damaged
from misa_engine.trainer.resume_options import BATCH, read_options

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


def resume_point(wanted: str | None, out: Path) -> Path | None:
    """The checkpoint to go on from: the last whole one in ``out``, or a named one; None to start anew.

    Says which checkpoints were passed over, and why.

    Raises:
        UserError: a named checkpoint is damaged or of another run, or none of several is whole.
    """
    if wanted is None or wanted.lower() in ("false", "no", "none", "0", ""):
        return None
    if wanted.lower() in ("true", "yes", "1"):
        checkpoint, lines = find_resume_point(out)
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
        if checkpoint is None and list_checkpoints(out):
            raise UserError(
                f"--resume_from_checkpoint: none of the checkpoints in {out} is whole ({'; '.join(lines)}). Restore "
                "the files named, or start a new run in another directory."
            )
        if checkpoint is None:
            if not has_only_begun(out):
                raise UserError(
                    f"--resume_from_checkpoint: there is no complete checkpoint in {out}. Start the run again without "
                    "this option."
                )
            print(f"the run in {out} ended before its first checkpoint: it starts anew", flush=True)
            return None
    else:
        checkpoint = Path(wanted).expanduser()
        reason = why_incomplete(checkpoint) or why_damaged(checkpoint)
        if reason is not None:
            last, _ = find_resume_point(out)
            remedy = f" The last whole one is {last}." if last is not None else ""
            raise UserError(f"--resume_from_checkpoint {wanted}: {reason}.{remedy}")
        if checkpoint.resolve().parent != out.resolve() and out.is_dir() and holds_run(out):
            raise UserError(f"{checkpoint} does not belong to the run in --output_dir {out}: choose an empty one.")
    if not has_manifest(checkpoint):
        print(f"{checkpoint.name} has no {MANIFEST}: its files are taken as they are, unverified", flush=True)
    return checkpoint


def adopt(arguments: TrainArguments, checkpoint: Path) -> TrainArguments:
    """What the command does not say is as the run was started: its batch, schedule, seed and MISA's options.

    Args:
        arguments: of this command; its SFTConfig is changed in place.
        checkpoint: that the run goes on from.

    Raises:
        UserError: the checkpoint's record of its options is damaged.
    """
    with bad_input("--resume_from_checkpoint"):
        stored = read_options(checkpoint)
    if stored is None:
        return arguments
    sft, given = arguments.sft, arguments.given
    taken = {**stored["free"], **{name: stored["batch"][name] for name in BATCH}, **stored["fixed"]}
    taken = {name: value for name, value in taken.items() if hasattr(sft, name) and name not in given}
    if "max_steps" in given or "num_train_epochs" in given:  # one of them says how long, not both
        taken = {name: value for name, value in taken.items() if name not in ("max_steps", "num_train_epochs")}
    for name, value in taken.items():
        if value is not None:
            setattr(sft, name, type(getattr(sft, name))(value) if name == "lr_scheduler_type" else value)
    known = {entry.name for entry in fields(MisaConfig)}
    options = {name: value for name, value in stored["misa"].items() if name in known}
    options |= {name: getattr(arguments.misa, name) for name in known & given}
    with bad_input("--resume_from_checkpoint"):
        misa = MisaConfig.from_dict({**options, **shared_options(sft)})
    run = arguments.run
    if "optimizer" not in given:
        run = replace(run, optimizer=stored["fixed"]["optimizer"])
    model = arguments.model
    if "residents" not in given:
        model = replace(model, residents=stored["free"].get("residents"))
    return replace(arguments, run=run, model=model, misa=misa, given=given | set(taken) | set(options))


def finished_at(checkpoint: Path, out: Path, arguments: TrainArguments) -> int | None:
    """The last step of a run that is complete, model and all, under the options of this command; else None."""
    state: dict[str, Any] = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    step, most = checkpoint_step(checkpoint), state.get("max_steps")
    sft = arguments.sft
    if sft.max_steps > 0:
        most = sft.max_steps
    elif sft.num_train_epochs > (state.get("num_train_epochs") or 0):
        return None
    if not isinstance(most, int) or not 0 < most <= step or not (out / LOG_NAME).is_file():
        return None
    if not (out / "config.json").is_file() or not weight_files(out):
        return None
    ended = any(entry["type"] == "end" and entry["step"] >= step for entry in RunLog.read(out))
    return step if ended else None

"""``misa train``: check everything, train, save, show what happened.

What can be wrong with the input is looked at before the output directory is touched, cheapest first: required options,
directory, model configuration, data, weights, budget and patterns, then the tokenized samples.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from misa_engine.cli import loading, output_directory
from misa_engine.cli.command_trainer import build_trainer
from misa_engine.cli.early_checks import check_early
from misa_engine.cli.embeddings import resize
from misa_engine.cli.model_card import write_card
from misa_engine.cli.preview import coverage_of, preview, preview_adamw
from misa_engine.cli.report import show_table, write_pictures
from misa_engine.cli.residents import for_residents, load_resting
from misa_engine.cli.resume import adopt, finished_at, resume_point
from misa_engine.cli.sharded import for_rows, load_rows, sharding_of
from misa_engine.cli.training_data import load_training_data
from misa_engine.errors import DONE, UserError, bad_input
from misa_engine.files import check_place
from misa_engine.trainer.checkpoints import recover
from misa_engine.trainer.compat import checkpointing_option
from misa_engine.trainer.completeness import checkpoint_step
from misa_engine.trainer.run_lock import lock_run

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments
    from misa_engine.planner.plan import Plan


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    from misa_engine.cli import arguments
    from misa_engine.cli import help as train_help

    switches, options = _front_options(words)
    if switches.help:
        print(train_help.help_text())
        return DONE
    if switches.help_all:
        print(train_help.all_options())
        return DONE
    if switches.demo:
        return _demo(options)
    if find_spec("trl") is None:
        raise UserError("trl is not installed: pip install 'misa_engine[train]'")
    return train(arguments.parse_train(options, switches.config), switches.config)


def _front_options(words: list[str]) -> tuple[Any, list[str]]:
    """The few options that are not part of a run's configuration."""
    from misa_engine.cli.parsing import Parser

    parser = Parser("misa train", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help_all", action="store_true")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--config")
    return parser.parse_known_args(words)


def _demo(options: list[str]) -> int:
    place = {}
    if options:
        if options[0].split("=")[0] not in ("--output_dir", "--output-dir") or len(options) > 2:
            raise UserError(f"--demo takes --output_dir OUT and nothing else; got {' '.join(options)}")
        place["output_dir"] = options[0].partition("=")[2] or (options[1] if len(options) == 2 else "")
        if not place["output_dir"]:
            raise UserError("--output_dir needs a directory")
    from misa_engine.cli.arguments import set_environment

    set_environment({})
    from misa_engine.cli.demo import run_demo

    return run_demo(**place)


# ---- one run ----


def train(arguments: TrainArguments, config: str | None = None) -> int:
    """One training run, from parsed options to the saved model and its report."""
    quiet(arguments)
    from misa_engine.cli.stopping import take_over

    take_over(arguments.sft)
    if arguments.sft.process_index:  # everything is said once, by rank 0
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            return _train_once(arguments, config)
    return _train_once(arguments, config)


def _train_once(arguments: TrainArguments, config: str | None) -> int:
    _check_required(arguments)
    sharding_of(arguments)
    if arguments.run.dry_run:
        inputs = _load_inputs(arguments)
        print(_describe(inputs, fresh=True), flush=True)
        with TemporaryDirectory() as nowhere:  # transformers' Trainer makes its output directory at once
            arguments.sft.output_dir = nowhere
            _show_coverage(_checked_trainer(inputs))
        print("dry run: nothing was trained, nothing was written")
        return DONE
    out = Path(str(arguments.sft.output_dir))
    first = arguments.sft.process_index == 0
    check_place(out)
    with lock_run(out) if first else nullcontext():
        with arguments.sft.main_process_first(local=False):
            arguments, checkpoint = _claim_directory(arguments, config, out)
        if checkpoint is not None:
            step = finished_at(checkpoint, out, arguments)
            if step is not None:
                print(f"the run in {out} is finished: {step} of {step} steps, model and all. Nothing was changed.")
                return DONE
            print(f"the run goes on from step {checkpoint_step(checkpoint)}, {checkpoint}", flush=True)
        inputs = _load_inputs(arguments)
        print(_describe(inputs, fresh=checkpoint is None), flush=True)
        trainer = _checked_trainer(inputs)
        _show_coverage(trainer)
        if arguments.run.overwrite_output_dir and checkpoint is None and first:
            deleted = output_directory.delete_run(out)
            if deleted:
                print(f"deleted the run in {out}: {', '.join(deleted)}")
        _train(trainer, checkpoint, out)
        _finish(trainer, inputs.eval_data is not None, out)
        if first:
            records = len(inputs.train_data) if hasattr(inputs.train_data, "__len__") else None
            write_card(inputs.arguments, out, records)
    return DONE


def _describe(inputs: Inputs, *, fresh: bool) -> str:
    from misa_engine.trainer.sharding import has_rows

    sft = inputs.arguments.sft
    if inputs.arguments.run.optimizer == "adamw":
        summary = preview_adamw(inputs.model)
    else:
        summary = preview(
            inputs.model,
            inputs.arguments.misa,
            fresh=fresh,
            checkpointing=bool(getattr(sft, checkpointing_option(sft))),
            accumulation=sft.gradient_accumulation_steps,
        )
    # records are counted when they have been tokenized: misa_engine.cli.data_report
    stream = "" if hasattr(inputs.train_data, "__len__") else "\n\ntraining data: a stream, not counted"
    device = sft.device
    place = "the CPU" if device.type == "cpu" else str(device)
    rows = f", one of {sft.world_size} processes that hold rows of the weights" if has_rows(inputs.model) else ""
    return f"{summary}{stream}\n\ntrains on {place}{rows}\n"


def _check_required(arguments: TrainArguments) -> None:
    required = {"model_name_or_path": arguments.model.model_name_or_path, "dataset": arguments.data.dataset}
    if not arguments.run.dry_run:
        required["output_dir"] = arguments.sft.output_dir if "output_dir" in arguments.given else None
    for name, value in required.items():
        if not value:
            raise UserError(f"misa train needs --{name} (or '{name}:' in --config). Try misa train --demo first.")


def _claim_directory(arguments: TrainArguments, config: str | None, out: Path) -> tuple[TrainArguments, Path | None]:
    """Check that the run may write to ``out``; find the checkpoint that it goes on from, and with which options."""
    sft, overwrite = arguments.sft, arguments.run.overwrite_output_dir
    restored = recover(out) if sft.process_index == 0 else []
    checkpoint = resume_point(sft.resume_from_checkpoint, out)
    if restored and overwrite and checkpoint is None:
        raise UserError(
            f"--overwrite_output_dir: a run was killed while it replaced {restored[0]}, which has now been restored. "
            "Go on with --resume_from_checkpoint true, or say --overwrite_output_dir again to delete it."
        )
    data = (*arguments.data.dataset, *arguments.data.eval_dataset)
    inputs = (arguments.model.model_name_or_path, *data, config)
    output_directory.check_output_directory(out, inputs=inputs, overwrite=overwrite, resume=checkpoint is not None)
    if checkpoint is not None:
        arguments = adopt(arguments, checkpoint)
        if "eval_on_start" not in arguments.given:
            sft.eval_on_start = False  # the log has that line already
    return arguments, checkpoint


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads, loaded and checked."""

    arguments: TrainArguments
    """With what --max_vram_gb chose."""
    model: Any
    tokenizer: Any
    train_data: Any
    eval_data: Any
    plan: Plan | None
    """Of --max_vram_gb."""


def _load_inputs(arguments: TrainArguments) -> Inputs:
    """Configuration, plan, tokenizer, data, weights: cheapest first."""
    from transformers import set_seed

    check_early(arguments)
    model_options, sft = arguments.model, arguments.sft
    trust = sft.trust_remote_code
    model_config = loading.load_config(model_options, trust)
    sharding = sharding_of(arguments)
    arguments = for_residents(arguments)
    if sharding is not None:
        arguments = for_rows(arguments)
    dtype = loading.resolve_dtype(model_options.dtype, model_config, sft.device)
    sft.max_length = loading.fitting_length(sft.max_length, "max_length" in arguments.given, model_config)
    _choose_forward(arguments, model_config.model_type)
    plan = None
    if arguments.run.max_vram_gb is not None:
        from misa_engine.cli import vram

        before, limit_gib = arguments.misa, arguments.run.max_vram_gb
        with bad_input("--max_vram_gb"):
            arguments, plan = vram.fit(arguments, model_config, dtype, limit_gib)
        print(vram.describe(plan, before), flush=True)
        vram.enforce(limit_gib, sft.device)
        model_options = arguments.model
    tokenizer = loading.load_tokenizer(model_options, trust_remote_code=trust)
    train_data, eval_data = load_training_data(arguments, tokenizer)
    set_seed(sft.seed)  # --from_scratch draws its weights from the global generator
    kwargs = sft.model_init_kwargs if isinstance(sft.model_init_kwargs, dict) else {}
    for name in {"dtype", "torch_dtype", "device_map", "config", "attn_implementation"} & set(kwargs):
        raise UserError(f"--model_init_kwargs: leave out {name!r}; misa train decides it (see --dtype and its like).")
    if model_options.residents:
        model = load_resting(model_options, model_config, dtype, sft.device, trust, kwargs)
    elif sharding is not None:
        model = load_rows(arguments, sharding, model_config, dtype, kwargs)
    else:
        model = loading.load_model(model_options, sft.device, trust_remote_code=trust, **kwargs)
    arguments = resize(arguments, model, tokenizer)
    loading.check_tokenizer(tokenizer, model, sft.eos_token)
    return Inputs(arguments, model, tokenizer, train_data, eval_data, plan)


def _checked_trainer(inputs: Inputs) -> Any:
    """The trainer, its loss compared with the plain one and, with a plan, its largest micro-batch tried out."""
    trainer = build_trainer(inputs.arguments, inputs.model, inputs.tokenizer, inputs.train_data, inputs.eval_data)
    trainer.check_loss()  # before anything is deleted
    if trainer.resident_losses is not None:
        print(trainer.resident_losses.describe() + "\n", flush=True)
    if inputs.plan is not None:
        from misa_engine.cli import vram

        vram.dry_step(trainer, inputs.plan)
    return trainer


def _show_coverage(trainer: Any) -> None:
    """Say how often the run will visit its weights, as soon as the data, and so its length, are known."""
    if trainer.optimizer_name == "misa":
        print(coverage_of(trainer).describe() + "\n", flush=True)


def quiet(arguments: TrainArguments) -> None:
    """No progress bars but that of loading weights, which a log file does not get; no warning about pinned memory."""
    sft, given = arguments.sft, arguments.given
    if sft.log_level in ("debug", "info"):  # every switch is a line at level info
        logger = logging.getLogger("misa_engine")
        logger.setLevel(sft.log_level.upper())
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
    if sft.device.type == "cpu" and "dataloader_pin_memory" not in given:
        sft.dataloader_pin_memory = False
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()  # five for each data set; the report says more
    if not sys.stderr.isatty():
        disable_progress_bar()
        os.environ.setdefault("TQDM_DISABLE", "1")  # DPOTrainer's
    if "disable_tqdm" not in given:
        sft.disable_tqdm = True  # misa_engine.cli.live_line


def _choose_forward(arguments: TrainArguments, model_type: str) -> None:
    """Liger's kernels where they run and the user has not said otherwise."""
    from misa_engine.trainer.lean import lean_options

    sft, given = arguments.sft, arguments.given
    wanted = sft.use_liger_kernel if "use_liger_kernel" in given else None
    loss_type = sft.loss_type if "loss_type" in given else None
    options = lean_options(model_type, sft.device, wanted=wanted, loss_type=loss_type)
    for name, value in options.items():
        setattr(sft, name, value)
    if options:  # it warns of each of its other backends (Ascend, CuTe) that is not installed
        logging.getLogger("liger_kernel").setLevel(logging.ERROR)


def _train(trainer: Any, checkpoint: Path | None, out: Path) -> None:
    """Train until the end, or until a signal asks to stop.

    Raises:
        Stopped: a signal did; what was reached is in a checkpoint.
    """
    from misa_engine.cli.live_line import LiveLine
    from misa_engine.cli.stopping import StopOnSignal

    stop = StopOnSignal(out, lambda: getattr(trainer.misa, "replicas", None))
    line = LiveLine()
    line.replace_others(trainer)
    trainer.add_callback(stop)
    with stop.watching(), line.shown():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise stop.stopped()


def _finish(trainer: Any, evaluate: bool, out: Path) -> None:
    """Save, evaluate once more, and show what the run did."""
    trainer.save_model(str(out))
    last_seen = max((entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry), default=-1)
    if evaluate and (last_seen < trainer.state.global_step or trainer.args.load_best_model_at_end):
        trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    from misa_engine.report.log import RunLog

    entries = RunLog.read(out)
    losses = [(entry["step"], entry["eval_loss"]) for entry in entries if entry.get("eval_loss") is not None]
    if trainer.misa is not None:
        show_table(entries)
    if losses:
        (first, before), (last, after) = losses[0], losses[-1]
        print(f"loss on the evaluation data: {before:.4f} at step {first}, {after:.4f} at step {last}")
    end: dict[str, Any] = next((entry for entry in reversed(entries) if entry["type"] == "end"), {})
    if end.get("peak_memory_bytes"):
        times = end.get("step_time_s") or {}
        step = f", {times['median'] * 1000:,.0f} ms a step" if times else ""
        print(f"peak memory {end['peak_memory_bytes'] / 2**30:.2f} GiB{step}")
    print(f"model and tokenizer: {out}")
    write_pictures(out)

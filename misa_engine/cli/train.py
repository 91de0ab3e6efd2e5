"""One run of ``misa train``: check everything, train, save, show what happened.

What can be wrong with the input is looked at before the output directory is touched, cheapest first: required options,
directory, model configuration, data, weights, budget and patterns, then the tokenized samples.
"""

from __future__ import annotations

import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.errors import DONE, UserError, bad_input

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


def run(arguments: TrainArguments, config: str | None = None) -> int:
    """One training run, from parsed options to the saved model and its report."""
    from misa_engine.cli import loading, output_directory

    model_options, data_options, sft = arguments.model, arguments.data, arguments.sft
    _quiet(arguments)
    dry = arguments.run.dry_run
    required = {"model_name_or_path": model_options.model_name_or_path, "dataset": data_options.dataset}
    if not dry:
        required["output_dir"] = sft.output_dir if "output_dir" in arguments.given else None
    for name, value in required.items():
        if not value:
            raise UserError(f"misa train needs --{name} (or '{name}:' in --config). Try misa train --demo first.")
    out = Path(str(sft.output_dir))
    checkpoint = None
    if not dry:
        checkpoint = _resume_point(sft.resume_from_checkpoint, out)
        inputs = (model_options.model_name_or_path, data_options.dataset, data_options.eval_dataset, config)
        overwrite = arguments.run.overwrite_output_dir
        output_directory.check_output_directory(out, inputs=inputs, overwrite=overwrite, resume=checkpoint is not None)
        if checkpoint is not None and "eval_on_start" not in arguments.given:
            sft.eval_on_start = False  # the log has that line already

    trust = sft.trust_remote_code
    model_config = loading.load_config(model_options, trust)
    dtype = loading.resolve_dtype(model_options.dtype, model_config, sft.device)
    sft.max_length = loading.fitting_length(sft.max_length, "max_length" in arguments.given, model_config)
    _choose_forward(arguments, model_config.model_type)
    planned = None
    limit_gib = arguments.run.max_vram_gb
    if limit_gib is not None:
        from misa_engine.cli import vram

        before = arguments.misa
        with bad_input("--max_vram_gb"):
            arguments, planned = vram.fit(arguments, model_config, dtype, limit_gib)
        print(vram.describe(planned, before), flush=True)
        vram.enforce(limit_gib, sft.device)
    tokenizer = loading.load_tokenizer(model_options, trust_remote_code=trust)
    train_data, eval_data = _load_data(arguments, tokenizer)

    from transformers import set_seed

    set_seed(sft.seed)  # --from_scratch draws its weights from the global generator
    kwargs = sft.model_init_kwargs if isinstance(sft.model_init_kwargs, dict) else {}
    for name in {"dtype", "torch_dtype", "device_map", "config", "attn_implementation"} & set(kwargs):
        raise UserError(f"--model_init_kwargs: leave out {name!r}; misa train decides it (see --dtype and its like).")
    model = loading.load_model(model_options, sft.device, trust_remote_code=trust, **kwargs)
    loading.check_tokenizer(tokenizer, model, sft.eos_token)
    summary = _rehearse(arguments, model)
    size = f"{len(train_data):,} records" if hasattr(train_data, "__len__") else "a stream"
    print(f"{summary}\n\ntraining data: {size}", flush=True)
    if dry:
        print("dry run: nothing was trained, nothing was written")
        return DONE

    existed = out.exists()
    try:
        trainer = _build_trainer(arguments, model, tokenizer, train_data, eval_data)
        trainer.check_loss()  # before anything is deleted
        if planned is not None:
            vram.dry_step(trainer, planned)
    except BaseException:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()  # the Trainer makes it before it checks the rest of its arguments
        raise
    if arguments.run.overwrite_output_dir and checkpoint is None:
        deleted = output_directory.delete_run(out)
        if deleted:
            print(f"deleted the run in {out}: {', '.join(deleted)}")
    _train(trainer, checkpoint, out)
    _finish(trainer, eval_data is not None, out)
    return DONE


def _quiet(arguments: TrainArguments) -> None:
    """No progress bars into a log file, and no warning about pinned memory on a machine without a GPU."""
    sft, given = arguments.sft, arguments.given
    if sft.log_level in ("debug", "info"):  # every switch is a line at level info
        logger = logging.getLogger("misa_engine")
        logger.setLevel(sft.log_level.upper())
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
    if sft.device.type == "cpu" and "dataloader_pin_memory" not in given:
        sft.dataloader_pin_memory = False
    if sys.stderr.isatty():
        return
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()
    if "disable_tqdm" not in given:
        sft.disable_tqdm = True


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


def _resume_point(wanted: str | None, out: Path) -> Path | None:
    """The checkpoint to go on from: the last complete one in ``out``, or a named one."""
    from misa_engine.cli.output_directory import holds_run
    from misa_engine.trainer.checkpoints import find_last_complete_checkpoint, why_incomplete

    if wanted is None or wanted.lower() in ("false", "no", "none", "0", ""):
        return None
    if wanted.lower() in ("true", "yes", "1"):
        last = find_last_complete_checkpoint(out)
        if last is None:
            raise UserError(f"--resume_from_checkpoint: there is no complete checkpoint in {out}. Start the run again.")
        return last
    checkpoint = Path(wanted).expanduser()
    reason = why_incomplete(checkpoint)
    if reason is not None:
        raise UserError(f"--resume_from_checkpoint {wanted}: {reason}.")
    if checkpoint.resolve().parent != out.resolve() and out.is_dir() and holds_run(out):
        raise UserError(f"{checkpoint} does not belong to the run in --output_dir {out}: choose an empty directory.")
    return checkpoint


def _load_data(arguments: TrainArguments, tokenizer: Any) -> tuple[Any, Any]:
    """Training and evaluation data, and the options that follow from their shape."""
    from misa_engine.cli.data import hold_out, load_data

    options, sft, given = arguments.data, arguments.sft, arguments.given
    shared = {"text_field": sft.dataset_text_field}
    train_data = load_data(
        str(options.dataset),
        split=options.dataset_split,
        config=options.dataset_config,
        streaming=options.dataset_streaming,
        **shared,
    )
    eval_data = None
    if options.eval_dataset or options.eval_split:
        source = options.eval_dataset or str(options.dataset)
        config = options.dataset_config if source == options.dataset else None
        split = options.eval_split or "train"
        eval_data = load_data(source, split=split, config=config, streaming=options.dataset_streaming, **shared)
    for loaded in (train_data, *([eval_data] if eval_data else [])):
        if loaded.shape.conversational and tokenizer.chat_template is None and not sft.chat_template_path:
            raise UserError(
                f"the data holds {loaded.shape.name}, but the tokenizer has no chat template to write them with: name "
                "one with --chat_template_path (a .jinja file, or the directory or Hub id of another tokenizer)."
            )
    template = sft.chat_template_path
    looks_local = template and (template.endswith((".jinja", ".j2")) or template.startswith((".", "/", "~")))
    if template and looks_local and not Path(template).exists():
        raise UserError(f"--chat_template_path {template} does not exist.")
    if sft.completion_only_loss and "completion" not in (*train_data.shape.needed, *train_data.shape.optional):
        if train_data.shape.convert is None and train_data.shape.kinds != ("tokens",):
            raise UserError(
                f"--completion_only_loss needs prompts and completions; the data holds {train_data.shape.name}. For "
                "messages use --assistant_only_loss."
            )
    if train_data.text_only and "packing" not in given and sft.max_length is not None:
        sft.packing = True  # full sequences, and no text lost; see misa_engine.cli.data
        if "packing_strategy" not in given:
            sft.packing_strategy = "wrapped"
    train_set, eval_set = train_data.dataset, eval_data.dataset if eval_data else None
    if options.eval_fraction is not None:
        train_set, eval_set = hold_out(train_set, options.eval_fraction, sft.seed)
    if eval_set is not None and options.max_eval_samples is not None:
        eval_set = eval_set.take(options.max_eval_samples)
    return train_set, eval_set


def _rehearse(arguments: TrainArguments, model: Any) -> str:
    """Build the optimizer once for its checks (budget, patterns, dtype) and take it off again; describe it."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if arguments.run.optimizer == "adamw":
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        memory = {"weights": size, "gradients": size, "exp_avg": size, "exp_avg_sq": size}
        return f"AdamW on all {total:,} parameters\n\n{memory_table(memory)}"
    from misa_engine.engine.optimizer import MISA

    with bad_input():
        optimizer = MISA(model, arguments.misa)
    try:
        config, units = optimizer.config, {unit.name: unit for unit in optimizer.units}
        drawn = [units[name] for name in optimizer.active]
        size = sum(unit.numel for unit in drawn)
        lines = [
            optimizer.partition.describe(),
            "",
            f"delta {config.delta:.4g}: at most {optimizer.budget:,} of {total:,} parameters train at a time, redrawn "
            f"every {config.inner_steps} steps (preset {config.preset}, rule {config.rule})",
            f"first draw: {len(drawn)} units, {size:,} parameters, {size / optimizer.budget:.1%} of the budget:",
            *(f"  {unit.name}  {unit.numel:,}" for unit in drawn),
            "",
            memory_table(optimizer.memory()),
        ]
    finally:
        optimizer.remove()
    return "\n".join(lines)


def memory_table(categories: dict[str, int]) -> str:
    """Bytes by category, largest unit that keeps three digits, with the sum."""

    def size(count: int) -> str:
        unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
        return f"{count / unit:>10,.2f} {name}"

    lines = ["memory, without activations:"]
    lines += [f"  {name.replace('_', ' '):<24} {size(count)}" for name, count in categories.items() if count]
    return "\n".join([*lines, f"  {'together':<24} {size(sum(categories.values()))}"])


def _build_trainer(arguments: TrainArguments, model: Any, tokenizer: Any, train_data: Any, eval_data: Any) -> Any:
    """MisaTrainer with two additions: data that vanished in preparation is an error; a README.md stays."""
    from misa_engine.cli.data import check_prepared
    from misa_engine.trainer.sft import MisaTrainer

    class CommandTrainer(MisaTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = super()._prepare_dataset(dataset, *args, **kwargs)
            name = kwargs.get("dataset_name", args[-1] if args else "train")
            check_prepared(prepared, {"eval": "evaluation", "train": "training"}.get(name, name), self_max_length)
            return prepared

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            # TRL writes OUT/README.md at every checkpoint, over one of the user's, with links to a Hub model
            if self.args.push_to_hub and not Path(str(self.args.output_dir), "README.md").exists():
                super().create_model_card(*args, **kwargs)

    self_max_length = arguments.sft.max_length
    try:
        with bad_input(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`use_liger_kernel=True` is deprecated")  # our choice, not theirs
            trainer = CommandTrainer(
                model=model,
                args=arguments.sft,
                misa=arguments.misa,
                optimizer=arguments.run.optimizer,
                train_dataset=train_data,
                eval_dataset=eval_data,
                processing_class=tokenizer,
            )
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise UserError(f"the chat template cannot write the data: {error}. See --chat_template_path.") from error
    if arguments.sft.torch_compile and arguments.run.optimizer == "misa":
        _compile_layers(trainer, model, arguments)
    return trainer


def _compile_layers(trainer: Any, model: Any, arguments: TrainArguments) -> None:
    """Compile layer by layer: whole-model graphs are rebuilt at every new active set and given up after eight."""
    from misa_engine.method.partition import partition

    misa, sft = arguments.misa, arguments.sft
    container = partition(model, misa.granularity, family=misa.family).container
    if container is None:
        raise UserError("--torch_compile works layer by layer, and this model has no list of layers: leave it out.")
    options = {"backend": sft.torch_compile_backend, "mode": sft.torch_compile_mode}
    import torch._dynamo

    # One graph for each pattern of active matrices in a layer: 8 (the default limit) with at most one of 7 matrices,
    # twice that because the lowest active layer's input needs no gradient, more with pairs.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.get_submodule(container).children():
        layer.compile(**{name: value for name, value in options.items() if value})
    trainer.args.torch_compile = False


def _train(trainer: Any, checkpoint: Path | None, out: Path) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        from misa_engine.trainer.checkpoints import find_last_complete_checkpoint

        last = find_last_complete_checkpoint(out)
        raise KeyboardInterrupt(
            f"go on from {last} with --resume_from_checkpoint" if last else "no checkpoint was saved yet"
        ) from None


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
    draw(out)


def show_table(entries: list[dict[str, Any]]) -> None:
    """Print a run's end table; wide enough for its names where no terminal sets the width."""
    from rich.console import Console

    from misa_engine.report.summary import summary_table

    Console(width=None if sys.stdout.isatty() else 120).print(summary_table(entries))


def draw(out: Path) -> None:
    """Make the pictures, or say what is needed for them."""
    if find_spec("matplotlib") is None:
        print(f"no pictures: matplotlib is not installed. pip install 'misa_engine[train]', then: misa report {out}")
        return
    from misa_engine.report.pictures import make_report

    for path in make_report(out):
        print(f"picture: {path}")

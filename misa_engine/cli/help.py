"""``misa train --help``: our options and the main ones of SFTConfig, without importing TRL (5 s)."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import MISSING, fields
from typing import Any, get_args

from misa_engine.cli.arguments import OURS, MisaArguments, recipe_names
from misa_engine.method.config import MisaConfig

#: MISA's options shown by ``misa train --help``: a screenful; ``--help_all`` shows all of them.
MAIN_MISA_OPTIONS = (
    "delta",
    "inner_steps",
    "eta",
    "preset",
    "rule",
    "granularity",
    "always_train",
    "frozen",
    "include_outside",
    "rest",
    "state_dtype",
    "update_in",
)

#: SFTConfig options shown by ``misa train --help``; ``--help_all`` shows all of them.
MAIN_SFT_OPTIONS = {
    "output_dir": "where model, checkpoints, run log and pictures go (required)",
    "learning_rate": f"peak learning rate (default: {MisaConfig.lr})",
    "lr_scheduler_type": "linear, cosine, constant, constant_with_warmup, ... (default: linear)",
    "warmup_steps": "steps of warm-up; below 1 a share of the run (default: 0)",
    "num_train_epochs": "passes over the data (default: 3)",
    "max_steps": "stop after this many optimizer steps; overrides num_train_epochs",
    "per_device_train_batch_size": "sequences per forward pass (default: 8)",
    "gradient_accumulation_steps": "forward passes per optimizer step (default: 1)",
    "max_length": "tokens per sequence; longer ones are cut (default: 1024, or what the model can take)",
    "packing": "put several samples into one sequence of max_length",
    "completion_only_loss": "loss on completions only (default: yes for prompt/completion data)",
    "assistant_only_loss": "loss on assistant turns only, for messages",
    "weight_decay": "decoupled decay of active matrices (default: 0)",
    "max_grad_norm": "clip the global gradient norm; 0 turns it off (default: 1.0)",
    "adam_beta1": "(default: 0.9)",
    "adam_beta2": "(default: 0.999)",
    "adam_epsilon": "(default: 1e-08)",
    "bf16": "bf16 autocast, for a model held in float32 (default: off)",
    "per_device_eval_batch_size": "sequences per forward pass of an evaluation; as for training unless given",
    "use_liger_kernel": "Liger's RMSNorm, SwiGLU and RoPE; on a GPU on unless it is missing or lacks the family",
    "gradient_checkpointing": "recompute activations in the backward pass (default: on)",
    "eval_strategy": "no, steps or epoch (default with evaluation data: steps, every tenth of the run)",
    "save_steps": "steps between checkpoints; below 1 a share of the run (default: 500)",
    "save_total_limit": "checkpoints kept (default: 2)",
    "resume_from_checkpoint": "a checkpoint directory; alone or true: the last complete one in output_dir",
    "logging_steps": "steps between log lines (default: 10)",
    "log_level": "info prints each switch: who left, who came, share of the budget, milliseconds",
    "report_to": "tensorboard, wandb, trackio, ... (default: none)",
    "seed": "data order and sampling (default: 42)",
}


def help_text(width: int = 100, every: bool = False) -> str:
    """Our main options, or every one, and the main ones of SFTConfig, without importing TRL."""
    lines = [
        "usage: misa train --model DIR_OR_HUB_ID --dataset FILE_OR_HUB_ID --output_dir OUT [options]",
        "       misa train --config run.yaml [options]      a flag replaces the file's value",
        "       misa train --demo [--output_dir OUT]        nothing needed, nothing downloaded, two minutes",
        "",
        f"  --config FILE or recipe: {', '.join(recipe_names())}",
        "  --debug  full traceback when something fails",
        "  --help_all  every option of MISA and of SFTConfig as well",
    ]

    def show(names: str, text: str) -> None:
        lines.extend(textwrap.wrap(f"{names}  {text}", width, initial_indent="  ", subsequent_indent=" " * 8))

    for cls in OURS:
        lines += ["", f"{(cls.__doc__ or '').rstrip('.')} options:"]
        for entry in fields(cls):
            if cls is MisaArguments and not every and entry.name not in MAIN_MISA_OPTIONS:
                continue
            default = entry.default if entry.default is not MISSING else None
            shown = "" if default in (None, False, "") else f" (default: {default})"
            switch = "" if get_args(entry.type) or "bool" not in str(entry.type) or default is not True else "[no_]"
            names = " or ".join([f"--{switch}{entry.name}", *entry.metadata.get("aliases", ())])
            show(names, entry.metadata["help"].replace("%%", "%") + shown)
        if cls is MisaArguments and not every:
            lines.append(f"  ... and {len(fields(cls)) - len(MAIN_MISA_OPTIONS)} more: misa train --help_all")
    lines += ["", "Main training options (TRL's SFTConfig):"]
    for name, text in MAIN_SFT_OPTIONS.items():
        show(f"--{name}", text)
    return "\n".join(lines)


def all_options() -> str:
    """Every option of ours, and every flag of SFTConfig as argparse prints them."""
    from trl import SFTConfig, TrlParser

    everything: list[Any] = [SFTConfig]
    shown = TrlParser(everything, usage=argparse.SUPPRESS, add_help=False).format_help().partition("\n")[2]
    return f"{help_text(every=True)}\n\nAll training options (SFTConfig's own defaults; those above win):\n{shown}"

"""``--objective``: what it can be, and which options go with which; cheap, and so before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from misa_engine.cli.record_formats import OBJECTIVES
from misa_engine.errors import UserError

#: Options of supervised fine-tuning that mean nothing to preferences: refused where they are given.
ONLY_SFT = (
    "packing",
    "packing_strategy",
    "eval_packing",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "dataset_kwargs",
    "loss_type",
    "shuffle_dataset",
    "eos_token",
)


def check_objective(given: Mapping[str, Any]) -> None:
    """Refuse an unknown objective, and options that do not go with the one that was chosen.

    Args:
        given: options that the user set.

    Raises:
        UserError: naming the option and the remedy.
    """
    objective = given.get("objective", "sft")
    if objective not in OBJECTIVES:
        raise UserError(f"--objective is one of {', '.join(OBJECTIVES)}; got {objective!r}.")
    if given.get("resize_embeddings") and given.get("max_vram_gb") is not None:
        raise UserError("--max_vram_gb cannot plan the larger model of --resize_embeddings: give micro-batch and delta "
                        "yourself (misa plan helps).")  # fmt: skip
    if objective == "sft":
        for name in ("beta", "dpo_options"):
            if given.get(name) is not None:
                raise UserError(f"--{name} is for --objective dpo. Say so, or leave it out.")
        return
    for name in ONLY_SFT:
        if given.get(name) is not None:
            hint = ' (DPO\'s goes into --dpo_options \'{"loss_type": ["sigmoid"]}\')' if name == "loss_type" else ""
            raise UserError(f"--objective dpo: --{name} is for --objective sft{hint}. Leave it out.")
    if given.get("max_vram_gb") is not None:
        raise UserError("--max_vram_gb plans supervised fine-tuning; with --objective dpo a micro-batch of n holds 2n "
                        "sequences. Leave it out and halve --per_device_train_batch_size instead.")  # fmt: skip
    if given.get("dataset_streaming"):
        raise UserError("--dataset_streaming: the reference of --objective dpo is computed before training, on data "
                        "that is at hand. Leave it out.")  # fmt: skip

"""Every rule about transformers, TRL and Liger in one place: what their options mean to MISA, and what they rename.

    options      FROM_ARGUMENTS, config_from_arguments   TrainingArguments <-> MisaConfig
    refusals     check_arguments                         fp16, reentrant checkpointing, DataParallel, ZeRO, clipping
    processes    prepare_unwrapped, mark_prepared        accelerate wraps in DistributedDataParallel
    names        checkpointing_option, NON_REENTRANT     gradient_checkpointing was renamed in transformers 5.18
    tensors      check_same_model, renamed_tensors       files whose tensor names are not the model's
    versions     fused_head_in_trl, compiled_modules_follow, warn_of_versions     what the installed packages do

Importing this file imports neither torch nor transformers: ``misa train --help`` reads FROM_ARGUMENTS.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

from misa_engine.method.config import MisaConfig
from misa_engine.planner.versions import other_versions

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator  # type: ignore[import-untyped]
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# ---- options ----

#: MisaConfig field -> the training arguments that hold the same thing.
FROM_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
    "max_grad_norm": ("max_grad_norm",),
    "seed": ("seed",),
}


def shared_options(args: Any) -> dict[str, Any]:
    """What the training arguments say of MISA's options. A ``max_grad_norm`` of 0 turns clipping off: None here."""
    values = {name: tuple(getattr(args, part) for part in parts) for name, parts in FROM_ARGUMENTS.items()}
    shared: dict[str, Any] = {name: value if name == "betas" else value[0] for name, value in values.items()}
    shared["max_grad_norm"] = shared["max_grad_norm"] or None
    return shared


def config_from_arguments(args: TrainingArguments, misa: MisaConfig | Mapping[str, Any] | None) -> MisaConfig:
    """MISA's options, with learning rate, betas, eps, weight decay and seed from ``args`` unless ``misa`` has them.

    A mapping has what it names; a MisaConfig has what it was constructed with, also where that is the default. Clipping
    is not taken over: the Trainer asks for it at every step.
    """
    shared = shared_options(args)
    del shared["max_grad_norm"]
    if isinstance(misa, MisaConfig):
        given = {name: getattr(misa, name) for name in misa.given}
    else:
        given = dict(misa or {})
    return MisaConfig.from_dict({**shared, **given})


def check_arguments(args: TrainingArguments, config: MisaConfig) -> None:
    """Refuse training arguments under which MISA would train wrongly; nothing has been written by then.

    Raises:
        ValueError: fp16, reentrant checkpointing, several GPUs in one process, DeepSpeed, or clipping where it cannot
            be. What fsdp asks for is read, and refused, in ``sharding.py``.
    """
    if args.fp16:
        raise ValueError(
            "fp16=True scales the loss and needs fp16 gradients, which underflow without it. Load the model in "
            "bfloat16 and leave fp16 off; MISA keeps an exact float32 master of the active weights."
        )
    for option in CHECKPOINTING_KWARGS:
        if asks_reentrant(getattr(args, option, None)):
            raise ValueError(
                f"{option}={{'use_reentrant': True}} recomputes frozen layers, or fails, once inputs do not require "
                "gradients. Use {'use_reentrant': False}, which is also the default of transformers 5."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"the Trainer would wrap the model in DataParallel ({args.n_gpu} GPUs in one process), which goes out of "
            "step when the active matrices change. Start one process for each GPU (torchrun --nproc_per_node "
            f"{args.n_gpu}), or make one visible (CUDA_VISIBLE_DEVICES=0)."
        )
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "deepspeed brings an optimizer of its own for all weights. Leave it out: every process then holds the "
            "whole model, and MISA averages the gradients of the active matrices. Where it does not fit one card: "
            "--fsdp (fsdp=True), which divides the weights."
        )
    if config.update_in == "backward" and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} in the training arguments (1.0 unless set) needs the norm of all "
            "gradients, but update_in='backward' updates each matrix as its gradient arrives. Set max_grad_norm=0, "
            "or use update_in='step'."
        )


# ---- several processes ----


def prepare_unwrapped(accelerator: Accelerator) -> None:
    """Let ``accelerator.prepare`` do everything to a model but wrap and move it.

    MISA averages the gradients itself, and the Trainer has moved the model before. On a CPU accelerate would move it
    again, to a device that it calls cpu:0, and leave the optimizer with weights that nobody uses.
    """
    prepare = accelerator.prepare_model

    def prepare_model(model: nn.Module, *_: Any, **__: Any) -> Any:
        return prepare(model, device_placement=False, evaluation_mode=True)

    vars(accelerator)["prepare_model"] = prepare_model


def leave_state_in_place(accelerator: Accelerator) -> None:
    """Keep ``accelerator.prepare`` from moving an optimizer's state to the card: that of sharded weights is whole."""
    prepare = accelerator.prepare_optimizer

    def prepare_optimizer(optimizer: Any, *_: Any, **__: Any) -> Any:
        return prepare(optimizer, device_placement=False)

    vars(accelerator)["prepare_optimizer"] = prepare_optimizer


def mark_prepared(model: nn.Module) -> None:
    """The same where only the model is at hand: accelerate leaves alone what it takes for prepared.

    Raises:
        ValueError: it would also leave out autocast, which the arguments ask for.
    """
    state = import_module("accelerate.state").AcceleratorState
    precision = state().mixed_precision if state._shared_state else "no"
    if precision != "no":
        raise ValueError(
            f"a plain Trainer with several processes and {precision}=True would train without autocast. Load the model "
            f"in bfloat16 and leave {precision} off, or use MisaTrainer or MisaMixin."
        )
    model._is_accelerate_prepared = True  # type: ignore[assignment]


# ---- checkpointing of activations ----

#: The form in which backward can stop at the lowest active layer.
NON_REENTRANT = {"use_reentrant": False}
#: transformers 5.18 renamed gradient_checkpointing and warns about the old name.
CHECKPOINTING_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def checkpointing_option(known: Any) -> str:
    """The name under which activations are recomputed.

    Args:
        known: training arguments, or the names that they have.
    """
    new = "activation_checkpointing"
    has_new = new in known if isinstance(known, Iterable) else hasattr(known, new)
    return new if has_new else "gradient_checkpointing"


def asks_reentrant(kwargs: Any) -> bool:
    """Whether checkpointing options, as a mapping or as text of the command line, ask for the reentrant form."""
    if isinstance(kwargs, Mapping):
        return bool(kwargs.get("use_reentrant"))
    return bool(re.search(r"""['"]?use_reentrant['"]?\s*[:=]\s*['"]?true""", str(kwargs or ""), re.IGNORECASE))


# ---- tensors that a file names differently ----


def check_same_model(checkpoint: Path, stored: Mapping[str, tuple[int, ...]], model: nn.Module) -> bool:
    """Refuse a checkpoint whose tensors are not those of the model, before anything is loaded from it.

    Args:
        checkpoint: its folder, for the message.
        stored: names and shapes of the tensors in its safetensors files; empty where there are none to check.
        model: what the checkpoint is about to be loaded into.

    Returns:
        Whether the files name some tensors differently than the model does, as transformers 5 writes mixture-of-experts
        models and GPT-NeoX. Loading such files by name would silently leave those tensors as they are.

    Raises:
        ValueError: names or shapes differ; the first three are listed.
    """
    if not stored:
        return False
    from misa_engine.engine.shards import local

    state = model.state_dict()
    places = {name: local(tensor).data_ptr() or name for name, tensor in state.items()}  # no rows here, no address
    memory = {places[name] for name in state if name in stored}
    # a tied tensor is stored under one of its names only
    absent = {place: name for name, place in places.items() if place not in memory}
    unknown = [name for name in stored if name not in state]
    wrong = [
        f"{name} is {list(stored[name])} there and {list(state[name].shape)} here"
        for name in stored
        if name in state and stored[name] != tuple(state[name].shape)
    ]
    if not wrong and sum(prod(stored[name]) for name in unknown) == sum(state[n].numel() for n in absent.values()):
        return bool(unknown)
    wrong += [f"{name} is not in this model" for name in unknown]
    wrong += [f"{name} is not in the checkpoint" for name in absent.values()]
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    raise ValueError(
        f"{checkpoint} is a checkpoint of another model: {'; '.join(wrong[:3])}{more}. "
        "Resume with the model that the run was started with, or start a new run in another output_dir."
    )


def load_renamed(checkpoint: Path, model: Any) -> None:
    """Load weights whose names in the file are not the model's.

    transformers 5 saves fused experts apart and GPT-NeoX's head under its old name, but its Trainer loads by name and
    only warns about what it does not find: training would go on from mixed weights.
    """
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    from misa_engine.trainer.sharding import has_rows, load_rows

    source = type(model).from_pretrained(checkpoint, dtype=widest)  # on the host, once
    if has_rows(model):
        load_rows(model, source.state_dict().items())
    else:
        model.load_state_dict(source.state_dict())


# ---- versions ----


def fused_head_in_trl() -> bool:
    """Whether the installed SFTTrainer projects hidden states to losses in chunks by itself (TRL 1.15 and later)."""
    return hasattr(import_module("trl.trainer.sft_trainer"), "add_fused_lm_head")


#: Compiled modules of torch 2.11 do not see that ``requires_grad`` was switched on after their first call: gradients
#: are None and whole rounds train nothing. 2.13 is right, and the oldest for which that was seen.
COMPILED_MODULES_FOLLOW_SINCE = (2, 13)


def compiled_modules_follow(torch_version: str) -> bool:
    """Whether compiled modules of this torch follow ``requires_grad`` from round to round."""
    numbers = re.match(r"(\d+)\.(\d+)", torch_version)
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= COMPILED_MODULES_FOLLOW_SINCE


@functools.cache
def warn_of_versions() -> None:
    """Say once in a process when other versions are installed than the planner's formulas describe."""
    note = other_versions()
    if note is not None:
        logger.warning(note)

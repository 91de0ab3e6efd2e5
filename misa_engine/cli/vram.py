"""``misa train --max_vram_gb``: the plan is made before weights are loaded, enforced, and tried out before step 1.

fit()       choose what the user left open so that the run fits, or refuse
enforce()   let PyTorch's allocator take no more than the promise
dry_step()  one forward and backward pass at the longest length with the worst draw; weights stay as they are
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from misa_engine.engine.residents import resting_names
from misa_engine.errors import UserError
from misa_engine.method.config import MisaConfig
from misa_engine.planner.activations import CONTEXT_BYTES, MicroBatch
from misa_engine.planner.cards import Card
from misa_engine.planner.plan import OPTIMIZER, Plan
from misa_engine.planner.solve import Wishes, again, solve
from misa_engine.planner.worst_case import MetaModel
from misa_engine.trainer.compat import NON_REENTRANT, checkpointing_option, fused_head_in_trl, warn_of_versions

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


def fit(arguments: TrainArguments, config: Any, dtype: torch.dtype, limit_gib: float) -> tuple[TrainArguments, Plan]:
    """Fill in δ, precision of the moments, checkpointing and micro-batch where the user gave none.

    The effective batch, micro-batch times accumulation, is kept.

    Args:
        arguments: the run's; its SFTConfig is changed in place.
        config: the model's configuration.
        dtype: of the weights.
        limit_gib: what the run may take, CUDA context and all.

    Returns:
        The arguments with the chosen MISA options, and the plan.

    Raises:
        UserError: nothing fits; the message says what would.
    """
    sft, given, misa = arguments.sft, arguments.given, arguments.misa
    if arguments.run.optimizer != "misa":
        raise UserError("--max_vram_gb plans for MISA; leave it out with --optimizer adamw.")
    if sft.max_length is None:
        raise UserError("--max_vram_gb needs a longest sequence: say --max_length.")
    warn_of_versions()
    limit = Card.of(f"{limit_gib:g}GiB")
    meta = MetaModel(config, dtype)
    checkpointing = checkpointing_option(sft)
    effective = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
    micro_batch = MicroBatch(
        checkpointing=bool(getattr(sft, checkpointing)),
        loss=loss_of(sft),
        liger=bool(sft.use_liger_kernel),
        padded=not sft.packing and effective > 1,
    )
    wishes = Wishes(
        delta=misa.delta if "delta" in given else None,
        state_dtype=misa.state_dtype if "state_dtype" in given else None,
        checkpointing=micro_batch.checkpointing if {checkpointing, "gradient_checkpointing"} & given else None,
        batch=sft.per_device_train_batch_size if "per_device_train_batch_size" in given else None,
        length=sft.max_length,
        most_sequences=effective,
        residents=arguments.model.residents or ("none" if "residents" in given else None),
        gpus=sft.world_size,
    )
    chosen = solve(meta, limit, misa, micro_batch, wishes)
    if wishes.batch is None:
        batch = max(size for size in range(1, chosen.micro_batch.batch + 1) if effective % size == 0)
        sft.per_device_train_batch_size, sft.gradient_accumulation_steps = batch, effective // batch
        if "per_device_eval_batch_size" not in given:
            sft.per_device_eval_batch_size = batch
        chosen = again(meta, chosen, card=limit, micro_batch=replace(chosen.micro_batch, batch=batch))
    setattr(sft, checkpointing, chosen.micro_batch.checkpointing)
    model = replace(arguments.model, residents=chosen.residents.format if chosen.residents else None)
    return replace(arguments, misa=chosen.misa, model=model), chosen


def loss_of(sft: Any) -> str:
    """How SFTTrainer will compute the loss: in chunks by itself, by Liger, or from all logits."""
    if fused_head_in_trl() or getattr(sft, "loss_type", None) == "chunked_nll":
        return "chunked"
    return "liger" if sft.use_liger_kernel else "plain"


def enforce(limit_gib: float, device: torch.device) -> None:
    """Let PyTorch's allocator reserve no more than the limit less the CUDA context; nothing happens on a CPU.

    Raises:
        UserError: the card is smaller than the limit.
    """
    if device.type != "cuda":
        return
    total, wanted = torch.cuda.get_device_properties(device).total_memory, limit_gib * 2**30
    if wanted > total:
        raise UserError(
            f"--max_vram_gb {limit_gib:g} is more than {torch.cuda.get_device_name(device)} has "
            f"({total / 2**30:.1f} GiB): give at most that."
        )
    torch.cuda.set_per_process_memory_fraction((wanted - CONTEXT_BYTES) / total, device)


def dry_step(trainer: Any, planned: Plan) -> None:
    """Run the largest micro-batch of the run once, with the worst draw active, beside a buffer of the arena's size.

    Before the optimizer exists. Gradients are dropped as they arrive; weights, flags, the trainer's metrics and the
    random state are as before afterwards. With residents, which cannot be active yet, a vector of the lowest layer
    trains instead, beside a buffer that stands for the active weights, too: what their inputs take is not tried.

    Raises:
        UserError: the device ran out of memory.
    """
    model, device, args = trainer.model, trainer.args.device, trainer.args
    width = planned.micro_batch.length
    size = model.get_input_embeddings().weight.shape[0]
    arena_bytes = sum(planned.bytes.get(name, 0) for name in (*OPTIMIZER, "active_weights"))
    names = {*planned.worst_draw, *planned.resting} - set(resting_names(model))
    if planned.residents is not None:
        names.add(next(name for name, parameter in model.named_parameters() if parameter.ndim == 1))
    with _undisturbed(trainer, names):
        try:
            arena = torch.empty(arena_bytes, dtype=torch.uint8, device=device)
            ids = torch.randint(size, (args.per_device_train_batch_size, width), device=device)
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            if planned.micro_batch.padded and len(ids) > 1:  # a mask takes attention off its flash kernel
                batch["attention_mask"][0, -1] = 0
            if getattr(args, "packing", False):  # as TRL's collator writes packed sequences: positions, no mask
                del batch["attention_mask"]
                batch["position_ids"] = torch.arange(width, device=device).expand_as(ids)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(ids.numel(), device=device))
            trainer.accelerator.backward(loss)
            value = float(loss.detach())
            del arena, loss
        except torch.OutOfMemoryError as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"a trial of {args.per_device_train_batch_size} x {width} tokens with the largest draw ran out of "
                f"memory, although {planned.total_bytes / 2**30:.2f} GiB were planned: other programs may hold memory "
                f"of this GPU. Lower --max_vram_gb or --max_length. ({text})"
            ) from error
    if not math.isfinite(value):
        raise UserError(f"the loss of a trial on random tokens is {value}: the weights are not usable as they are.")


@contextmanager
def _undisturbed(trainer: Any, names: set[str]) -> Iterator[None]:
    """Only ``names`` train inside, and no gradient stays; everything is as it was afterwards."""
    model, args = trainer.model, trainer.args
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handles = []
    counters = ("_metrics", "_total_train_tokens")
    metrics = {name: copy.deepcopy(vars(trainer)[name]) for name in counters if name in vars(trainer)}
    was_training = model.training
    enabled = getattr(model, "is_gradient_checkpointing", False)
    cuda = [args.device] if args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            model.train()
            if getattr(args, checkpointing_option(args)) and not enabled:  # the Trainer does it later, in train()
                model.gradient_checkpointing_enable(NON_REENTRANT)
                model.disable_input_require_grads()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
                if name in names:
                    handles.append(parameter.register_post_accumulate_grad_hook(_drop))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted[name])
                parameter.grad = None
            if not enabled and getattr(model, "is_gradient_checkpointing", False):
                model.gradient_checkpointing_disable()
            model.train(was_training)
            for name, value in metrics.items():
                setattr(trainer, name, value)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def describe(chosen: Plan, before: MisaConfig) -> str:
    """What was chosen, in the words of the options."""
    micro_batch, misa = chosen.micro_batch, chosen.misa
    assert chosen.card is not None
    lines = [
        f"plan: {chosen.total_bytes / 2**30:.2f} GiB of {chosen.card.total_bytes / 2**30:.2f} with "
        f"per_device_train_batch_size {micro_batch.batch}, max_length {micro_batch.length}, gradient_checkpointing "
        f"{str(micro_batch.checkpointing).lower()}, state_dtype {misa.state_dtype}, delta {misa.delta:g}"
    ]
    if chosen.residents is not None:
        host = chosen.residents.host_total_bytes
        lines.append(f"residents {chosen.residents.format}: {host / 2**30:.2f} GiB of exact weights in host memory")
    if misa.delta < before.delta:
        lines.append(f"note: delta is {misa.delta:g} instead of {before.delta:g}, which does not fit")
    return "\n".join(lines)

"""Lean forward: Liger's kernels and chunked cross-entropy, and the proof at start-up that they compute the plain loss.

    layers          Liger's RMSNorm, SwiGLU and RoPE on CUDA, put in by transformers (``use_liger_kernel``)
    cross-entropy   never all logits at once: TRL's chunks (SFTTrainer), Liger's fused linear cross-entropy (plain
                    Trainer, and SFTTrainer before TRL 1.15), transformers' own full logits where neither applies

Neither computes a gradient of a frozen head. ``lean_options`` decides; ``LossCheck`` compares the loss, and one
gradient, with float32 cross-entropy over full logits on a few short samples before the first step.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.residents import resting_names
from misa_engine.errors import UserError
from misa_engine.trainer.compat import fused_head_in_trl
from misa_engine.trainer.sharding import has_rows, let_go

logger = logging.getLogger(__name__)

#: The check sees this many samples and tokens of each: 128 x 128,256 logits in float32 are 66 MB.
SAMPLES, TOKENS = 2, 64
#: How far the two losses may be apart, relative to the larger of the plain loss and 1. bfloat16 keeps 8 bits, so that a
#: logit near 16 is off by up to 0.06 and the mean over 100 tokens by some 0.006; three times that. With other roundings
#: in every norm and MLP of 12 layers 0.0013 was seen. TF32, which float32 products may use, keeps 11 bits: a tenth.
LOSS_TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 0.002}
#: The same for ‖difference‖ / ‖plain gradient‖ of one matrix. 3% were seen at 12 layers in bf16, and roundings add up
#: like a random walk: 8% at 80 layers. A missing factor, mask or term is off by more than twice that.
GRADIENT_TOLERANCE = {torch.bfloat16: 0.2, torch.float32: 0.02}
#: Where a gradient all but vanishes (k and q on a text of one repeated token; a loss of 0), what is left of it is
#: rounding, and two right paths round differently. Below this share of the largest gradient in the layer, some times
#: the dtype's own, it is not compared.
ROUNDING = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-18}
#: The same where all gradients vanish: nats by which the loss may move when a matrix changes by its own norm. A
#: softmax near 1 loses 2**-24 of it in float32, in which the cross-entropy is computed for every dtype.
VANISHED = 2.0**-20


# ---- the decision ----


def lean_options(
    model_type: str | None,
    device: torch.device | str,
    *,
    wanted: bool | None = None,
    sft: bool = True,
    loss_type: str | None = None,
) -> dict[str, Any]:
    """Training arguments that switch Liger's kernels on where they can run.

    For any Trainer: ``TrainingArguments(..., **lean_options(model.config.model_type, "cuda", sft=False))``.

    Args:
        model_type: ``model.config.model_type``; Liger lists the families that it knows by it.
        device: where the model trains; the kernels are Triton's and need CUDA (or ROCm).
        wanted: the user's own ``use_liger_kernel``; None leaves the choice to us.
        sft: whether TRL's SFTTrainer computes the loss; its chunked loss excludes Liger's before TRL 1.15.
        loss_type: the user's own ``loss_type`` of SFTConfig, if any.

    Returns:
        Attributes to set on the arguments; empty where the plain layers stay.

    Raises:
        UserError: ``wanted`` is True and Liger is missing, broken or without kernels for this model or device.
    """
    if wanted is False:
        return {}
    reason = None
    if torch.device(device).type != "cuda":
        reason = f"Liger's kernels need a GPU, and the model trains on {torch.device(device).type}"
    elif find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed (pip install liger-kernel)"
    else:
        try:
            known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
        except (ImportError, AttributeError, RuntimeError) as error:  # an older or newer transformers than it knows
            reason = f"liger-kernel cannot be imported: {error}"
            if wanted is None:
                logger.warning("%s. Training goes on with the plain layers.", reason)
        else:
            if model_type not in known:
                reason = (
                    f"liger-kernel has no kernels for model type {model_type!r}, only for {', '.join(sorted(known))}"
                )
    old_chunks = sft and not fused_head_in_trl()
    if reason is None and old_chunks and loss_type == "chunked_nll":
        reason = "loss_type chunked_nll excludes Liger's kernels before TRL 1.15"
    if reason is not None:
        if wanted:
            raise UserError(f"--use_liger_kernel true: {reason}. Leave the option out, or say false.")
        logger.info("plain layers: %s", reason)
        return {}
    # before 1.15 the chunked loss casts the whole head to float32 for each chunk of 256 tokens; Liger's does not
    return {"use_liger_kernel": True, **({"loss_type": loss_type or "nll"} if old_chunks else {})}


# ---- the check ----


class LossCheck:
    """The plain loss of a few short samples, taken before the lean path is put in, to hold that path to.

        check = LossCheck.before(trainer)    # None where there is nothing to compare
        apply_liger_kernel(model, ...)
        check.compare()

    Weights, gradients, training flags, the trainer's metrics and the random state are as before afterwards.
    """

    def __init__(self, trainer: Any, batch: dict[str, Tensor]):
        self._trainer, self._batch = trainer, batch
        self._count = trainer._get_num_items_in_batch([batch, batch], batch["labels"].device)  # as if accumulating two
        small = _small_matrices(trainer.model)
        self._probe = small[0] if small else None
        loss, gradients = self._gradients(lambda: plain_loss(trainer.model, batch, self._count), small)
        self._plain = loss, gradients[0] if gradients else None
        self._largest = max((float(gradient.norm()) for gradient in gradients), default=0.0)
        if not math.isfinite(self._plain[0]):
            raise UserError(_not_finite(trainer.model, self._plain[0]))

    @classmethod
    def before(cls, trainer: Any) -> LossCheck | None:
        """Measure the plain loss, unless the trainer's loss is not the next token's plain cross-entropy."""
        reason = _not_comparable(trainer)
        batch = (
            None
            if reason
            else short_batch(
                trainer.train_dataset,
                trainer.model,
                trainer.args.device,
                completion_only=getattr(trainer, "completion_only_loss", True) is not False,
            )
        )
        if reason or batch is None:
            logger.info("the loss is not compared with the plain one: %s", reason or "no sample has labels to predict")
            return None
        return cls(trainer, batch)

    def compare(self) -> None:
        """Measure the trainer's own loss and compare.

        Raises:
            UserError: it is not the plain loss, or its gradient is not that loss's.
        """
        trainer = self._trainer
        loss, gradient = self._measure(
            lambda: (
                trainer.compute_loss(trainer.model, dict(self._batch), num_items_in_batch=self._count)
                / _ranks_in_loss(trainer, self._count)
            )
        )
        plain, plain_gradient = self._plain
        dtype = torch.bfloat16 if trainer.args.bf16 else next(trainer.model.parameters()).dtype
        kind = dtype if dtype in LOSS_TOLERANCE else torch.bfloat16
        tokens = int((self._batch["labels"][:, 1:] != -100).sum())
        if not abs(loss - plain) <= LOSS_TOLERANCE[kind] * max(1.0, abs(plain)):  # a NaN fails too
            found = f"a loss of {loss:.5g} on {tokens} tokens; the plain forward gives {plain:.5g}"
            raise UserError(self._message(found))
        apart = 0.0
        if gradient is not None and plain_gradient is not None and float(plain_gradient.norm()) > 0:
            apart = float((gradient - plain_gradient).norm()) / max(float(plain_gradient.norm()), self._floor(kind))
            if not apart <= GRADIENT_TOLERANCE[kind]:
                name = self._probe[0] if self._probe else ""
                raise UserError(
                    self._message(
                        f"a gradient of {name} of norm {float(gradient.norm()):.5g}, {apart:.1%} away from the plain "
                        f"forward's, of norm {float(plain_gradient.norm()):.5g} (the losses agree: {loss:.5g} and "
                        f"{plain:.5g})"
                    )
                )
        logger.info(
            "lean forward checked: loss %.5g, plain %.5g on %d tokens; gradients %.2g apart", loss, plain, tokens, apart
        )

    def _message(self, found: str) -> str:
        if self._trainer.args.use_liger_kernel:
            path, remedy = "Liger's kernels", "Switch them off with --use_liger_kernel false (use_liger_kernel=False)"
        elif sys.modules.get("trl") is not None and fused_head_in_trl():
            path, remedy = "TRL's chunked cross-entropy", "Install another version of trl"
        else:
            path, remedy = "TRL's chunked cross-entropy", "Switch it off with --loss_type nll"
        return f"{path} would train this model wrongly: {found}. {remedy}."

    def _floor(self, kind: torch.dtype) -> float:
        """Norm below which the probe's gradient is rounding."""
        assert self._probe is not None
        weight = float(self._probe[1].detach().float().norm())
        return max(ROUNDING[kind] * self._largest, VANISHED / weight if weight else 0.0)

    def _measure(self, loss_of: Any) -> tuple[float, Tensor | None]:
        """The loss, and the gradient of the probe in float32."""
        loss, gradients = self._gradients(loss_of, [self._probe] if self._probe else [])
        return loss, gradients[0] if gradients else None

    def _gradients(self, loss_of: Any, of: list[tuple[str, nn.Parameter]]) -> tuple[float, list[Tensor]]:
        """The loss, and the gradients of some matrices in float32."""
        parameters = [parameter for _, parameter in of]
        with undisturbed(self._trainer, parameters), self._trainer.compute_loss_context_manager():
            loss = loss_of()
            gradients = torch.autograd.grad(loss, parameters) if parameters else ()
            return float(loss.detach()), [gradient.float() for gradient in gradients]


def _ranks_in_loss(trainer: Any, count: Tensor | int | None) -> int:
    """What the Trainer multiplies a loss by that it has divided by the tokens of all processes."""
    counted = trainer.model_accepts_loss_kwargs and count is not None
    return int(trainer.accelerator.num_processes) if trainer.args.average_tokens_across_devices and counted else 1


def _not_finite(model: nn.Module, loss: float) -> str:
    bad = next((name for name, p in model.named_parameters() if not bool(p.detach().isfinite().all())), None)
    if bad is not None:
        return f"the model cannot be trained: {bad} holds NaN or infinite numbers. Load a whole copy of it."
    return (
        f"the model's own loss is {loss} on short samples of the data although its weights are finite: it overflows. "
        "Load it in bfloat16 or float32, or check where the weights come from."
    )


def plain_loss(model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
    """Next-token cross-entropy as it is defined: all logits, in float32.

    Args:
        model: a causal language model.
        batch: ``input_ids``, ``attention_mask``, ``labels`` (batch, length); -100 marks what is not predicted.
        num_items: predicted tokens of all micro-batches of the step; None stands for those of this batch.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:].reshape(-1)
    predicted = logits[:, :-1].float().flatten(0, 1)
    total = nn.functional.cross_entropy(predicted, labels, ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items is None else num_items)


def short_batch(
    dataset: Any,
    model: nn.Module,
    device: torch.device,
    *,
    completion_only: bool = True,
    samples: int = SAMPLES,
    tokens: int = TOKENS,
) -> dict[str, Tensor] | None:
    """The first ``samples`` usable ones, cut to ``tokens`` tokens from where labels begin, padded on the right.

    Prompts count too where ``completion_only`` is False.

    A stream is not touched (reading from it costs time and may move it): random tokens stand in.
    """
    rows: list[tuple[list[int], list[int]]] = []
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        for index in range(min(len(dataset), 8 * samples)):
            row = _cut(dataset[index], completion_only, tokens)
            if row is not None:
                rows.append(row)
            if len(rows) == samples:
                break
    else:
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = torch.randint(size, (samples, tokens), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [(row, row) for row in ids]
    if not rows:
        return None
    width = max(len(ids) for ids, _ in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values], device=device)

    return {
        "input_ids": padded([ids for ids, _ in rows], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], -100),
    }


def _cut(row: Any, completion_only: bool, tokens: int) -> tuple[list[int], list[int]] | None:
    """(input_ids, labels) of at most so many tokens around the first label; None when there is nothing to predict."""
    if not isinstance(row, Mapping) or "input_ids" not in row:
        return None
    ids = [int(token) for token in row["input_ids"]]
    labels = [int(token) for token in row.get("labels", ids)]
    # As TRL reads them: labels that are there already hold the masks, whose columns may stay at their full length.
    masks = (
        () if "labels" in row else ("completion_mask", "assistant_masks") if completion_only else ("assistant_masks",)
    )
    for mask in masks:
        if row.get(mask) is not None:
            labels = [token if keep else -100 for token, keep in zip(labels, row[mask], strict=True)]
    first = next((place for place, token in enumerate(labels) if token != -100 and place > 0), None)
    if first is None:
        return None
    start = max(0, first - tokens // 4)
    return ids[start : start + tokens], labels[start : start + tokens]


def _not_comparable(trainer: Any) -> str | None:
    """Why the trainer's loss is not to be compared, or None."""
    from transformers import Trainer

    sft_module = sys.modules.get("trl.trainer.sft_trainer")
    known = [Trainer.compute_loss, *([sft_module.SFTTrainer.compute_loss] if sft_module else [])]
    if type(trainer).compute_loss not in known:
        return f"{type(trainer).__name__} computes a loss of its own"
    if not _predicts_next_token(trainer.model):
        return "the model is not a causal language model"
    if getattr(trainer.args, "loss_type", None) not in (None, "nll", "chunked_nll"):
        return f"loss_type is {trainer.args.loss_type}"
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return "label smoothing or a loss function of the user's is on"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the model is sharded"
    return None


def _predicts_next_token(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    # transformers reads loss_type off the class's name; it is None for names like GPT2LMHeadModel
    return getattr(model, "loss_type", None) == "ForCausalLM" or type(model).__name__ in CAUSAL.values()


def _small_matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The four smallest matrices of the last layer but one, smallest first; none of residents or rows.

    Every kernel of a whole layer lies between them and the loss. What rests in 8 bits has no gradient; rows have parts.
    """
    if resting_names(model) or has_rows(model):
        return []
    ends = [get() for get in (model.get_input_embeddings, model.get_output_embeddings)]  # type: ignore[operator]
    skip = {id(module.weight) for module in ends if module is not None}
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        if number and parameter.ndim == 2 and id(parameter) not in skip:
            layers.setdefault(int(number.group(1)), []).append((name, parameter))
    if not layers:
        return []
    chosen = layers[sorted(layers)[-2:][0]]
    return sorted(chosen, key=lambda entry: entry[1].numel())[:4]


@contextmanager
def undisturbed(trainer: Any, probes: list[nn.Parameter]) -> Iterator[None]:
    """Only the probes get gradients and nothing is random inside; everything is as it was afterwards.

    The model itself stays in training mode, in which Liger skips the logits; its parts are in evaluation mode, without
    dropout, router noise or checkpointing. A mixture's balancing loss, which is no cross-entropy, is left out.
    """
    model = trainer.model
    let_go(model)  # flags belong to rows, not to what an earlier pass left gathered
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    # this short batch would cost a compilation; the import of torch._dynamo alone takes 2 s
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    counters = ("_metrics", "_total_train_tokens")
    metrics = {name: copy.deepcopy(vars(trainer)[name]) for name in counters if name in vars(trainer)}
    router = model.config.get_text_config()
    routed = getattr(router, "output_router_logits", None)
    auxiliary = getattr(trainer, "aux_loss_enabled", None)
    probed = {id(parameter) for parameter in probes}
    cuda = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), eager:
        try:
            model.eval()
            model.training = True
            for parameter, _ in wanted:
                parameter.requires_grad_(id(parameter) in probed)
            if routed:
                router.output_router_logits = False
            if auxiliary:
                trainer.aux_loss_enabled = False
            yield
        finally:
            if routed:
                router.output_router_logits = routed
            if auxiliary:
                trainer.aux_loss_enabled = auxiliary
            let_go(model)
            for parameter, before in wanted:
                parameter.requires_grad_(before)
            for module, mode in modes:
                module.training = mode
            for name, value in metrics.items():
                setattr(trainer, name, value)

"""The other projects' methods: each is built by its own package, with float32 or bfloat16 weights as they come.

Adam's numbers are the same for all (betas 0.9 and 0.999, eps 1e-8, no weight decay), whatever a package's defaults.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.bench.method import Loss, Method, Settings, Unavailable, state_bytes
from misa_engine.engine.marks import phase
from misa_engine.method.partition import partition

ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def require_cuda(model: nn.Module, why: str) -> None:
    """Refuse a model that is not on a CUDA device.

    Raises:
        Unavailable: with what needs CUDA.
    """
    if next(model.parameters()).device.type != "cuda":
        raise Unavailable(f"needs CUDA: {why}")


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of a name with its module, as in "torch.optim.AdamW"."""
    module, _, own = name.rpartition(".")
    found: Callable[..., torch.optim.Optimizer] = getattr(import_module(module), own)
    return found


# ---- one optimizer over the model ----


def packaged(
    model: nn.Module, loss: Loss, settings: Settings, *, optimizer: str,
    groups: Callable[[nn.Module, Settings], list[Any]] | None = None, cuda_only: str = "", **own: Any,
) -> Method:  # fmt: skip
    """A torch optimizer that a package makes.

    Args:
        model: what trains.
        loss: of it.
        settings: shared by all methods.
        optimizer: its class with its module, as in "torch.optim.AdamW".
        groups: gives its parameter groups; None is one of all parameters.
        cuda_only: why it cannot run elsewhere; empty when it can.
        **own: its options beside learning rate and Adam's numbers.
    """
    if cuda_only:
        require_cuda(model, cuda_only)
    trained = groups(model, settings) if groups else list(model.parameters())
    made = optimizer_class(optimizer)(trained, lr=settings.lr, **ADAM, **own)
    return Method(model, loss, made, settings)


def _layer_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the layers, and all other parameters (embeddings, head, norms)."""
    names = {name for unit in partition(model).units for name in unit.params}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if name in names and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


def galore_groups(model: nn.Module, settings: Settings) -> list[Any]:
    """The layers' matrices by rank, with the published gap, scale and kind of projection."""
    matrices, others = _layer_matrices(model)
    by_rank: dict[int, list[nn.Parameter]] = defaultdict(list)
    for matrix in matrices:
        by_rank[min(settings.galore_rank, *matrix.shape)].append(matrix)
    projection = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return [{"params": others}, *({"params": ps, "rank": rank, **projection} for rank, ps in by_rank.items())]


def apollo_groups(model: nn.Module, settings: Settings) -> list[Any]:
    """APOLLO-Mini: one scale a matrix, from a random projection to rank 1, with the published numbers."""
    matrices, others = _layer_matrices(model)
    projection = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": 200}
    return [{"params": others}, {"params": matrices, "proj_type": "std", **projection}]


def adapters(model: nn.Module, loss: Loss, settings: Settings, **own: Any) -> Method:
    """LoRA of peft on all linear layers, with ``own`` options of LoraConfig."""
    from peft import LoraConfig, get_peft_model

    rank = settings.lora_rank
    options: dict[str, Any] = {"lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **own}
    config = LoraConfig(r=rank, **options)
    wrapped = get_peft_model(model, config)  # changes ``model`` in place, so the loss goes through the adapters
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return Method(wrapped, loss, torch.optim.AdamW(trained, lr=settings.lr, fused=True, **ADAM), settings)


# ---- float32 copies ----


class MasterAdamW(torch.optim.Optimizer):
    """Fused AdamW of torch on float32 copies of the weights that are not float32.

    Attributes:
        masters: for each parameter its float32 copy, or the parameter itself where it is float32.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        weights = list(model.parameters())
        self.masters = [w if w.dtype == torch.float32 else nn.Parameter(w.detach().float()) for w in weights]
        self.pairs = [(w, master) for w, master in zip(weights, self.masters, strict=True) if w is not master]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, fused=True, **ADAM)
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the copies from the weights' gradients, then round them into the weights."""
        for weight, master in self.pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        for group in self.adamw.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.adamw.step()
        for weight, master in self.pairs:
            weight.copy_(master)
            master.grad = None

    def bytes_by_category(self) -> dict[str, int]:
        """At the update, when the float32 gradients have replaced the weights' own."""
        totals = state_bytes(nn.ParameterList(self.masters), self.adamw.state)
        return totals | ({"master_weights": sum(m.nbytes for _, m in self.pairs)} if self.pairs else {})


def adamw_fp32(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """AdamW with float32 states and float32 master weights; on a float32 model torch's fused AdamW itself."""
    optimizer = MasterAdamW(model, settings.lr)
    return Method(model, loss, optimizer, settings, optimizer.bytes_by_category)


def badam(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """BAdam: one layer at a time in random order, float32 copies of its weights and gradients."""
    base = torch.optim.AdamW(model.parameters(), lr=settings.lr, **ADAM)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # it prints whenever it switches
        from badam import BlockOptimizer

        named, every = list(model.named_parameters()), settings.inner_steps
        optimizer = BlockOptimizer(base, named, switch_block_every=every, switch_mode="random", verbose=0)
    logging.getLogger("badam.block_optim").setLevel(logging.WARNING)

    def account() -> dict[str, int]:
        totals = state_bytes(model, base.state)
        totals["master_weights"] = masters = sum(p.nbytes for p in optimizer.param_idx2hp.values())
        totals["gradients"] += masters  # it makes an fp32 copy of each gradient before the step
        return totals

    return Method(model, loss, optimizer, settings, account, switches=lambda: optimizer.global_step // every)


# ---- update inside the backward pass ----


class InBackward(Method):
    """LOMO and AdaLomo: the backward pass updates each weight and frees its gradient."""

    def step(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """As Method.step, for one micro-batch; clipping costs a backward pass of its own, which measures the norm."""
        (ids,) = micro_batches
        with phase("forward"):
            loss = self.loss(ids)
        optimizer: Any = self.optimizer
        if self.settings.max_grad_norm is not None:
            with phase("clip"):
                optimizer.grad_norm(loss)
        with phase("backward"):
            optimizer.fused_backward(loss, self.settings.lr)
        return loss.detach()


def in_backward(model: nn.Module, loss: Loss, settings: Settings, *, kind: str) -> Method:
    """A class of lomo-optim by its name, Lomo or AdaLomo."""
    if settings.accumulation > 1:
        raise Unavailable(f"unsupported: lomo-optim's {kind} updates inside each backward pass; use accumulation 1")
    if kind == "AdaLomo":
        require_cuda(model, "lomo-optim's AdaLomo makes its state there whatever the model's device")
    import lomo_optim

    optimizer = getattr(lomo_optim, kind)(model, lr=settings.lr, clip_grad_norm=settings.max_grad_norm)
    sizes = sorted(model.parameters(), key=lambda p: p.numel())[-2:]

    def account() -> dict[str, int]:
        # One gradient waits for its update while the next arrives; the update is made in float32.
        totals = {"gradients": sum(p.nbytes for p in sizes), "temporaries": 8 * sizes[-1].numel()}
        tables = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
        moments = sum(t.nbytes for table in tables for t in getattr(optimizer, table, {}).values())
        return totals | ({"second_moment": moments} if moments else {})

    return InBackward(model, loss, optimizer, settings, account, clips_inside=True)

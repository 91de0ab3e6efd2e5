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

from misa_engine.bench.method import Build, Loss, Method, Settings, Unavailable, ordinary, state_bytes
from misa_engine.engine.marks import phase
from misa_engine.method.partition import partition

ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


# ---- all parameters ----


def adamw(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """AdamW of torch, fused; its states have the weights' dtype."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True, **ADAM)
    return ordinary("adamw", model, loss, optimizer, settings)


class MasterAdamW(torch.optim.Optimizer):
    """Fused AdamW of torch on float32 copies of the weights that are not float32.

    Attributes:
        masters: for each parameter its float32 copy, or the parameter itself where it is float32.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.weights = list(model.parameters())
        self.masters = [w if w.dtype == torch.float32 else nn.Parameter(w.detach().float()) for w in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, fused=True, **ADAM)
        super().__init__(self.weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the copies from the weights' gradients, then round them into the weights."""
        pairs = [(w, master) for w, master in zip(self.weights, self.masters, strict=True) if w is not master]
        for weight, master in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        for group in self.adamw.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.adamw.step()
        for weight, master in pairs:
            weight.copy_(master)
            master.grad = None

    def bytes_by_category(self) -> dict[str, int]:
        """At the update, when the float32 gradients have replaced the weights' own."""
        totals = state_bytes(nn.ParameterList(self.masters), self.adamw.state)
        copies = [m for w, m in zip(self.weights, self.masters, strict=True) if w is not m]
        return totals | ({"master_weights": sum(m.nbytes for m in copies)} if copies else {})


def adamw_fp32(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """AdamW with float32 states and float32 master weights; on a float32 model torch's fused AdamW itself."""
    optimizer = MasterAdamW(model, settings.lr)
    return Method("adamw-fp32", model, loss, optimizer, settings, optimizer.bytes_by_category)


def packaged(name: str, module: str, class_name: str, *, cuda_only: str = "", **own: Any) -> Build:
    """An optimizer over all parameters that another package makes.

    Args:
        name: of the method.
        module: where the class is.
        class_name: of the optimizer.
        cuda_only: why it cannot run elsewhere; empty when it can.
        **own: its options beside learning rate and Adam's numbers.
    """

    def build_packaged(model: nn.Module, loss: Loss, settings: Settings) -> Method:
        if cuda_only and next(model.parameters()).device.type != "cuda":
            raise Unavailable(f"needs CUDA: {cuda_only}")
        optimizer = getattr(import_module(module), class_name)(model.parameters(), lr=settings.lr, **ADAM, **own)
        return ordinary(name, model, loss, optimizer, settings)

    return build_packaged


# ---- low-rank gradients ----


def _layer_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the layers, and all other parameters (embeddings, head, norms)."""
    names = {name for unit in partition(model).units for name in unit.params}
    everything = dict(model.named_parameters())
    matrices = [p for name, p in everything.items() if name in names and p.ndim == 2]
    inside = {id(p) for p in matrices}
    return matrices, [p for p in everything.values() if id(p) not in inside]


def galore(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """AdamW on gradients projected to a low rank, with the published gap, scale and kind of projection."""
    from galore_torch import GaLoreAdamW

    matrices, others = _layer_matrices(model)
    by_rank: dict[int, list[nn.Parameter]] = defaultdict(list)
    for matrix in matrices:
        by_rank[min(settings.galore_rank, *matrix.shape)].append(matrix)
    projection = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": members, "rank": rank, **projection} for rank, members in by_rank.items()]
    optimizer = GaLoreAdamW([{"params": others}, *groups], lr=settings.lr, no_deprecation_warning=True, **ADAM)
    return ordinary("galore", model, loss, optimizer, settings)


def apollo(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """APOLLO-Mini: one scale a matrix, from a random projection to rank 1, with the published numbers."""
    from apollo_torch import APOLLOAdamW

    matrices, others = _layer_matrices(model)
    projection = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": 200}
    groups = [{"params": others}, {"params": matrices, "proj_type": "std", **projection}]
    return ordinary("apollo", model, loss, APOLLOAdamW(groups, lr=settings.lr, **ADAM), settings)


# ---- adapters ----


def adapters(name: str, **own: Any) -> Build:
    """LoRA of peft on all linear layers, with ``own`` options of LoraConfig."""

    def build_adapters(model: nn.Module, loss: Loss, settings: Settings) -> Method:
        from peft import LoraConfig, get_peft_model

        rank = settings.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **own)
        wrapped = get_peft_model(model, config)  # changes ``model`` in place, so the loss goes through the adapters
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=True, **ADAM)
        return ordinary(name, wrapped, loss, optimizer, settings)

    return build_adapters


# ---- blocks of layers ----


def badam(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """BAdam: one layer at a time in random order, float32 copies of its weights and gradients."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # it prints whenever it switches
        from badam import BlockOptimizer

        base = torch.optim.AdamW(model.parameters(), lr=settings.lr, **ADAM)
        optimizer = BlockOptimizer(
            base_optimizer=base,
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=settings.inner_steps,
            switch_mode="random",
            verbose=0,
        )
    logging.getLogger("badam.block_optim").setLevel(logging.WARNING)

    def account() -> dict[str, int]:
        totals = state_bytes(model, base.state)
        masters = list(optimizer.param_idx2hp.values())
        totals["master_weights"] = sum(p.nbytes for p in masters)
        totals["gradients"] += sum(p.nbytes for p in masters)  # it makes an fp32 copy of each gradient before the step
        return totals

    return Method(
        "badam", model, loss, optimizer, settings, account,
        switches=lambda: optimizer.global_step // settings.inner_steps,
    )  # fmt: skip


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


def in_backward(name: str, kind: str) -> Build:
    """A class of lomo-optim by its name, Lomo or AdaLomo."""

    def build_in_backward(model: nn.Module, loss: Loss, settings: Settings) -> Method:
        if settings.accumulation > 1:
            raise Unavailable(f"unsupported: lomo-optim's {kind} updates inside each backward pass; use accumulation 1")
        if kind == "AdaLomo" and next(model.parameters()).device.type != "cuda":
            raise Unavailable("needs CUDA: lomo-optim's AdaLomo makes its state there whatever the model's device")
        import lomo_optim

        optimizer = getattr(lomo_optim, kind)(model, lr=settings.lr, clip_grad_norm=settings.max_grad_norm)
        sizes = sorted(model.parameters(), key=lambda p: p.numel())[-2:]

        def account() -> dict[str, int]:
            # One gradient waits for its update while the next arrives; the update is made in float32.
            totals = {"gradients": sum(p.nbytes for p in sizes), "temporaries": 8 * sizes[-1].numel()}
            tables = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
            moments = sum(t.nbytes for table in tables for t in getattr(optimizer, table, {}).values())
            return totals | ({"second_moment": moments} if moments else {})

        return InBackward(name, model, loss, optimizer, settings, account, clips_inside=True)

    return build_in_backward

"""Two copies of one model, the engine's and plain torch's, through the same micro-batches; gradients must be equal.

Before each step plain torch's copy gets the engine's weights, so that a rounding cannot grow, and every parameter of it
is trainable. A call that does not accumulate must leave ``p.grad`` alone.

A gradient that autograd computes has the same bits on both sides. One that the GEMM writes may differ by what another
order of the same float32 sums gives (2e-5 of the largest element; worst seen 3e-6), in bfloat16 by one rounding (2^-8
of every summand and sum) a micro-batch; worst seen 1.2 of that.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine import MISA
from models import VOCABULARY
from soak.cases import ACCUMULATING, Case
from soak.entrypoints import TABLE, loss_of
from soak.oracle import AdamOracle, Finding, ScoreOracle

Gradients = dict[str, Tensor | None]


def gradients_of(model: nn.Module) -> Gradients:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def install_hooks(case: Case, model: nn.Module) -> None:
    """What a user hangs on a model before the optimizer is built: the same on every copy."""
    dice = random.Random(case.seed)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = dice.sample(linear, min(4, len(linear)))
    for index, module in enumerate(chosen):
        if case.hooks == "mask":  # only some rows train
            mask = (torch.arange(module.out_features) % 2 == index % 2).to(module.weight.dtype)[:, None]
            module.weight.register_hook(lambda g, mask=mask: g * mask)
        elif case.hooks == "accumulated":
            module.weight.register_post_accumulate_grad_hook(_halve)
        elif case.hooks == "module":
            module.register_forward_hook(lambda m, args, out: out * 1.25)
            module.register_full_backward_hook(_scale_input_gradient)
        elif case.hooks == "activation":
            module.register_forward_hook(_halve_gradient)


def _halve(parameter: Tensor) -> None:
    if parameter.grad is None:  # an old graph walked after a switch; MISA's own hook, which comes next, refuses it
        return
    parameter.grad.mul_(0.5)


def _scale_input_gradient(module: nn.Module, inwards: Any, outwards: Any) -> Any:
    return tuple(None if g is None else g * 0.75 for g in inwards)


def _halve_gradient(module: nn.Module, args: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda g: g * 0.5)


class Pair:
    """State of one case: both models, the optimizer and the oracles."""

    def __init__(self, case: Case):
        self.case, self.counts = case, Counter[str]()
        self.dice = random.Random(case.seed)
        self.model = case.build()
        self.twin = copy.deepcopy(self.model)
        install_hooks(case, self.model)
        install_hooks(case, self.twin)
        self.optimizer = MISA(self.model, **case.options)
        config = self.optimizer.config
        self.members = {unit.name: unit.params for unit in self.optimizer.units}
        self.sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        numel = {unit: sum(self.sizes[name] for name in names) for unit, names in self.members.items()}
        self.always = tuple(self.optimizer.partition.always)
        self.adam = AdamOracle(self.twin, config)
        self.scores: ScoreOracle | None = ScoreOracle(self.members, numel, config)
        self.names = self._names()
        self.adam.begin_round(self._weights(), self.names, (), self.always)
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3) if case.clip.startswith("scaler") else None
        )
        self.skipped = 0
        self.generator = torch.Generator().manual_seed(case.seed)
        self.summands: dict[str, Tensor] = {}
        self.backwards, self.merged = 0, False  # merged: uses that the summands do not show one by one
        # autograd's own gradients are copied or added as they are: not one bit may differ
        self.other_sums = config.gemm_gradients or config.grad_dtype == "float32" or case.zero == "zero"
        owners = Counter(id(p) for module in self.model.modules() for p in module._parameters.values() if p is not None)
        self.reused = {name for name, p in self.model.named_parameters() if owners[id(p)] > 1 or "twice" in name}

    def _check_active(self) -> None:
        config = self.optimizer.config
        size = sum(self.sizes[name] for unit in self.optimizer.active for name in self.members[unit])
        if size > math.floor(config.delta * sum(self.sizes.values())):
            raise Finding(f"active units hold {size} parameters, over the budget")
        for name, parameter in self.model.named_parameters():
            active = name in self.names
            if parameter.requires_grad != active:
                raise Finding(f"{name}.requires_grad is {parameter.requires_grad}, active is {active}")
            if not active and parameter.grad is not None:
                raise Finding(f"inactive {name} holds a gradient")

    # ---- micro-batches ----

    def _batch(self) -> Tensor:
        return torch.randint(3, VOCABULARY, (2, 6), generator=self.generator)

    def _micro_batches(self, step: int, poison: str) -> None:
        case = self.case
        entries = [entry for entry in case.entries if self.dice.random() < 0.5]
        last = case.accumulation - case.backward  # after the last one, weights are already new
        when = {entry: self.dice.randint(0, last) for entry in entries}
        for micro in range(case.accumulation + 1):
            for entry in entries:
                if when[entry] == micro:
                    self._entry(entry, 1000 * step + micro)
            if micro < case.accumulation:
                self.optimizer.last_micro_batch = micro == case.accumulation - 1
                factor = math.inf if poison == "loss" and micro == case.accumulation - 1 else 1 / case.accumulation
                self._both_backward(self._batch(), 1000 * step + micro, factor)
        if poison != "loss" and not case.backward:
            self._check_gradients()

    def _both_backward(self, ids: Tensor, seed: int, factor: float) -> None:
        before = gradients_of(self.twin)
        loss = self._loss(self.twin, ids, seed)
        (loss * factor).backward()
        self._note_summands(before)
        loss = self._loss(self.model, ids, seed) * factor
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()

    def _loss(self, model: nn.Module, ids: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
            return loss_of(model, ids)

    def _note_summands(self, before: Gradients) -> None:
        """What went into each gradient, to know how far roundings can take it."""
        self.backwards += 1
        for name, parameter in self.twin.named_parameters():
            if parameter.grad is not None:
                earlier = before[name]
                added = parameter.grad if earlier is None else parameter.grad - earlier
                total = added.double().abs() + parameter.grad.double().abs()
                self.summands[name] = self.summands.get(name, torch.zeros(())) + total

    def _entry(self, entry: str, seed: int) -> None:
        """Call one entry point on both models and compare what comes out."""
        names = [name for name in self.names if self.model.get_parameter(name).ndim == 2][:3]
        ids, function, accumulates = self._batch(), TABLE[entry], entry in ACCUMULATING
        kept = gradients_of(self.twin)
        torch.manual_seed(seed)
        try:
            wanted = function(self.twin, ids, names)
        except Exception:  # plain torch cannot do it with this model (flash attention twice, vmap over indexing, …)
            for name, parameter in self.twin.named_parameters():
                parameter.grad = kept[name]
            self.twin.train()
            self.counts["entries that plain torch cannot do either"] += 1
            return
        if accumulates:
            self.merged = True
            self._note_summands(kept)
        else:
            for name, parameter in self.twin.named_parameters():  # "copied" and the like: exactly as before
                assert (parameter.grad is None) == (kept[name] is None)
        mine, weights = gradients_of(self.model), self._weights()
        torch.manual_seed(seed)
        scale = self.scaler.get_scale() if self.scaler is not None and accumulates else 1.0
        if scale != 1.0:  # gradients in p.grad are scaled ones: bring these to the same scale
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        found = function(self.model, ids, names)
        if scale != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self.counts[f"entry {entry}"] += 1
        for name, value in wanted.items():
            if name not in found:
                raise Finding(f"{entry}: no value for {name}")
            self._close(value, found[name], f"{entry}: {name}")
        if not accumulates:
            for name, gradient in gradients_of(self.model).items():
                if not _same(mine[name], gradient):
                    raise Finding(f"{entry} changed the gradient of {name}")
        for name, weight in self._weights().items():
            if not torch.equal(weights[name], weight):
                raise Finding(f"{entry} changed the weight {name}")

    def _close(self, wanted: Tensor, found: Tensor, what: str) -> None:
        coarse = self.case.bf16 or self.case.autocast
        error, size = (wanted.double() - found.double()).norm(), wanted.double().norm()
        if not error <= (0.1 if coarse else 1e-3) * size + 1e-9 and bool(wanted.isfinite().all()):
            raise Finding(f"{what} differs from plain torch by {error:.3g} of {size:.3g}")

    def _check_gradients(self) -> None:
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        for name in self.names:
            wanted, found = self.twin.get_parameter(name).grad, self.model.get_parameter(name).grad
            if (wanted is None) != (found is None):
                if wanted is not None and not wanted.any():
                    continue  # plain torch's zeros of a layer that gets no token
                raise Finding(f"gradient of {name}: {_kind(found)}, plain torch has {_kind(wanted)}")
            if wanted is None or found is None or not bool(wanted.isfinite().all()):
                continue
            error = (found.double() / scale - wanted.double()).abs()
            allowed = torch.zeros(()).double()
            if (self.other_sums and name in self.reused) or (
                self.merged and self.other_sums
            ):  # the order of the uses is not the order of the sums
                allowed = 2.0**-6 * (self.summands[name].norm() if self.case.bf16 else 1e-3 * self.summands[name].max())
            elif self.other_sums:
                allowed = 2e-5 * self.summands[name].max() + 1e-12
                if self.case.bf16 or self.case.autocast:
                    allowed = allowed + 1.5 * 2.0**-8 * self.summands[name]
            if not bool((error <= allowed).all()):
                raise Finding(
                    f"gradient of {name} is off by {error.max():.3g} (norm {found.double().norm() / scale:.6g}, plain "
                    f"torch {wanted.double().norm():.6g})"
                )
            self.counts["gradients"] += 1

    # ---- small things ----

    def _names(self) -> tuple[str, ...]:
        self._round_length = self.optimizer.tracker.round_length
        drawn = [name for unit in self.optimizer.active for name in self.members[unit]]
        return (*self.always, *drawn)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def _sync(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.twin.named_parameters():
            parameter.copy_(weights[name])

    def _clear(self) -> None:
        how = self.case.zero
        if how == "never" and self.backwards < 12:
            return
        if how in ("none", "never"):
            self.optimizer.zero_grad()
            self.twin.zero_grad()
        elif how == "zero":
            self.optimizer.zero_grad(set_to_none=False)
            self.twin.zero_grad(set_to_none=False)
        elif how == "model":
            self.model.zero_grad()
            self.twin.zero_grad()
        else:
            for parameter in (*self.model.parameters(), *self.twin.parameters()):
                parameter.grad = None
        self.summands, self.backwards, self.merged = {}, 0, False


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def _kind(gradient: Tensor | None) -> str:
    return "none" if gradient is None else f"one of norm {gradient.double().norm():.4g}"

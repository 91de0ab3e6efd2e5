"""One case, step by step: the caller's edits and clipping, the update, old graphs, a checkpoint in between.

Checked in each step beside the gradients (``pair.py``): the weights after it (``oracle.py``), the bits of what is
inactive, the budget, and at the end of a round the scores and the number of skipped steps.
"""

from __future__ import annotations

import copy
import io
import math
from collections import Counter

import torch
from torch import Tensor, nn

from misa_engine import MISA
from soak.oracle import Finding
from soak.pair import Gradients, Pair, gradients_of, install_hooks


class Run(Pair):
    """A pair of models and what is done to them from step to step."""

    def all_steps(self) -> Counter[str]:
        for step in range(self.case.steps):
            self.step(step)
            self.counts["steps"] += 1
            if self.case.reload and step == self.case.steps // 2:
                self._reload()
        return self.counts

    # ---- one step ----

    def step(self, step: int) -> None:
        case, optimizer = self.case, self.optimizer
        lr = float(case.options["lr"]) * (1 - step / (2 * case.steps) if case.schedule else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._check_active()
        before = self._weights()
        self._sync(before)
        self._clear()
        poison = case.nonfinite if case.nonfinite != "none" and self.dice.random() < 0.25 else "none"
        old_graph = self._keep_graph(step) if case.walk_old_graph and self.dice.random() < 0.5 else None
        if case.closure:
            used = self._closure_step(step)
            raw, clip, stepped = gradients_of(self.twin), self._own_clip(used), True
        else:
            self._micro_batches(step, poison)
            raw = gradients_of(self.twin)
            used, clip, stepped = self._edits_and_step(poison)
        self._judge(before, raw, used, clip, lr, stepped=stepped, poisoned=poison != "none")
        if old_graph is not None:
            self._walk(*old_graph)

    # ---- from gradients to weights ----

    def _own_clip(self, used: Gradients) -> float:
        bound = self.optimizer.config.max_grad_norm
        return 1.0 if bound is None else _factor(used, bound)

    def _edits_and_step(self, poison: str) -> tuple[Gradients, float, bool]:
        """The caller's edits and clipping, then the step. Returns gradients as used, clip factor, whether it ran."""
        case, optimizer = self.case, self.optimizer
        if case.backward:
            optimizer.step()
            return {name: self.twin.get_parameter(name).grad for name in self.names}, 1.0, True
        present = [p for name in self.names if (p := self.model.get_parameter(name)).grad is not None]
        if present and poison in ("data", "in_place"):
            victim = self.dice.choice(present)
            if poison == "data":
                victim.grad.data.div_(0)
            else:
                victim.grad.view(-1)[0] = math.nan
        elif present:
            self._edit(present)
        if self.scaler is not None and any(p.grad is not None for p in present):
            self.scaler.unscale_(optimizer)
        clip = None
        if case.clip in ("torch", "scaler_torch"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        elif case.clip == "value" and poison == "none" and any(p.grad is not None for p in present):
            torch.nn.utils.clip_grad_value_(self.model.parameters(), 1e-3)
        used = {name: gradient for name, gradient in gradients_of(self.model).items() if name in self.names}
        if case.clip in ("ours", "scaler"):
            clip = _factor(used, 0.05)
            norm = float(optimizer.clip_grad_norm_(0.05))
            if not math.isclose(norm, float(_norm(used)), rel_tol=1e-3, abs_tol=1e-12) and math.isfinite(norm):
                raise Finding(f"clip_grad_norm_ gave {norm}, the gradients have {float(_norm(used))}")
        steps = optimizer.total_steps
        if self.scaler is not None and any(gradient is not None for gradient in used.values()):
            try:
                self.scaler.step(optimizer)
            except ValueError as error:  # by name, and then nothing may have changed
                if case.clip != "scaler_torch" or "unscale_" not in str(error):
                    raise
                self.counts["steps refused: torch's clipping after GradScaler.unscale_"] += 1
            self.scaler.update()
        else:
            optimizer.step()
        return used, self._own_clip(used) if clip is None else clip, optimizer.total_steps > steps

    def _edit(self, present: list[nn.Parameter]) -> None:
        edit = self.case.edit
        chosen = self.dice.sample(present, self.dice.randint(1, len(present)))
        for parameter in chosen:
            assert parameter.grad is not None
            if edit == "data":
                parameter.grad.data.mul_(1e-3)
            elif edit == "in_place":
                parameter.grad.mul_(3.0)
            elif edit == "replaced":
                parameter.grad = parameter.grad * 0.5
                self.scores = None  # what a raw gradient would be nobody can say
            elif edit == "dropped":
                parameter.grad = None
                self.scores = None

    def _closure_step(self, step: int) -> Gradients:
        seen: Gradients = {}

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            for micro in range(self.case.accumulation):
                self._both_backward(self._batch(), 1000 * step + micro, 1 / self.case.accumulation)
            self._check_gradients()
            seen.update({name: g for name, g in gradients_of(self.model).items() if name in self.names})
            return torch.tensor(7.0)

        if float(self.optimizer.step(closure)) != 7.0:
            raise Finding("step(closure) did not return the closure's loss")
        return seen

    def _judge(
        self,
        before: dict[str, Tensor],
        raw: Gradients,
        used: Gradients,
        clip: float,
        lr: float,
        *,
        stepped: bool,
        poisoned: bool,
    ) -> None:
        """Hold what the step did to what it should have done."""
        optimizer = self.optimizer
        after, names = self._weights(), self.names
        finite = all(g is None or bool(g.isfinite().all()) for g in used.values())
        expected: dict[str, Tensor] = {}
        if stepped and finite:
            expected = self.adam.step(before, used, lr, clip)
            if self.scores is not None:
                self.scores.measure({name: raw[name] for name in used if used[name] is not None}, used, clip)
        elif stepped:
            self.skipped += 1 if not self.case.backward else 0
        skips = (
            self.case.model.get("layerdrop") or self.case.family == "sequential"
        )  # the poisoned pass may reach nobody
        if poisoned and finite and not skips and any(g is not None for g in used.values()):
            raise AssertionError("the harness poisoned nothing")
        ended = stepped and optimizer.inner_step == 0
        if ended:
            self.adam.close_round(before, expected, [name for name in names if name not in self.always], lr)
            self._round_ends()
        left = set(names) - set(self.names)
        self.adam.check(before, after, expected, lr, left)
        if ended:
            self.adam.begin_round(after, self.names, names, self.always)

    def _round_ends(self) -> None:
        optimizer = self.optimizer
        event = optimizer.events[-1]
        if not self.case.backward and optimizer.skipped_steps != self.skipped:
            raise Finding(f"skipped_steps is {optimizer.skipped_steps}, {self.skipped} steps had a non-finite gradient")
        if self.scores is not None:
            active = [unit for unit in self.members if unit in {*event.left, *event.kept}]
            self.scores.close_round(active, self._round_length)
            self.scores.check(optimizer.scores, 0.03 if self.case.bf16 or self.case.autocast else 1e-3)
            self.counts["rounds with scores"] += 1
        self.names = self._names()
        for parameter in self.twin.parameters():
            parameter.grad = None
        self.summands, self.backwards, self.merged = {}, 0, False

    # ---- old graphs and checkpoints ----

    def _keep_graph(self, step: int) -> tuple[nn.Module, Tensor, Tensor]:
        """A graph of the engine's model, and of a plain one with the same frozen weights, for after the step."""
        plain = copy.deepcopy(self.twin)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name in self.names)
            parameter.grad = None
        ids = self._batch()
        return plain, self._loss(plain, ids, step), self._loss(self.model, ids, step)

    def _walk(self, plain: nn.Module, wanted: Tensor, loss: Tensor) -> None:
        if self.case.backward or not wanted.requires_grad:
            return
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if parameter.requires_grad and not torch.equal(parameter, self.model.get_parameter(name)):
                    parameter.copy_(self.model.get_parameter(name))
        self.optimizer.zero_grad()
        refused = False
        try:
            wanted.backward()
        except RuntimeError:
            refused = True
        try:
            loss.backward()
        except RuntimeError:
            self.counts["old graphs refused"] += 1
        else:
            if refused:
                raise Finding("a graph of before step() was walked after it without plain torch's error")
            hooked = self.case.hooks in ("mask", "accumulated")  # a copied parameter has no hooks
            for name in () if hooked else self.names:
                first, second = plain.get_parameter(name).grad, self.model.get_parameter(name).grad
                if first is not None and second is not None:
                    self._close(first, second, f"old graph: gradient of {name}")
        self.optimizer.zero_grad()
        self.twin.zero_grad()
        self.summands, self.merged = {}, False

    def _reload(self) -> None:
        """Go on from a checkpoint, in a fresh model and optimizer."""
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = self.case.build()
        install_hooks(self.case, model)
        optimizer = MISA(model, **self.case.options)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if optimizer.active != self.optimizer.active or optimizer.scores != self.optimizer.scores:
            raise Finding("active units or scores changed by saving and loading")
        self.model, self.optimizer = model, optimizer
        self.counts["reloads"] += 1


def _norm(gradients: Gradients) -> Tensor:
    return (
        torch.stack([g.double().square().sum() for g in gradients.values() if g is not None] or [torch.zeros(())])
        .sum()
        .sqrt()
    )


def _factor(gradients: Gradients, bound: float) -> float:
    norm = float(_norm(gradients))
    return min(1.0, bound / (norm + 1e-6)) if math.isfinite(norm) else 1.0

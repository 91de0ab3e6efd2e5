"""AdamW on the engine's draws in plain float64, and the scores that follow from plain torch's gradients.

Nothing here knows arenas, slots, kernels or hooks: names of parameters, gradients and draws come in, expected weights
and scores come out. Only the names of the options are shared with the engine.

Tolerances, with their origin. A float32 update is exact to some units of 2^-24 of the weight and to 1e-5 of the
learning rate (cancellation in the first moment). A bfloat16 weight is its float32 master to half an ulp, 2^-8 of it; to
a whole ulp where it has just left, rounded stochastically. Moments in 8 bits move a step by some percent of its norm;
three quarters of it are the bound, because a single step of a tiny matrix varies (worst seen 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Finding(AssertionError):
    """The engine differs from plain torch, or raises where plain torch does not."""


@dataclass
class Remembered:
    """What Adam remembers of one parameter."""

    m: Tensor
    v: Tensor
    steps: int = 0
    coarse: bool = False  # its moments went through 8 bits


class AdamOracle:
    """Expected weights.

    Args:
        model: for names, shapes, dtypes and which parameters are embeddings.
        config: the engine's, for the options by their name.
    """

    def __init__(self, model: nn.Module, config: Any):
        self.config = config
        self._shape = {name: parameter.shape for name, parameter in model.named_parameters()}
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._decays = {name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in tables}
        self._memory: dict[str, Remembered] = {}
        self._masters: dict[str, Tensor] = {}
        self._bf16 = next(model.parameters()).dtype == torch.bfloat16
        self._split = self._bf16 and config.master == "split"

    def begin_round(
        self, weights: Mapping[str, Tensor], active: Sequence[str], before: Sequence[str], always: Sequence[str]
    ) -> None:
        """Names that train now, those of the round before, and those that train in every round."""
        keeps = self.config.revisit
        for name in set(self._memory) - set(active):
            if keeps in ("clear", "keep_adjacent"):
                del self._memory[name]
            elif keeps == "offload":
                self._memory[name].coarse = True
        for name in active:
            stays = name in before and (keeps != "clear" or name in always)
            if name in self._memory and not stays and keeps not in ("keep", "offload"):
                del self._memory[name]
        kept = self.config.leave_rounding == "keep"
        self._masters = {name: m for name, m in self._masters.items() if name in active or kept}
        for name in active:
            if name not in self._memory:
                zero = torch.zeros(self._shape[name], dtype=torch.float64)
                self._memory[name] = Remembered(zero, zero.clone())
            self._masters.setdefault(name, weights[name].double())

    def step(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lr: float, clip: float
    ) -> dict[str, Tensor]:
        """Expected float64 weights after one step; remembers the moments. ``clip`` is the factor, not the bound."""
        (beta1, beta2), eps = self.config.betas, self.config.eps
        expected = {}
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            own, g, w = self._memory[name], gradient.double() * clip, self._weight(weights, name)
            own.m = beta1 * own.m + (1 - beta1) * g
            own.v = beta2 * own.v + (1 - beta2) * g.square()
            own.steps += 1
            m, v = own.m, own.v
            if self.config.bias_correction:
                m, v = m / (1 - beta1**own.steps), v / (1 - beta2**own.steps)
            decay = lr * self.config.weight_decay if name in self._decays else 0.0
            expected[name] = w - decay * w - lr * m / (v.sqrt() + eps)
        return expected

    def close_round(
        self, weights: Mapping[str, Tensor], expected: dict[str, Tensor], names: Sequence[str], lr: float
    ) -> None:
        """Line 16 of Algorithm 1 on top of ``expected``, for the sampled names that have made a step."""
        (beta1, beta2), eps = self.config.betas, self.config.eps
        for name in names if self.config.closing_momentum else ():
            own = self._memory[name]
            if own.steps:
                root = math.sqrt(1 - beta2**own.steps) if self.config.bias_correction else 1.0
                before = expected.get(name, self._weight(weights, name))
                expected[name] = before - lr * beta1 / (1 - beta1) * own.m / (own.v.sqrt() / root + eps)

    def check(
        self,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
        lr: float,
        left: set[str],
    ) -> None:
        """Hold the engine's weights to the expected ones; what is not expected to move keeps its bits.

        Raises:
            Finding: they differ.
        """
        for name, weight in after.items():
            leaves = self._split and name in left and self.config.leave_rounding == "stochastic"
            if name not in expected and not leaves:
                if not torch.equal(before[name], weight):
                    raise Finding(
                        f"{name} should have kept its bits and moved by {(weight - before[name]).abs().max():.3g}"
                    )
                continue
            start = self._weight(before, name) if name in self._masters else before[name].double()
            goal = expected.get(name, start)
            error = (weight.double() - goal).abs()
            step, bits = (goal - start).abs(), torch.zeros_like(error)
            if self._bf16:
                bits = goal.abs() * (2.0**-7 if leaves else 2.0**-8) * 1.01 + 1e-30
                if not self._split:  # rounded after the step and once more after line 16
                    bits = 2.0**-7 * torch.maximum(goal.abs(), start.abs())
            if self.config.state_dtype == "int8" or self._memory[name].coarse:
                # a gradient of nothing but rounding (a key's bias) has steps of nothing but 8-bit noise
                allowed = (0.75 if weight.ndim > 1 else 2.0) * step.norm() + bits.norm() + 1e-7
                if not error.norm() <= allowed:
                    raise Finding(
                        f"{name} is {error.norm():.3g} away from Adam's step of {step.norm():.3g} (8-bit moments)"
                    )
                goal = weight.double()
            else:
                allowed = 1e-3 * step + bits + 4 * 2.0**-23 * goal.abs() + 3e-5 * lr
                if not bool((error <= allowed).all()):
                    worst = int((error - allowed).argmax())
                    raise Finding(
                        f"{name} is off Adam's step at {worst}: {weight.flatten()[worst]:.9g} instead of "
                        f"{goal.flatten()[worst]:.9g}, from {start.flatten()[worst]:.9g}, lr {lr:.3g}"
                    )
            self._masters[name] = goal

    def _weight(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        return self._masters[name] if self._split else weights[name].double()


class ScoreOracle:
    """G of each unit from the norms of plain torch's gradients, by the three moving averages that the presets name.

    Args:
        members: unit -> its parameters.
        numel: parameters of each unit.
        config: the engine's.
    """

    def __init__(self, members: Mapping[str, Sequence[str]], numel: Mapping[str, int], config: Any):
        self._members, self._numel, self.config = members, numel, config
        self._stored = dict.fromkeys(members, 0.0)
        self._updates = dict.fromkeys(members, 0)
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def measure(self, raw: Mapping[str, Tensor], used: Mapping[str, Tensor], clip: float) -> None:
        """One step that was not skipped: gradients as they arrived, and as the update used them."""
        squares = self.config.score == "mean_square"
        for name, gradient in (raw if squares else used).items():
            if gradient is not None:
                norm = float(gradient.double().norm())
                self._sums[name] = self._sums.get(name, 0.0) + (norm**2 if squares else norm * clip)
                self._counts[name] = self._counts.get(name, 0) + 1

    def close_round(self, active: Sequence[str], round_length: int) -> None:
        """Let the round enter the scores of its units."""
        beta = self.config.score_beta
        for unit in active:
            measured = max(self._counts.get(name, 0) for name in self._members[unit])
            if measured:
                mean = sum(self._sums.get(name, 0.0) for name in self._members[unit]) / measured
                if self.config.score == "mean_square":
                    mean /= self._numel[unit]
                elif self.config.cold_start == "official" and round_length == 1:
                    mean /= self.config.inner_steps
                self._updates[unit] += 1
                self._stored[unit] = beta * self._stored[unit] + (1 - beta) * mean
                if self.config.ema == "official":
                    self._stored[unit] /= 1 - beta ** self._updates[unit]
        self._sums, self._counts = {}, {}

    def check(self, scores: Mapping[str, float], tolerance: float) -> None:
        """Hold the engine's scores to these.

        Raises:
            Finding: one is off by more than ``tolerance`` of its size.
        """
        corrected = self.config.ema == "corrected_on_read"
        for unit, stored in self._stored.items():
            updates = self._updates[unit]
            wanted = stored / (1 - self.config.score_beta**updates) if corrected and updates else stored
            if not math.isclose(scores[unit], wanted, rel_tol=tolerance, abs_tol=1e-20):
                raise Finding(f"score of {unit} is {scores[unit]:.6g}; raw gradients give {wanted:.6g}")

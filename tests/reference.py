"""MISA in plain PyTorch and float64: Algorithm 1 as written, without hooks, arena, kernels or preset machinery.

Every parameter stays trainable and every gradient is computed; what is not active is simply not updated. The set of
active matrices of each round is given from outside (the engine's draw), so that both follow the same path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PaperMisa:
    """Lines 5-16 of Algorithm 1 on a float64 model: no bias correction, plain EMA, closing momentum step."""

    def __init__(self, model: nn.Module, units: list[str], lr: float, betas=(0.9, 0.999), eps=1e-8, eta=1.0, beta=0.8):
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.units, self.lr, self.betas, self.eps, self.eta, self.beta = units, lr, betas, eps, eta, beta
        self.scores = dict.fromkeys(units, 0.0)

    def start_round(self, active: list[str]) -> None:
        self.active = active
        self.m = {name: torch.zeros_like(self.parameters[name]) for name in active}
        self.v = {name: torch.zeros_like(self.parameters[name]) for name in active}
        self.sums = dict.fromkeys(active, 0.0)
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2 = self.betas
        for name in self.active:
            gradient = self.parameters[name].grad
            self.sums[name] += float(gradient.square().sum()) / gradient.numel()
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * gradient
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * gradient.square()
            self.parameters[name] -= self.lr * self.m[name] / (self.v[name].sqrt() + self.eps)
        self.steps += 1

    @torch.no_grad()
    def end_round(self) -> None:
        beta1 = self.betas[0]
        for name in self.active:
            self.scores[name] = self.beta * self.scores[name] + (1 - self.beta) * self.sums[name] / self.steps
            step = self.m[name] / (self.v[name].sqrt() + self.eps)
            self.parameters[name] -= self.lr * beta1 / (1 - beta1) * step

    @property
    def probabilities(self) -> dict[str, float]:
        weights = {name: math.exp(self.eta * score) for name, score in self.scores.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}


class OfficialMisa:
    """The published code's rules: AdamW kept for ever per matrix, norms after clipping, corrected EMA fed back.

    ``round_length`` counts the divisor T, also in the one-step rounds of its cold start.
    """

    def __init__(self, model: nn.Module, units: list[str], lr: float, round_length: int, eta=1.0, beta=0.8, wd=0.0):
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.units, self.lr, self.round_length, self.eta, self.beta, self.wd = units, lr, round_length, eta, beta, wd
        self.scores = dict.fromkeys(units, 0.0)
        self.updates = dict.fromkeys(units, 0)
        self.adam = {
            name: torch.optim.AdamW([self.parameters[name]], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=wd)
            for name in units
        }

    def start_round(self, active: list[str]) -> None:
        self.active = active
        self.sums = dict.fromkeys(active, 0.0)

    def step(self) -> None:
        for name in self.active:
            self.sums[name] += float(self.parameters[name].grad.norm())
            self.adam[name].step()

    def end_round(self) -> None:
        for name in self.active:
            self.updates[name] += 1
            mean_norm = self.sums[name] / self.round_length
            mixed = self.beta * self.scores[name] + (1 - self.beta) * mean_norm
            self.scores[name] = mixed / (1 - self.beta ** self.updates[name])

    @property
    def probabilities(self) -> dict[str, float]:
        weights = {name: math.exp(min(5.0, self.eta * score**2)) for name, score in self.scores.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

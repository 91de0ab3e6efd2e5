"""MISA in the published code's way of working, in plain PyTorch: what our engine is measured against.

The method is that of the row ``misa``: partition, budget, sampling rule, inner steps, AdamW, backward pass cut at the
lowest active matrix. What differs is how it is carried out:

- At each switch every incoming matrix gets a float32 clone, and the clones a new AdamW without fused or foreach code.
- At each step every gradient is copied to float32, and every weight is copied back from its clone.
- Norms are read tensor by tensor on the host, one synchronisation each, after clipping.
- ``empty_cache()`` at each switch.

Not carried over: the published code keeps the moments of each matrix it ever visited on the device (memory grows for
the whole run); here they begin anew with each round. A matrix that is drawn again begins anew, too, where ``misa``
lets it keep its moments; a leaving bf16 matrix stays rounded to nearest; no step is skipped for a non-finite gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from misa_engine.bench.method import Loss, Method, Settings, Unavailable, state_bytes
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import check_budget, partition_for
from misa_engine.method.sampling import ImportanceTracker


class UnfusedMISA(torch.optim.Optimizer):
    """MISA step by step with clones, copies and an eager AdamW.

    Args:
        model: its inactive parameters do not require gradients afterwards.
        config: everything that chooses what trains, and AdamW's numbers.

    Attributes:
        round: switches so far.
        active: names of the matrices that train now.
        clones: their float32 copies by name.
        budget: parameters that they may hold together.
    """

    def __init__(self, model: nn.Module, config: MisaConfig) -> None:
        self.config = config
        self._parts = partition_for(model, config)
        self._weights = dict(model.named_parameters())
        self.budget = check_budget(self._parts, config.delta)
        self._tracker = ImportanceTracker([unit.numel for unit in self._parts.units], self.budget, config)
        super().__init__(list(self._weights.values()), {"lr": config.lr})
        self.round, self._steps = 0, 0
        self._begin_round()

    @torch.no_grad()
    def end_round(self) -> None:
        """Account for the round that ends, forget its clones and begin the next one."""
        self._tracker.update(self._norm_sums, [self._steps] * len(self._norm_sums))
        self.clones.clear()
        del self.adamw
        self._begin_round()
        self.round += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin_round(self) -> None:
        """Draw, clone what comes in, and make a new AdamW for the clones, its moments included."""
        units = [self._parts.units[index] for index in self._tracker.draw()]
        self.active = [*(name for unit in units for name in unit.params), *self._parts.always]
        for name, weight in self._weights.items():
            weight.requires_grad_(name in self.active)
            weight.grad = None
        self.clones = {
            name: nn.Parameter(self._weights[name].detach().to(torch.float32, copy=True)) for name in self.active
        }
        numbers = {name: getattr(self.config, name) for name in ("lr", "betas", "eps", "weight_decay")}
        self.adamw = torch.optim.AdamW(self.clones.values(), **numbers, foreach=False, fused=False)
        for clone in self.clones.values():  # otherwise a part of the first step
            moments = {"exp_avg": torch.zeros_like(clone), "exp_avg_sq": torch.zeros_like(clone)}
            self.adamw.state[clone] = {"step": torch.zeros(()), **moments}
        self._steps = 0
        self._norm_sums = [0.0] * len(units)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the active matrices from their gradients; the last step of a round switches."""
        squares = {}
        for name, clone in self.clones.items():
            gradient = self._weights[name].grad
            clone.grad = torch.zeros_like(clone) if gradient is None else gradient.to(torch.float32, copy=True)
            squares[name] = clone.grad.norm().item() ** 2
        self._measure(squares)
        for group in self.adamw.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for name, clone in self.clones.items():
            self._weights[name].copy_(clone)
        self._steps += 1
        if self._steps == self._tracker.round_length:
            self.end_round()

    def _measure(self, squares: dict[str, float]) -> None:
        """Add this step's ‖g‖² of each unit, or its root where the score is made of norms."""
        for slot, index in enumerate(self._tracker.active):
            square = sum(squares[name] for name in self._parts.units[index].params)
            self._norm_sums[slot] += square if self.config.score == "mean_square" else square**0.5

    def bytes_by_category(self) -> dict[str, int]:
        """What it holds between a backward pass and the end of the step: gradients twice, clones, moments."""
        clones = nn.ParameterList(self.clones.values())
        totals = state_bytes(clones, self.adamw.state)
        totals["master_weights"] = totals["gradients"]
        totals["gradients"] += sum(self._weights[name].nbytes for name in self.active)
        return totals


def misa_config(settings: Settings, **own: Any) -> MisaConfig:
    """The settings of a comparison as MISA's; ``own`` options of the method, the settings' own last.

    Raises:
        Unavailable: MISA has no such combination.
    """
    shared = {name: getattr(settings, name) for name in ("lr", "delta", "inner_steps", "seed")}
    try:
        # the cold start's one-step rounds are the beginning of a run, not what a run costs
        return MisaConfig.from_dict({**shared, "cold_start": "none", **own, **settings.misa})
    except ValueError as error:
        raise Unavailable(f"unsupported: {error}") from error


#: Options that only the engine has, as they must be here.
PLAIN = {
    "update_in": "step", "state_dtype": "float32", "closing_momentum": False, "bias_correction": True,
    "parameter_groups": (), "rest": "none",
}  # fmt: skip


def unfused_misa(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """The row ``unfused-misa``, with the options of the row ``misa-none``."""
    config = misa_config(settings, rest="none")
    for option, value in PLAIN.items():
        if getattr(config, option) != value:
            raise Unavailable(f"unsupported: unfused-misa has no {option}={getattr(config, option)!r}")
    try:
        optimizer = UnfusedMISA(model, config)
    except ValueError as error:
        raise Unavailable(f"unsupported: {error}") from error
    return Method(model, loss, optimizer, settings, optimizer.bytes_by_category, switches=lambda: optimizer.round)

"""The coefficients of a step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm.reference import global_norm_reference
from ..tiles import Bias, Coefficients, Control, Hyper, TileTable


def finalise_reference(
    partial: Tensor | None, hyper: Tensor, bias: Tensor, table: TileTable, control: Control, skip_nonfinite: bool
) -> None:
    """Decide the step; arguments as in ``finalise``."""
    control.skip.zero_()
    control.clip_coef.fill_(1.0)
    if partial is not None:
        norm = global_norm_reference(partial, table)
        control.grad_norm.copy_(norm)
        if skip_nonfinite:
            control.skip.copy_(~norm.isfinite())
        # clamp would turn inf/inf (no bound, norm inf) into NaN; no bound means a factor of exactly 1.
        coef = (control.max_norm / (norm + 1e-6)).clamp(max=1.0)
        control.clip_coef.copy_(torch.where(control.max_norm.isinf(), 1.0, coef))
    control.skipped_steps += control.skip

    n = len(table.slots)
    runs = table.slot_present[:n] * (1 - control.skip)
    table.slot_step[:n] += runs
    table.slot_measured[:n] += runs
    write_coefficients(hyper, bias, table, control.clip_coef, runs)


def write_coefficients(hyper: Tensor, bias: Tensor, table: TileTable, clip: Tensor, runs: Tensor) -> None:
    """The rows of ``slot_coef`` for the slots in use (see Coefficients; c₀, c₁: see ``bias_table``)."""
    row, factors = _columns(hyper, bias, table)
    coef = Coefficients(
        beta1=row["beta1"],
        gain1=row["gain1"] * clip,
        beta2=row["beta2"],
        gain2=row["gain2"] * clip * clip,
        eps=row["eps"] * factors.eps,
        minus_step=-(row["lr"] * factors.step),
        minus_decay=-row["decay"],
        runs=runs.float(),
    )
    table.slot_coef[: len(table.slots)] = torch.stack(coef, dim=1)


def closing_coefficients_reference(hyper: Tensor, bias: Tensor, table: TileTable) -> None:
    """c₁·ε, -lr·β1/(1-β1)·c₁, no decay, runs; the other columns keep what they held."""
    row, factors = _columns(hyper, bias, table)
    n = len(table.slots)
    coef = Coefficients(*table.slot_coef[:n].unbind(1))
    coef.eps.copy_(row["eps"] * factors.eps)
    coef.minus_step.copy_(-(row["closing"] * factors.eps))
    coef.minus_decay.zero_()
    coef.runs.copy_(table.slot_step[:n] > 0)


def _columns(hyper: Tensor, bias: Tensor, table: TileTable) -> tuple[dict[str, Tensor], Bias]:
    """Columns of ``hyper`` and of the bias table at the present step count, a value a slot."""
    n = len(table.slots)
    group, step = table.slot_group[:n].long(), table.slot_step[:n].long()
    row = dict(zip(Hyper._fields, hyper[group].unbind(1), strict=True))
    return row, Bias(*bias[group, step.clamp(max=bias.shape[1] - 1)].unbind(1))

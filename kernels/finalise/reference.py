"""The coefficients of a step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm.reference import global_norm_reference, norm_of_total
from ..tiles import Bias, Coefficients, Control, Hyper, TileTable


def finalise_reference(
    partial: Tensor | None,
    hyper: Tensor,
    bias: Tensor,
    table: TileTable,
    control: Control,
    skip_nonfinite: bool,
    tiles: range | None,
    total: Tensor | None,
) -> None:
    """Decide the step; arguments as in ``finalise``."""
    control.skip.zero_()
    control.clip_coef.fill_(1.0)
    if partial is not None:
        norm = global_norm_reference(partial, table, tiles) if total is None else norm_of_total(total.view(()))
        control.grad_norm.copy_(norm)
        if skip_nonfinite:
            control.skip.copy_(~norm.isfinite())
        # clamp would turn inf/inf (no bound, norm inf) into NaN; no bound means a factor of exactly 1.
        coef = (control.max_norm / (norm + 1e-6)).clamp(max=1.0)
        control.clip_coef.copy_(torch.where(control.max_norm.isinf(), 1.0, coef))
    control.skipped_steps += control.skip

    here = slice(len(table.slots))
    present = table.slot_present[here]
    if tiles is not None:
        ((index, _),) = table.slots_in(tiles)
        here = slice(index, index + 1)
        present = torch.ones_like(table.slot_present[here])
    runs = present * (1 - control.skip)
    table.slot_step[here] += runs
    table.slot_measured[here] += runs
    write_coefficients(hyper, bias, table, control.clip_coef, runs, here)


def write_coefficients(hyper: Tensor, bias: Tensor, table: TileTable, clip: Tensor, runs: Tensor, here: slice) -> None:
    """The rows of ``slot_coef`` for the slots ``here`` (see Coefficients; c₀, c₁: see ``bias_table``)."""
    row, factors = _columns(hyper, bias, table, here)
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
    table.slot_coef[here] = torch.stack(coef, dim=1)


def closing_coefficients_reference(hyper: Tensor, bias: Tensor, table: TileTable) -> None:
    """c₁·ε, -lr·β1/(1-β1)·c₁, no decay, runs; the other columns keep what they held."""
    n = len(table.slots)
    row, factors = _columns(hyper, bias, table, slice(n))
    coef = Coefficients(*table.slot_coef[:n].unbind(1))
    coef.eps.copy_(row["eps"] * factors.eps)
    coef.minus_step.copy_(-(row["closing"] * factors.eps))
    coef.minus_decay.zero_()
    coef.runs.copy_(table.slot_step[:n] > 0)


def _columns(hyper: Tensor, bias: Tensor, table: TileTable, here: slice) -> tuple[dict[str, Tensor], Bias]:
    """Columns of ``hyper`` and of the bias table at the present step count, a value for each slot ``here``."""
    group, step = table.slot_group[here].long(), table.slot_step[here].long()
    row = dict(zip(Hyper._fields, hyper[group].unbind(1), strict=True))
    return row, Bias(*bias[group, step.clamp(max=bias.shape[1] - 1)].unbind(1))

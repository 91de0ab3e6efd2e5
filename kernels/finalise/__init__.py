"""What a step does to each slot, decided on the device: skip, clip factor, step counts, coefficients.

``finalise`` turns the step's norm, the hyperparameters and the bias correction into one row of coefficients a slot,
which is all that the update reads; ``closing_coefficients`` does the same for line 16 of Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import uses_triton
from ..tiles import Control, TileTable
from .reference import closing_coefficients_reference, finalise_reference


@torch.no_grad()
def finalise(
    partial: Tensor | None,  # (max_tiles,) float32, from sum_of_squares; None = no norm pass: no clipping, no skip
    hyper: Tensor,  # (n_groups, 8) float32, rows of ``hyper_row``
    bias: Tensor,  # (n_groups, rows, 2) float32, from ``bias_table``
    table: TileTable,  # slot_step, slot_measured, slot_coef are modified in place
    control: Control,  # grad_norm, skip, clip_coef, skipped_steps are modified in place
    *,
    skip_nonfinite: bool,
    backend: str,
    tiles: range | None = None,  # ``slot.tiles`` = one slot, whether it is present or not; None = all that are present
    total: Tensor | None = None,  # (1,) float64, Σ g² of several processes' shards, in place of the sum of ``partial``
) -> None:
    """Decide the step: norm, clip factor, skip, step counts, coefficients. Once a step, before ``adamw``.

    With ``tiles`` the step is that of one slot: its norm, its counts; nothing else of the table is read or written.

    clip_coef = min(1, max_norm/(norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_.
    """
    if not uses_triton(backend, hyper):
        finalise_reference(partial, hyper, bias, table, control, skip_nonfinite, tiles, total)
        return
    from .kernel import launch_finalise

    launch_finalise(partial, hyper, bias, table, control, skip_nonfinite, tiles, total)


@torch.no_grad()
def closing_coefficients(
    hyper: Tensor,  # (n_groups, 8) float32, rows of ``hyper_row``
    bias: Tensor,  # (n_groups, rows, 2) float32, from ``bias_table``
    table: TileTable,  # slot_coef is modified in place: eps, minus_step, minus_decay, runs
    *,
    backend: str,
) -> None:
    """Coefficients of line 16 of Algorithm 1, for every slot that has made a step. Once a round."""
    if not uses_triton(backend, hyper):
        closing_coefficients_reference(hyper, bias, table)
        return
    from .kernel import launch_closing_coefficients

    launch_closing_coefficients(hyper, bias, table)

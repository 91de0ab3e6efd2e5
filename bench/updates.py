"""The optimizer updates that the kernel benchmarks compare: ours and those of torch, torch-optimi and FlashOptim.

Each builds its own weights, gradients and states of the same number of parameters and gives what comes before the
update (global norm, clipping), the update, and of ours the launch without the small kernel before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from misa_engine import MisaConfig
from misa_engine.bench import traffic
from misa_engine.bench.measure import installed
from misa_engine.bench.peers import optimizer_class
from misa_engine.bench.traffic import BF16, CLIP, F32, I8, I16, MOMENTS, NORM, U8
from misa_engine.engine.arena import Arena, padded
from misa_engine.engine.update import ArenaUpdate
from misa_engine.kernels.adamw import adamw
from misa_engine.kernels.backend import choose_backend

#: Matrices among which the parameters are divided.
MATRICES = 8
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0

Work = Callable[[], object]


@dataclass(frozen=True)
class Update:
    """An update that is ready to run, any number of times."""

    weights: list[Tensor]
    """What the model computes with."""
    before: Work
    """Norm and clipping."""
    step: Work
    """All of the update that comes after."""
    launch: Work
    """The pass over the parameters alone; the same as ``step`` for those that are nothing else."""


@dataclass(frozen=True)
class Scheme:
    """One way to update."""

    build: Callable[[Sequence[int], torch.device], Update]
    """Called with the sizes of the matrices and the device."""
    before_bytes: float
    """Bytes per parameter of ``Update.before``."""
    update_bytes: float
    """Bytes per parameter of the rest."""
    package: str = ""
    """What it needs, as pip names it."""
    needs_cuda: bool = False

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here; None when it can."""
        if self.package and not installed(self.package):
            return f"missing: pip install {self.package}"
        return "needs a CUDA device" if self.needs_cuda and device.type != "cuda" else None


def sizes_of(parameters: int) -> list[int]:
    """About ``parameters`` parameters, in equal matrices without padding."""
    return [padded(max(1, parameters // MATRICES))] * MATRICES


def draws(sizes: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float) -> list[Tensor]:
    """Random matrices, flat; the same ones each time."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.empty(size, dtype=dtype, device=device).normal_(std=scale, generator=generator) for size in sizes]


# ---- ours ----


def bound_arena(
    sizes: Sequence[int], device: torch.device, dtype: torch.dtype, state: str
) -> tuple[Arena, ArenaUpdate, str]:
    """An arena full of parameters of ``dtype`` whose gradients have arrived, its kernels and their backend."""
    backend = choose_backend("auto", device)
    capacity = sum(map(padded, sizes))
    arena = Arena(capacity, len(sizes), dtype=dtype, device=device, split=dtype == BF16, state_dtype=state)
    weights = {f"weight.{index}": weight for index, weight in enumerate(draws(sizes, dtype, device, 0.02))}
    arena.bind(weights, dict.fromkeys(weights, 0), {})
    assert arena.grad is not None
    for slot, gradient in zip(arena.slots, draws(sizes, dtype, device, 1e-3), strict=True):
        arena.grad[slot.start : slot.start + slot.numel] = gradient
    arena.table.slot_present.fill_(1)
    update = ArenaUpdate(arena, 1, MisaConfig(max_grad_norm=MAX_NORM, state_dtype=state), backend)
    update.set_hyperparameters([HYPERPARAMETERS], MAX_NORM)
    return arena, update, backend


def _misa(dtype: torch.dtype, state: str) -> Scheme:
    def build(sizes: Sequence[int], device: torch.device) -> Update:
        arena, update, backend = bound_arena(sizes, device, dtype, state)
        update.measure()
        update.step()  # leaves the coefficients that the launch alone reads

        def launch() -> None:
            assert arena.grad is not None
            buffers = arena.grad, arena.exp_avg, arena.exp_avg_sq, arena.residual, arena.tile_sumsq
            m_scale, v_scale = arena.exp_avg_scale, arena.exp_avg_sq_scale
            adamw(*buffers, arena.table, backend=backend, m_scale=m_scale, v_scale=v_scale)

        return Update([slot.weight for slot in arena.slots], update.measure, update.step, launch)

    return Scheme(build, NORM[dtype], traffic.fused(dtype, MOMENTS[state], [I16] if dtype == BF16 else []))


# ---- others ----


def _with_gradients(
    sizes: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Work]:
    """Leaf tensors that have a ``.grad``, these gradients, and what clips them."""
    parameters, gradients = draws(sizes, dtype, device, 0.02), draws(sizes, dtype, device, 1e-3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_().grad = gradient
    return parameters, gradients, lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def _optimizer(name: str, dtype: torch.dtype, update_bytes: float, package: str = "", **own: Any) -> Scheme:
    """A torch optimizer, by its class, after ``clip_grad_norm_``."""

    def build(sizes: Sequence[int], device: torch.device) -> Update:
        parameters, _, clip = _with_gradients(sizes, device, dtype)
        step = optimizer_class(name)(parameters, **HYPERPARAMETERS, **own).step
        return Update(parameters, clip, step, step)

    needs_cuda = package == "flashoptim"
    return Scheme(build, NORM[dtype] + CLIP[dtype], update_bytes, package, needs_cuda)


def _torch_master(clips: bool) -> Scheme:
    """bfloat16 model, float32 master: torch's fused AdamW with a cast before and a copy back after."""

    def build(sizes: Sequence[int], device: torch.device) -> Update:
        weights, gradients, clip = _with_gradients(sizes, device, BF16)
        masters, wide, _ = _with_gradients(sizes, device, F32)
        models = [weight.detach() for weight in weights]
        torch._foreach_copy_([master.detach() for master in masters], models)
        adam = torch.optim.AdamW(masters, fused=True, **HYPERPARAMETERS)

        def update() -> None:
            torch._foreach_copy_(wide, gradients)
            adam.step()
            torch._foreach_copy_(models, [master.detach() for master in masters])

        return Update(weights, clip if clips else lambda: torch.nn.utils.get_total_norm(gradients), update, update)

    return Scheme(build, NORM[BF16] + (CLIP[BF16] if clips else 0), traffic.TORCH_WITH_MASTER)


def _flash(bits: int, correction: torch.dtype) -> Scheme:
    scale = (torch.float16, 32)
    moved = traffic.fused(BF16, [I8, U8, scale, scale], [correction])
    return _optimizer("flashoptim.FlashAdamW", BF16, moved, "flashoptim", master_weight_bits=bits)


_ADAMW = "torch.optim.AdamW"
#: Rows of the tables. torch-default is what ``torch.optim.AdamW(...)`` gives: foreach on a GPU, a loop on a CPU.
SCHEMES: dict[str, Scheme] = {
    "misa-bf16-fp32": _misa(BF16, "float32"),
    "misa-bf16-int8": _misa(BF16, "int8"),
    "misa-fp32-fp32": _misa(F32, "float32"),
    "misa-fp32-int8": _misa(F32, "int8"),
    "torch-fused-master-clip": _torch_master(clips=True),
    "torch-fused-master-norm": _torch_master(clips=False),
    "torch-fused-fp32": _optimizer(_ADAMW, F32, traffic.fused(F32, [F32, F32]), fused=True),
    "torch-default-fp32": _optimizer(_ADAMW, F32, traffic.EAGER_ADAMW),
    "torch-fused-bf16": _optimizer(_ADAMW, BF16, traffic.fused(BF16, [BF16, BF16]), fused=True),
    "optimi-kahan-bf16": _optimizer(
        "optimi.AdamW", BF16, traffic.fused(BF16, [BF16, BF16], [BF16]), "torch-optimi", kahan_sum=True
    ),
    "flashoptim-24": _flash(24, I8),
    "flashoptim-32": _flash(32, I16),
}

"""The optimizer updates that the kernel benchmarks compare: ours and those of torch, torch-optimi and FlashOptim.

Each builds its own weights, gradients and states of the same number of parameters and gives what comes before the
update (global norm, clipping), the update, and of ours the launch without the small kernel before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from misa_engine import MisaConfig
from misa_engine.bench import traffic
from misa_engine.bench.measure import installed
from misa_engine.bench.traffic import BF16, F32, I8, I16, MOMENTS, U8
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
    """The module that it needs and what pip installs for it."""
    needs_cuda: bool = False

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run here; None when it can."""
        module, _, distribution = self.package.partition(" ")
        if module and not installed(module):
            return f"missing: pip install {distribution}"
        if self.needs_cuda and device.type != "cuda":
            return "needs a CUDA device"
        return None


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

    residual = [I16] if dtype == BF16 else []
    return Scheme(build, traffic.norm(dtype), traffic.fused(dtype, dtype, MOMENTS[state], residual))


# ---- others ----


def parameters_with_gradients(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Leaf tensors that have a ``.grad``."""
    parameters = [weight.requires_grad_() for weight in draws(sizes, dtype, device, 0.02)]
    for parameter, gradient in zip(parameters, draws(sizes, dtype, device, 1e-3), strict=True):
        parameter.grad = gradient
    return parameters


def _clip(parameters: Sequence[Tensor]) -> Work:
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def _optimizer(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    dtype: torch.dtype,
    update_bytes: float,
    package: str = "",
    needs_cuda: bool = False,
) -> Scheme:
    """A torch optimizer after ``clip_grad_norm_``."""

    def build(sizes: Sequence[int], device: torch.device) -> Update:
        parameters = parameters_with_gradients(sizes, device, dtype)
        step = make(parameters).step
        return Update(parameters, _clip(parameters), step, step)

    before_bytes = traffic.norm(dtype) + traffic.clip(dtype)
    return Scheme(build, before_bytes, update_bytes, package, needs_cuda)


def _torch_master(clips: bool) -> Scheme:
    """bfloat16 model, float32 master: ``torch._fused_adamw_`` with a cast before and a copy back after."""

    def build(sizes: Sequence[int], device: torch.device) -> Update:
        weights = parameters_with_gradients(sizes, device, BF16)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        masters = [weight.detach().float() for weight in weights]
        wide, m, v = ([torch.zeros_like(master) for master in masters] for _ in range(3))
        steps = [torch.zeros((), device=device) for _ in masters]
        models = [weight.detach() for weight in weights]
        beta1, beta2 = HYPERPARAMETERS["betas"]
        options = {name: HYPERPARAMETERS[name] for name in ("lr", "eps", "weight_decay")}

        def update() -> None:
            torch._foreach_add_(steps, 1)
            torch._foreach_copy_(wide, gradients)
            torch._fused_adamw_(
                masters, wide, m, v, [], steps, **options, beta1=beta1, beta2=beta2, amsgrad=False, maximize=False
            )
            torch._foreach_copy_(models, masters)

        before = _clip(weights) if clips else lambda: torch.nn.utils.get_total_norm(gradients)
        return Update(weights, before, update, update)

    before_bytes = traffic.norm(BF16) + (traffic.clip(BF16) if clips else 0)
    return Scheme(build, before_bytes, traffic.torch_with_master(BF16, BF16))


def _from(module: str, name: str, **own: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """An optimizer's class, imported when it is made."""
    return lambda parameters: getattr(import_module(module), name)(parameters, **HYPERPARAMETERS, **own)


def _flash(bits: int, correction: torch.dtype) -> Scheme:
    scale = (torch.float16, 32)
    moved = traffic.fused(BF16, BF16, [I8, U8, scale, scale], [correction])
    make = _from("flashoptim", "FlashAdamW", master_weight_bits=bits)
    return _optimizer(make, BF16, moved, "flashoptim flashoptim", needs_cuda=True)


_FUSED = _from("torch.optim", "AdamW", fused=True)
_KAHAN = _from("optimi", "AdamW", kahan_sum=True)

#: Rows of the tables. torch-default is what ``torch.optim.AdamW(...)`` gives: foreach on a GPU, a loop on a CPU.
SCHEMES: dict[str, Scheme] = {
    "misa-bf16-fp32": _misa(BF16, "float32"),
    "misa-bf16-int8": _misa(BF16, "int8"),
    "misa-fp32-fp32": _misa(F32, "float32"),
    "misa-fp32-int8": _misa(F32, "int8"),
    "torch-fused-master-clip": _torch_master(clips=True),
    "torch-fused-master-norm": _torch_master(clips=False),
    "torch-fused-fp32": _optimizer(_FUSED, F32, traffic.fused(F32, F32, [F32, F32])),
    "torch-default-fp32": _optimizer(_from("torch.optim", "AdamW"), F32, traffic.eager_adamw(F32)),
    "torch-fused-bf16": _optimizer(_FUSED, BF16, traffic.fused(BF16, BF16, [BF16, BF16])),
    "optimi-kahan-bf16": _optimizer(_KAHAN, BF16, traffic.fused(BF16, BF16, [BF16] * 2, [BF16]), "optimi torch-optimi"),
    "flashoptim-24": _flash(24, I8),
    "flashoptim-32": _flash(32, I16),
}
